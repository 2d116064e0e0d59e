"""Ranking in a real browser: keys, clicks, dragging, ties, undo, reload, a phone."""

import pytest
from feedback_browser import Page, browsing, needs_browser, served, until
from feedback_rounds import check_books

from dpo_keras.feedback import Candidates, Response, to_rankings

pytestmark = needs_browser

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> **bold** \u202eevil\u202c"


def prompts(count):
    return [
        Candidates(
            f"Question {n}: what is **{n}** + 1?",
            tuple(
                Response(
                    f"Answer number {k}: it is {n + k}.\n\n- one\n- two" if k else HOSTILE + str(n)
                )
                for k in range(4)
            ),
        )
        for n in range(count)
    ]


@pytest.fixture
def store(make_store):
    return make_store(given=prompts(5), overlap=1, ranking=True)


@pytest.fixture
def page(driver, store):
    with served(store) as address:
        yield Page(driver, address, store)
        driver.get("about:blank")


def keys(page, *pressed):
    for key in pressed:
        page.key(key)


def order(page):
    return page.script("order")


def test_keys_rank_the_best_first_and_the_last_is_placed_by_itself(page, store):
    before = page.prompt()
    assert not page.driver.find_element("css selector", "[data-act=save]").is_enabled()
    keys(page, "3", "1", "4")
    assert order(page) == [[2], [0], [3], [1]]
    keys(page, "\ue007")  # Enter
    page.moved_on(before)
    assert to_rankings(store)[0]["ranking"] == [2, 4, 1, 3]
    assert page.quiet() == []
    check_books(store)


def test_ties_and_taking_back(page, store):
    before = page.prompt()
    keys(page, "1", "2", "\ue003", "=", "3", "4")
    assert order(page) == [[0, 2], [3], [1]]
    keys(page, "\ue007")
    page.moved_on(before)
    assert to_rankings(store)[0]["scores"] == [-1, -4, -1, -3]


def test_clicks_and_dragging(page, store):
    from selenium.webdriver import ActionChains

    before = page.prompt()
    for number in (0, 1, 2):
        page.click(f".place[data-number='{number}']")
    assert order(page) == [[0], [1], [2], [3]]
    first = page.driver.find_element("css selector", ".chip[data-number='0']")
    third = page.driver.find_element("css selector", ".chip[data-number='2']")
    distance = third.rect["x"] - first.rect["x"] + 15
    ActionChains(page.driver).click_and_hold(first).move_by_offset(distance, 0).release().perform()
    assert order(page) == [[1], [2], [0], [3]]
    chip = page.driver.find_element("css selector", ".chip[data-number='3']")
    chip.send_keys("\ue012")  # arrow left
    assert order(page) == [[1], [2], [3], [0]]
    page.click("[data-act=save]")
    page.moved_on(before)
    assert to_rankings(store)[0]["ranking"] == [4, 1, 2, 3]


def test_undo_and_a_reload_in_the_middle_show_the_same_ranking(page, store):
    before, texts = page.prompt(), page.text("ranked")
    keys(page, "1", "2", "3", "\ue007")
    page.moved_on(before)
    second = page.text("prompt-body")
    keys(page, "u")
    page.moved_on(second)
    assert page.prompt() == before
    page.driver.refresh()
    assert page.prompt() == before
    assert page.text("ranked") == texts
    assert to_rankings(store) == []
    keys(page, "4", "3", "2", "\ue007")
    page.moved_on(before)
    assert to_rankings(store)[0]["ranking"] == [4, 3, 2, 1]
    check_books(store)


def test_all_bad_and_skip(page, store):
    for key in ("b", "s"):
        before = page.prompt()
        keys(page, key)
        page.moved_on(before)
    assert page.verdicts() == ["both_bad"] * 6 + ["skip"] * 6


def test_hostile_responses_are_text(page):
    page.prompt()
    assert page.driver.find_elements("css selector", "#ranked img, #ranked script") == []
    assert "<script>alert(2)</script>" in page.text("ranked")
    assert page.quiet() == []


@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_nothing_is_cut_off(store, tmp_path, size):
    with served(store) as address, browsing(tmp_path / "profile", size) as driver:
        page = Page(driver, address, store, "bob")
        page.prompt()
        keys(page, "2", "=", "1", "3")
        inside = page.script(
            "[...document.querySelectorAll('#ranks button, .place')].every((b) => {"
            " const r = b.getBoundingClientRect();"
            " return r.left >= 0 && r.right <= innerWidth && r.width > 20; })"
        )
        assert inside
        assert page.script("document.documentElement.scrollWidth <= innerWidth")
        until(lambda: page.script("!busy"))
        page.picture(f"ranking-{size[0]}")
        page.script("(setTheme(true), 1)")
        page.picture(f"ranking-{size[0]}-dark")
