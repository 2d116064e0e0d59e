"""Judging in a real browser: keys, clicks, undo, reloads, two people, two tabs."""

import pytest
from feedback_browser import Page, browsing, needs_browser, served, until
from feedback_rounds import check_books

pytestmark = needs_browser


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


def test_a_wrong_link_shows_one_sentence_and_nothing_else(page):
    page.prompt()  # somebody is signed in here: a link that was cut off must not open their page
    shown = "document.body.innerText.trim()"
    for path, sentence in (
        (f"/#{'x' * 32}", "This link is not valid, or has expired; ask for a new one."),
        ("/#cut", "This link is not valid, or has expired; ask for a new one."),
        (f"/admin#{'x' * 32}", "This link is not valid, or has expired; ask for a new one."),
        ("/admin", "This page is the administrator's; open the administrator's link."),
        ("/wrong", "There is nothing here; open your link again."),
    ):
        page.driver.get("about:blank")
        page.driver.get(page.address + path)
        until(lambda sentence=sentence: page.script(shown) == sentence)
        assert page.script("[...document.querySelectorAll('button')].every((b) => !b.offsetWidth)")
    page.driver.delete_all_cookies()
    page.driver.get(page.address)
    until(lambda: page.script(shown) == "You are not signed in; open your link again.")


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
