"""The page in a real browser: keys, clicks, undo, reloads, two people, a phone, hostile texts."""

import os
import time
from pathlib import Path

import pytest
from feedback_browser import CHROMIUM, DRIVER, browsing, served, until
from feedback_rounds import candidates, check_books

from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.quality import overview

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)
GUIDELINES = "# What counts\n\nPrefer the response that is **right**, then the clearer one."


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Page:
    """The page of one person, and what they can see and do."""

    def __init__(self, driver, address, store, name="ann", *, admin=False, path="/"):
        self.driver, self.address, self.store = driver, address, store
        self.person, token = store.add_annotator(name, admin=admin)
        driver.delete_all_cookies()
        driver.get("about:blank")
        driver.get_log("browser")  # what earlier pages left
        driver.get(f"{address}{path}#{token}")

    def script(self, code):
        return self.driver.execute_script(f"return {code}")

    def text(self, where):
        return self.script(f"document.getElementById('{where}').innerText")

    def ready(self):
        return until(lambda: self.script("!document.getElementById('work').hidden && !busy && 1"))

    def prompt(self):
        self.ready()
        return self.text("prompt-body")

    def key(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def moved_on(self, before):
        until(lambda: self.script("!busy") and self.text("prompt-body") != before)

    def verdicts(self):
        rows = self.store.database.rows("SELECT verdict FROM judgements ORDER BY id")
        return [row["verdict"] for row in rows]

    def quiet(self):
        """Nothing was refused by the policy, and no script failed."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def picture(self, name):
        """Kept where FEEDBACK_SCREENSHOTS says, to be looked at by eye."""
        if folder := os.environ.get("FEEDBACK_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder, f"{name}.png")))


@pytest.fixture
def store(make_store):
    given = [
        Candidates(
            f"Question {n}: what is **{n}** + 1?",
            (
                Response(f"The answer is {n + 1}.\n\n- one\n- two"),
                Response(f"The answer is surely {n + 2}, I *think*.\n\n```\nprint({n} + 2)\n```"),
            ),
        )
        for n in range(12)
    ]
    return make_store(given=given)


@pytest.fixture
def page(driver, store):
    with served(store, guidelines=GUIDELINES, assess=overview) as address:
        yield Page(driver, address, store)
        driver.get("about:blank")


@pytest.mark.parametrize(
    ("key", "verdict"), [("1", "prefer"), ("2", "prefer"), ("t", "tie"), ("B", "both_bad"),
                         ("s", "skip")]
)  # fmt: skip
def test_keys_judge(page, key, verdict):
    before = page.prompt()
    chosen = page.text({"1": "left-body", "2": "right-body"}.get(key, "left-body"))
    page.key(key)
    page.moved_on(before)
    assert page.verdicts() == [verdict]
    if verdict == "prefer":
        winner = page.store.database.rows(
            "SELECT r.content FROM judgements j JOIN responses r ON r.id = j.winner"
        )[0][0]
        assert ("surely" in winner) == ("surely" in chosen)
    assert page.quiet() == []


def test_every_choice_can_be_clicked(page):
    for selector in ("left", "right", "tie", "both_bad", "skip"):
        before = page.prompt()
        page.click(f"[data-choice={selector}]")
        page.moved_on(before)
    assert page.verdicts() == ["prefer", "prefer", "tie", "both_bad", "skip"]
    check_books(page.store)


def test_undo_shows_the_same_pair_with_the_same_sides_again(page):
    before, left = page.prompt(), page.text("left-body")
    assert not page.driver.find_element("id", "undo").is_enabled()
    page.key("1")
    page.moved_on(before)
    second = page.text("prompt-body")
    page.key("u")
    page.moved_on(second)
    assert (page.prompt(), page.text("left-body")) == (before, left)
    page.click("[data-choice=tie]")
    page.moved_on(before)
    assert page.verdicts() == ["prefer", "undo", "tie"]


def test_a_reload_in_the_middle_shows_the_same_pair(page):
    page.key("x")
    first = page.prompt()
    page.key("1")
    page.moved_on(first)
    before = page.prompt(), page.text("left-body")
    page.driver.refresh()
    assert (page.prompt(), page.text("left-body")) == before
    assert page.verdicts() == ["prefer"]


def test_going_back_and_forward_loses_nothing(page):
    first = page.prompt()
    page.key("1")
    page.moved_on(first)
    before = page.prompt()
    assert page.script("location.hash") == "", "the token is not in the address"
    page.driver.get("about:blank")
    page.driver.back()
    assert page.prompt() == before
    page.key("2")
    page.moved_on(before)
    assert page.verdicts() == ["prefer", "prefer"]


def test_two_people_at_once(page, tmp_path):
    with browsing(tmp_path / "other") as other:
        bob = Page(other, page.address, page.store, "bob")
        for person, key in ((page, "1"), (bob, "2"), (page, "t"), (bob, "t"), (bob, "1")):
            before = person.prompt()
            person.key(key)
            person.moved_on(before)
        until(lambda: "You: 2" in page.text("progress-text"))
        until(lambda: "You: 3" in bob.text("progress-text"))
        assert len(page.verdicts()) == 5
    check_books(page.store)


def test_two_tabs_of_one_person_judge_a_pair_once(page):
    before = page.prompt()
    first = page.driver.current_window_handle
    page.script("(window.old = queue[0], 1)")
    page.driver.switch_to.new_window("tab")
    page.driver.get(page.address)
    assert page.prompt() == before
    page.key("1")
    page.moved_on(before)
    page.driver.switch_to.window(first)
    # The first tab may have noticed by itself; it is put back to where it was.
    until(lambda: page.script("!busy"))
    page.script("(turn++, queue = [old], draw(), 1)")
    page.key("2")
    until(lambda: "judged before" in page.text("message"))
    until(lambda: page.script("!busy") and page.text("prompt-body") != before)
    assert page.verdicts() == ["prefer"]
    page.driver.switch_to.window(page.driver.window_handles[1])
    page.driver.close()
    page.driver.switch_to.window(first)


def test_all_done_is_said_and_the_last_choice_can_still_be_undone(driver, make_store):
    store = make_store(1, overlap=1)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        page.key("1")
        until(lambda: "All done" in page.text("notice-title"))
        page.key("u")
        page.ready()
        assert page.verdicts() == ["prefer", "undo"]


def test_nothing_advances_before_the_server_has_confirmed(driver, make_store):
    """The server is away while the choice is made; the choice arrives once when it is back."""
    store = make_store(4)
    with served(store) as address:
        page = Page(driver, address, store)
        before = page.prompt()
        page.script("(window.realFetch = fetch, window.fetch = () => Promise.reject(new Error()))")
        page.key("1")
        until(lambda: "Not saved yet" in page.text("message"))
        assert page.text("prompt-body") == before and page.verdicts() == []
        page.key("2")  # a second choice while the first is on its way changes nothing
        page.script("(window.fetch = realFetch, 1)")
        page.moved_on(before)
        assert page.verdicts() == ["prefer"] and page.text("message") == ""


def test_a_forged_link_is_told_and_nothing_is_shown(driver, store):
    with served(store) as address:
        driver.delete_all_cookies()
        driver.get(f"{address}/#{'x' * 32}")
        until(lambda: "not valid" in driver.find_element("id", "notice-text").text)
        assert not driver.find_element("id", "choices").is_displayed()


def test_strength_and_reason_go_with_the_choice_and_typing_is_no_choice(page):
    before = page.prompt()
    page.click("#more summary")
    page.click("input[name=strength][value='3']")
    page.driver.find_element("id", "reason").send_keys("because 1 2 t b s u")
    assert page.verdicts() == []
    page.click("[data-choice=left]")
    page.moved_on(before)
    row = page.store.database.rows("SELECT strength, reason, seconds FROM judgements")[0]
    assert row["strength"] == 3 and row["reason"] == "because 1 2 t b s u" and row["seconds"] > 0
    assert page.script("document.getElementById('reason').value") == ""


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


def test_the_administrators_page_shows_plots(driver, store):
    with served(store, assess=overview) as address:
        page = Page(driver, address, store)
        bob, _ = store.add_annotator("bob")
        for turn in range(8):
            for person, side in ((page.person, "left"), (bob, "tie" if turn % 3 else "left")):
                shown = store.next(person.id)[0]
                store.submit(person.id, shown.id, side, key=f"{turn}{person.name}", seconds=2.0)
        boss = Page(driver, address, store, "boss", admin=True, path="/admin")
        until(lambda: boss.script("document.querySelectorAll('svg').length") == 3, 20)
        assert "16 of 24" in boss.text("progress-text")
        labels = boss.script("[...document.querySelectorAll('svg')].map((s) => "
                             "s.getAttribute('aria-label'))")  # fmt: skip
        assert "Judgements by annotator" in labels[0] and "kappa" in labels[2]
        boss.picture("admin")
        assert boss.quiet() == []


def test_the_administrators_page_tells_others_to_go(driver, store):
    with served(store) as address:
        page = Page(driver, address, store, path="/admin")
        until(lambda: "administrator" in page.text("message"))


def test_a_page_of_candidates_alone_works_for_one_person(driver, make_store):
    store = make_store(given=candidates(2), overlap=1)
    with served(store) as address:
        page = Page(driver, address, store)
        page.prompt()
        assert page.script("document.getElementById('guidelines-button').hidden")
