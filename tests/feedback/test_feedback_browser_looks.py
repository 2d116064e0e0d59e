"""The page in a real browser: what it shows and how, on a phone too, and hostile texts."""

import time

from feedback_browser import Page, needs_browser, served, until
from feedback_rounds import candidates

from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.quality import overview

pytestmark = needs_browser


def test_differing_words_are_marked_and_marks_can_be_switched_off(page):
    page.prompt()
    marks = page.script("[...document.querySelectorAll('mark')].map((m) => m.textContent)")
    assert any("surely" in mark for mark in marks) and "The answer is" not in " ".join(marks)
    colour = "getComputedStyle(document.querySelector('mark')).backgroundColor"
    shown = page.script(colour)
    page.key("d")
    assert page.script(colour) != shown
    page.key("d")
    assert page.script(colour) == shown


def test_keys_are_listed_on_a_question_mark(page):
    page.prompt()
    page.key("?")
    assert page.script("document.getElementById('help').open")
    page.key("1")  # goes to the list, not to the pair
    page.click("#help button")
    assert page.verdicts() == []


def test_light_and_dark_are_readable(page):
    """Contrast of text on its ground is at least 4.5 to 1 in both themes."""
    contrast = """(() => {
      const value = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      const light = (c) => { const [r, g, b] = value(c); return 0.2126*r + 0.7152*g + 0.0722*b; };
      const pairs = [["#left-body", "#left"], ["#left-heading", "#left"], ["#undo", "#undo"],
        ["[data-choice=left]", "[data-choice=left]"], ["#progress-text", "header"],
        ["#left mark", "#left mark"], ["#right mark", "#right mark"]];
      return pairs.map(([ink, ground]) => {
        const a = light(getComputedStyle(document.querySelector(ink)).color);
        const b = light(getComputedStyle(document.querySelector(ground)).backgroundColor);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      });
    })()"""
    page.prompt()
    page.key("t")  # Undo is enabled from here on
    until(lambda: len(page.verdicts()) == 1)
    page.ready()
    for theme in ("light", "dark"):
        if page.script("document.documentElement.classList.contains('dark')") != (theme == "dark"):
            page.click("#theme-button")
        time.sleep(0.3)
        page.picture(f"annotate-{theme}")
        assert min(page.script(contrast)) >= 4.5, (theme, page.script(contrast))
    page.click("#theme-button")


def test_differences_are_not_marked_between_texts_with_little_in_common(driver, make_store):
    apart = (
        "Canberra is the capital of Australia. It lies between Sydney and Melbourne, and was built "
        "for the purpose after 1908, because neither of the two large cities let the other have it."
    )
    other = (
        "Sure! The seat of the government there is a planned town in the south-east. Its lake is "
        "artificial, the parliament stands on a hill, and people from abroad often guess wrong."
    )
    store = make_store(given=[Candidates("p", (Response(apart), Response(other)))], overlap=1)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        assert page.script("document.querySelectorAll('mark').length") == 0
        assert not page.driver.find_element("id", "diff-button").is_enabled()
        assert "too little in common" in page.script("document.getElementById('diff-button').title")


FORMATTED = Response(
    "| Language | Typing discipline | Memory management |\n|---|---|---|\n"
    "| JavaScript | dynamically typed | garbage-collected reference counting |\n\n"
    "```python\ndef count_words(path: str, encoding: str = 'utf-8') -> collections.Counter[str]:\n"
    "    return collections.Counter(open(path, encoding=encoding).read().lower().split())\n```\n"
)


def test_words_code_and_controls_have_room_on_a_phone(driver, make_store):
    """Words in tables are whole, code scrolls, and nothing is reached behind the footer."""
    hostile = Response(
        "[a](ftp://b 'c') \u202eevil\u202c\n\n[d]: http://e.v/f\n\n" + "long\n\n" * 30
    )
    store = make_store(given=[Candidates("p", (FORMATTED, hostile))], overlap=1)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        phone = {"width": 390, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        try:
            broken, lefts, page_scrolls, code_scrolls = page.script(_LAYOUT)
            assert broken == [] and not page_scrolls
            assert code_scrolls and len(lefts) == 2 and max(lefts) == min(lefts)
            page.click("#more summary")
            assert page.script(_HIDDEN_BY_FOOTER) == []
            page.picture("annotate-room")
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        seen = page.text("left-body") + page.text("right-body")
        for part in (
            "a(ftp://b 'c')",
            "U+202Eevil U+202C".replace(" ", ""),
            "[d]: http://e.v/f",
            "python",
        ):
            assert part in seen


_LAYOUT = """(() => {
  const rows = (node, from, to) => {
    const range = document.createRange();
    range.setStart(node, from); range.setEnd(node, to);
    return [...range.getClientRects()];
  };
  const broken = [];
  for (const cell of document.querySelectorAll("td, th")) {
    const node = cell.firstChild;
    for (const word of node.data.matchAll(/\\p{L}+/gu))
      if (rows(node, word.index, word.index + word[0].length).length > 1) broken.push(word[0]);
  }
  const pre = document.querySelector("pre"), code = pre.querySelector("code").firstChild;
  const starts = [0, code.data.indexOf("\\n") + 1];
  return [broken, starts.map((at) => rows(code, at, at + 1)[0].left),
    document.documentElement.scrollWidth > innerWidth, pre.scrollWidth > pre.clientWidth];
})()"""
_HIDDEN_BY_FOOTER = """(() => {
  const scrolled = document.getElementById("scrolled");
  const footer = document.getElementById("choices"), hidden = [];
  for (const one of document.querySelectorAll("main a, main summary, main input, main textarea")) {
    document.activeElement.blur();
    scrolled.scrollTo(0, 0);
    one.focus();
    const { top, bottom } = one.getBoundingClientRect();
    if (top < 0 || bottom > footer.getBoundingClientRect().top) hidden.push(one.tagName);
  }
  scrolled.scrollTo(0, scrolled.scrollHeight);
  const last = document.getElementById("more").getBoundingClientRect().bottom;
  return last > footer.getBoundingClientRect().top ? [...hidden, "more"] : hidden;
})()"""


def test_a_phone_shows_one_response_above_the_other_and_large_buttons(page):
    page.driver.set_window_size(500, 800)
    size = {"width": 375, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        before = page.prompt()
        time.sleep(0.2)
        page.picture("annotate-phone")
        box = "document.getElementById('{}').getBoundingClientRect().{}"
        assert page.script(box.format("right", "top")) >= page.script(box.format("left", "bottom"))
        assert page.script("document.documentElement.scrollWidth <= innerWidth")
        heights = "[...document.querySelectorAll('footer button, nav button')].map((b) => " \
                  "b.getBoundingClientRect().height)"  # fmt: skip
        assert min(page.script(heights)) >= 44
        page.click("[data-choice=right]")
        page.moved_on(before)
        assert page.verdicts() == ["prefer"]
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(1280, 900)


def test_names_roles_and_focus_are_there_for_screen_readers(page):
    page.prompt()
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if "role" in n}
    for role, name in (
        ("heading", "Prompt"), ("heading", "Response 1"), ("heading", "Response 2"),
        ("article", "Response 1"), ("button", "1 Response 1"), ("button", "T Tie"),
        ("button", "U Undo"), ("main", ""), ("status", ""),
    ):  # fmt: skip
        assert (role, name) in named, (role, name)
    nameless = [role for role, name in named if role in ("button", "textbox", "radio") and not name]
    assert nameless == []
    before = page.prompt()
    page.key("t")
    page.moved_on(before)
    assert page.script("document.activeElement.id") == "prompt-heading"
    assert "Saved" in page.script("document.getElementById('status').textContent")


def test_guidelines_open_once_by_themselves(page):
    page.prompt()
    page.script("(localStorage.clear(), 1)")
    page.driver.refresh()
    page.ready()
    assert "Prefer the response that is right" in page.text("guidelines")
    page.driver.refresh()
    page.ready()
    assert page.script("document.getElementById('guidelines').hidden")


def test_hostile_responses_are_text(driver, make_store):
    attack = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    given = [
        Candidates(
            attack,
            (
                Response(attack + " one [x](javascript:window.hacked=1)"),
                Response("\u202eمرحبا 👩‍👩‍👧‍👦 " + attack + "\n\n| a | b |\n|---|---|\n| 1 | 2 |"),
            ),
        )
    ]
    store = make_store(given=given)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        page.picture("annotate-hostile")
        for where in ("prompt-body", "left-body", "right-body"):
            assert "<script>window.hacked = 1</script>" in page.text(where)
        assert page.script("window.hacked === undefined")
        assert page.script("document.querySelectorAll('main script, main img').length") == 0
        assert page.quiet() == []


def test_responses_of_a_megabyte_are_shown_within_seconds(driver, make_store):
    long = "word and word " * 75_000
    store = make_store(given=[Candidates("p", (Response(long + "a"), Response(long + "b")))])
    with served(store) as address:
        page = Page(driver, address, store)
        began = time.monotonic()
        page.prompt()
        assert time.monotonic() - began < 8
        assert page.script("document.getElementById('left-body').textContent.length") > 1_000_000
        page.click("[data-choice=left]")
        until(lambda: page.verdicts() == ["prefer"])


def test_the_first_paint_takes_less_than_a_second(page):
    page.prompt()
    page.driver.refresh()
    page.ready()
    # The browser reports a paint after the frame it was in, so perhaps after the page was ready.
    painted = "performance.getEntriesByName('first-contentful-paint')"
    until(lambda: page.script(f"{painted}.length") == 1)
    paint = page.script(f"{painted}[0].startTime")
    size = page.script("performance.getEntriesByType('navigation')[0].transferSize")
    assert 0 < paint < 1000 and size < 100_000
    names = page.script("performance.getEntriesByType('resource').map((r) => r.name)")
    assert all(name.startswith(page.address) for name in names)


def test_the_administrators_page_shows_plots(driver, questions):
    with served(questions, assess=overview) as address:
        page = Page(driver, address, questions)
        bob, _ = questions.add_annotator("bob")
        for turn in range(8):
            for person, side in ((page.person, "left"), (bob, "tie" if turn % 3 else "left")):
                shown = questions.next(person.id)[0]
                questions.submit(person.id, shown.id, side, key=f"{turn}{person.name}", seconds=2.0)
        boss = Page(driver, address, questions, "boss", admin=True, path="/admin")
        until(lambda: boss.script("document.querySelectorAll('.track').length") >= 5, 20)
        assert "16 of 24" in boss.text("progress-text")
        assert "8 judged" in boss.text("people") and "16 in all" in boss.text("hours")
        assert "Cohen's kappa" in boss.text("agreement")
        axis = "agreement([{{label: '', value: 0.9, low: {}, high: 1}}])[0].lastChild.textContent"
        assert boss.script(axis.format(0.8)) == "00.250.50.751"
        assert boss.script(axis.format(-0.3)) == "-0.500.51"
        boss.picture("admin")
        assert boss.quiet() == []
        # A chart is as wide as its card, and its letters keep their size on a phone.
        filled = """[...document.querySelectorAll("ul.chart, .hours")].map((one) =>
          one.offsetWidth / one.closest("section").offsetWidth)"""
        sizes = """[...document.querySelectorAll(".chart span, .note, .ticks")].map((one) =>
          parseFloat(getComputedStyle(one).fontSize))"""
        phone = {"width": 390, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        try:
            for width in (1280, 390):
                size = {**phone, "width": width, "mobile": width == 390}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
                assert len(boss.script(filled)) == 3 and min(boss.script(filled)) > 0.85
                assert min(boss.script(sizes)) >= 12
                assert boss.script("document.documentElement.scrollWidth <= innerWidth")
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_of_candidates_alone_works_for_one_person(driver, make_store):
    store = make_store(given=candidates(2), overlap=1)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        assert page.script("document.getElementById('guidelines-button').hidden")
