"""The arena in a real browser: ask, watch, choose, go on; reloads, restarts, two people, phones."""

import time

import pytest
from arena_writers import MESSAGES, Writer, opened
from feedback_browser import Page, browsing, needs_browser, served, until
from feedback_rounds import check_books

from dpo_keras.feedback.arena import Arena
from dpo_keras.feedback.arena_server import Turns, make_arena_app

pytestmark = needs_browser


class Seat(Page):
    """The arena's page of one person."""

    def idle(self):
        return until(
            lambda: self.script("!document.getElementById('composer').hidden && !looking && 1")
        )

    def type(self, text):
        self.idle()
        self.driver.find_element("id", "query").send_keys(text)

    def ask(self, text):
        from selenium.webdriver.common.keys import Keys

        self.type(text)
        self.driver.find_element("id", "query").send_keys(Keys.ENTER)

    def pair(self):
        """Waits until a pair can be judged, and gives its sides."""
        until(lambda: self.script("queue.length && drawn === queue[0].id && !busy && !following"))
        return self.text("left-body"), self.text("right-body")


@pytest.fixture
def writer():
    return Writer()


@pytest.fixture
def seat(driver, tmp_path, writer):
    with opened(tmp_path, writer) as arena, served_arena(arena) as address:
        driver.get("about:blank")
        seat = Seat(driver, address, arena.store)
        seat.script("(localStorage.clear(), 1)")
        yield seat
        driver.get("about:blank")
        writer.gate.set()


def served_arena(arena, turns=MESSAGES, **options):
    return served(arena.store, make_arena_app(arena, turns, **options))


def test_ask_watch_choose_by_key_and_undo(seat, writer):
    writer.gate.clear()
    seat.ask("How are **you**?")
    for _ in range(2):
        writer.words.release()
    until(lambda: "a says" in seat.text("left-body"))
    assert "being written" in seat.text("writing") and seat.verdicts() == []
    assert not seat.driver.find_element("css selector", "[data-choice=left]").is_enabled()
    seat.key("1")  # nothing can be chosen yet
    seat.picture("arena-writing")
    writer.gate.set()
    left, right = seat.pair()
    assert left.startswith("a says") and left != right and seat.verdicts() == []
    assert seat.text("prompt-body") == "How are you?"
    assert seat.script("document.getElementById('composer').hidden")
    seat.picture("arena-pair")
    seat.key("2")
    seat.idle()
    assert seat.verdicts() == ["prefer"]
    assert right in seat.text("said") and seat.text("progress-text") == "You: 1"
    seat.picture("arena-go-on")
    seat.click("#undo")
    assert seat.pair() == (left, right)
    seat.key("t")
    seat.idle()
    assert seat.verdicts() == ["prefer", "undo", "tie"]
    check_books(seat.store)
    assert seat.quiet() == []


def test_a_conversation_goes_on_or_begins_anew(seat):
    seat.ask("One?")
    left, _ = seat.pair()
    seat.key("1")
    seat.ask("Two?")
    seat.pair()
    assert left in seat.text("prompt-body") and "Two?" in seat.text("prompt-body")
    seat.key("1")
    seat.idle()
    seat.click("#anew")
    assert seat.script("document.getElementById('said').hidden")
    seat.driver.refresh()
    seat.idle()
    assert seat.script("document.getElementById('said').hidden"), "a reload does not bring it back"
    seat.ask("Three?")
    seat.pair()
    assert seat.text("prompt-body") == "Three?"


def test_typing_is_no_choice_and_shift_enter_begins_a_line(seat):
    from selenium.webdriver.common.keys import Keys

    seat.type("1 2 t b s u d ?")
    seat.type(Keys.SHIFT + Keys.ENTER + Keys.NULL + "more")
    value = "document.getElementById('query').value"
    assert seat.script(value) == "1 2 t b s u d ?\nmore"
    assert seat.script("!document.getElementById('help').open && queue.length === 0")
    seat.click("#ask")
    seat.pair()
    prompt = seat.store.database.rows("SELECT content FROM prompts")[0][0]
    assert prompt == '"1 2 t b s u d ?\\nmore"'


def test_a_reload_in_the_middle_shows_the_text_so_far_and_goes_on(seat, writer):
    writer.gate.clear()
    seat.ask("Hi")
    writer.words.release()
    writer.words.release()
    until(lambda: seat.text("left-body") == "a says")
    seat.driver.refresh()
    until(lambda: seat.text("left-body") == "a says")
    writer.gate.set()
    left, right = seat.pair()
    assert left.startswith("a says") and left.endswith("to Hi") and left != right
    seat.driver.refresh()
    assert seat.pair() == (left, right)
    seat.key("1")
    seat.idle()
    assert seat.verdicts() == ["prefer"]


def test_a_stream_that_breaks_off_is_taken_up_again(seat, writer, monkeypatch):
    monkeypatch.setattr("dpo_keras.feedback.arena_server.STREAM_SECONDS", 0.3)
    writer.gate.clear()
    seat.script("(window.asked = 0, window.real = fetch, window.fetch = (path, options) => "
                "path.endsWith('stream') && ++asked === 2 ? Promise.reject(new Error()) "
                ": real(path, options))")  # fmt: skip
    seat.ask("Hi")
    until(lambda: seat.script("asked") >= 4)
    writer.gate.set()
    assert seat.pair()[0].endswith("to Hi") and seat.text("message") == ""


def test_a_server_that_was_killed_gives_the_query_back(driver, tmp_path, writer):
    writer.gate.clear()
    with opened(tmp_path, writer) as arena:
        with served_arena(arena) as address:
            seat = Seat(driver, address, arena.store)
            seat.ask("Hi there")
            until(lambda: "being written" in seat.text("writing"))
        until(lambda: "Trying again" in seat.text("message"))
        port = int(address.rpartition(":")[2])
        fresh = Arena(arena.store, [Writer("new")])  # it knows nothing of the query
        with served(arena.store, make_arena_app(fresh, MESSAGES), port=port):
            until(lambda: "started anew" in seat.text("message"), 20)
            assert seat.script("document.getElementById('query').value") == "Hi there"
            seat.click("#ask")
            assert "new says" in seat.pair()[0]
        fresh.close()


def test_two_people_at_once_see_their_own(seat, writer, tmp_path):
    writer.gate.clear()
    seat.ask("from ann")
    until(lambda: writer.batches == [2])
    with browsing(tmp_path / "other") as other:
        bob = Seat(other, seat.address, seat.store, "bob")
        bob.ask("from bob")
        until(lambda: "yours is next" in bob.text("writing"))
        bob.picture("arena-waiting")
        writer.gate.set()
        assert seat.pair()[0].endswith("from ann") and bob.pair()[0].endswith("from bob")
        seat.key("1")
        bob.key("b")
        for one in (seat, bob):
            one.idle()
        assert sorted(seat.verdicts()) == ["both_bad", "prefer"]
        assert seat.text("progress-text") == bob.text("progress-text") == "You: 1"
    check_books(seat.store)


def test_what_cannot_be_answered_is_said_and_the_query_comes_back(driver, tmp_path):
    with (
        opened(tmp_path, Writer(say=lambda *_: "same")) as arena,
        served_arena(arena, Turns()) as address,
    ):
        seat = Seat(driver, address, arena.store)
        seat.ask("Hi")
        until(lambda: "Both responses were the same" in seat.text("message"))
        assert seat.script("document.getElementById('query').value") == "Hi"
        assert "knows no turns" in seat.text("composer-note")
        seat.driver.refresh()
        until(lambda: "Both responses were the same" in seat.text("message"))
        seat.picture("arena-failed")


def test_hostile_queries_and_responses_are_text(driver, tmp_path):
    attack = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    replies = iter([f"{attack} one [x](javascript:window.hacked=1)",
                    f"\u202eevil {attack}\n\n| a | b |\n|---|---|\n| 1 | 2 |"])  # fmt: skip
    with (
        opened(tmp_path, Writer(say=lambda *_: next(replies))) as arena,
        served_arena(arena) as address,
    ):
        seat = Seat(driver, address, arena.store)
        arena.responders[0].gate.clear()
        seat.ask(attack)
        for _ in range(4):
            arena.responders[0].words.release()
        until(lambda: "<script>" in seat.text("left-body"))
        arena.responders[0].gate.set()
        seat.pair()
        seat.picture("arena-hostile")
        for where in ("prompt-body", "left-body", "right-body"):
            assert "<script>window.hacked = 1</script>" in seat.text(where)
        seat.key("1")
        seat.idle()
        assert "<script>window.hacked = 1</script>" in seat.text("said")
        assert seat.script("window.hacked === undefined")
        assert seat.script("document.querySelectorAll('main script, main img').length") == 0
        assert seat.quiet() == []


def test_a_phone_and_the_dark_have_room_for_everything(seat, writer):
    size = {"width": 375, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    seat.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    heights = "[...document.querySelectorAll('button')].filter((b) => b.offsetWidth)" \
              ".map((b) => b.getBoundingClientRect().height)"  # fmt: skip
    try:
        seat.idle()
        for theme in ("light", "dark"):
            if seat.script("document.documentElement.classList.contains('dark')") != (
                theme == "dark"
            ):
                seat.click("#theme-button")
            time.sleep(0.3)
            assert seat.script(fits) and min(seat.script(heights)) >= 44
            seat.picture(f"arena-phone-ask-{theme}")
            seat.ask(f"What does {theme} mean? " + "I ask at some length. " * 6)
            seat.pair()
            assert seat.script(fits) and min(seat.script(heights)) >= 44
            seat.picture(f"arena-phone-pair-{theme}")
            seat.click("[data-choice=right]")
            seat.idle()
            seat.picture(f"arena-phone-go-on-{theme}")
            assert seat.script(fits)
        assert seat.verdicts() == ["prefer", "prefer"]
    finally:
        seat.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    seat.picture("arena-dark-go-on")
    seat.ask("And now?")
    seat.pair()
    seat.picture("arena-dark-pair")
    seat.click("#theme-button")
