"""The arena without a browser: queues, pairs, what is refused, and what a killed server leaves."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from arena_writers import FORM, MESSAGES, Writer, opened, phase
from feedback_browser import until
from feedback_http import BASE, Person
from feedback_rounds import check_books
from starlette.testclient import TestClient

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, open_store, to_pairs
from dpo_keras.feedback.arena import Arena
from dpo_keras.feedback.arena_server import MAX_QUERY, Turns, make_arena_app
from dpo_keras.feedback.live_pairs import chosen, held, present
from dpo_keras.feedback.request_guard import Refused
from dpo_keras.preferences import Message


class Asker(Person):
    """Somebody with the arena's page open."""

    def __init__(self, arena, name, turns=MESSAGES):
        self.annotator, self.token = arena.store.add_annotator(name)
        app = make_arena_app(arena, turns, guidelines="Be *kind*.")
        self.client = TestClient(app, base_url=BASE, raise_server_exceptions=False)
        self.client.post("/api/session", json={"token": self.token})
        self.csrf = self.get("/api/me").json()["csrf"]

    def ask(self, query="Hi?", after=None):
        return self.post("/api/query", {"query": query, "after": after})

    def lines(self):
        return [json.loads(line) for line in self.get("/api/stream").text.splitlines()]

    def pair(self):
        shown = self.get("/api/next?count=3").json()["presentations"]
        return shown[0] if shown else None


def words(nodes):
    return "".join(n if isinstance(n, str) else words(n[2]) for n in nodes)


def test_a_query_becomes_a_pair_with_the_sides_that_were_on_the_screen(tmp_path):
    slow = Writer()
    slow.gate.clear()
    with opened(tmp_path, slow) as arena:
        ann = Asker(arena, "ann")
        assert ann.ask("What is two?").status_code == 200
        phase(arena, ann.annotator.id, "writing")
        for _ in range(3):
            slow.words.release()
        until(lambda: any(arena.snapshot(ann.annotator.id).texts))
        seen = arena.snapshot(ann.annotator.id).texts
        slow.gate.set()
        lines = ann.lines()
        assert lines[-1]["phase"] == "done" and words(lines[0]["prompt"][0]["body"])
        pair = ann.pair()
        sides = words(pair["left"]), words(pair["right"])
        assert all(whole.startswith(part) for whole, part in zip(sides, seen, strict=True))
        assert sides[0] != sides[1] and "says" not in str(pair["id"])
        assert ann.judge(pair["id"], "right").status_code == 200
        exported = to_pairs(arena.store).pairs[0]
        assert (exported.prompt, exported.chosen) == ("What is two?", sides[1])
        assert arena.store.database.rows("SELECT maker FROM responses")[0][0] == "a temperature=1"
        check_books(arena.store)


def test_policies_take_sides_by_chance_and_names_are_never_sent(tmp_path):
    writers = [Writer(name, say=lambda *_, name=name: name[::-1]) for name in ["ab", "ac", "ad"]]
    with opened(tmp_path, *writers, chance=random.Random(0)) as arena:
        ann = Asker(arena, "ann")
        assert ann.ask().status_code == 200
        sent = ann.get("/api/stream").text
        pair = ann.pair()
        sent += str(pair) + str(ann.judge(pair["id"]).json()) + ann.get("/api/conversation").text
        assert not any(name in sent for name in ("'ab'", '"ab', "ac", "ad", "policy", "seed"))
        bob, sides = arena.store.add_annotator("bob")[0].id, set()
        for turn in range(40):
            arena.ask(bob, f"Query {turn}")
            phase(arena, bob, "done")
            shown = held(arena.store, bob)[0]
            sides.add((shown.left, shown.right))
            arena.store.submit(bob, shown.id, "tie", key=str(turn))
        assert len(sides) == 6, "every two, in both orders"


def test_a_text_that_comes_as_a_whole_does_not_tell_who_wrote_it(tmp_path):
    streams, whole = Writer("a"), Writer("b", streams=False)
    streams.gate.clear()
    with opened(tmp_path, streams, whole) as arena:
        arena.ask(1, "Hi")
        until(lambda: whole.batches)
        streams.words.release()
        time.sleep(0.1)
        assert arena.snapshot(1).texts == ("", "")


def test_people_who_wait_are_answered_together_and_told_their_place(tmp_path):
    slow = Writer()
    slow.gate.clear()
    with opened(tmp_path, slow, max_unfinished=4) as arena:
        people = [Asker(arena, f"p{n}") for n in range(5)]
        ids = [one.annotator.id for one in people]
        assert people[0].ask().status_code == 200
        until(lambda: slow.batches == [2])
        for one in people[1:4]:
            assert one.ask(f"from {one.annotator.name}").status_code == 200
        assert [arena.snapshot(i).position for i in ids[:4]] == [0, 1, 2, 3]
        full = people[4].ask()
        assert full.status_code == 503 and full.headers["Retry-After"] == "30"
        assert "4 queries are waiting already" in full.json()["error"]
        again = people[1].ask("another")
        assert again.status_code == 409 and "still being answered" in again.json()["error"]
        slow.gate.set()
        for i in ids[:4]:
            phase(arena, i, "done")
        assert slow.batches == [2, 6]
        assert people[4].ask().status_code == 200
        phase(arena, ids[4], "done")
        check_books(arena.store)


def test_nobody_is_given_the_pair_of_another(tmp_path):
    with opened(tmp_path, Writer(), overlap=2) as arena:
        ann, bob = Asker(arena, "ann"), Asker(arena, "bob")
        ann.ask()
        phase(arena, ann.annotator.id, "done")
        assert ann.pair() is not None and bob.pair() is None
        assert bob.judge(ann.pair()["id"]).status_code == 409
        assert bob.lines() == [{"phase": None}]


def test_a_slow_policy_keeps_no_other_request_waiting(tmp_path):
    slow = Writer()
    slow.gate.clear()
    with opened(tmp_path, slow) as arena:
        ann = Asker(arena, "ann")
        ann.ask()
        until(lambda: slow.batches)
        began = time.monotonic()
        assert ann.get("/api/me").status_code == ann.get("/api/next").status_code == 200
        assert ann.get("/api/conversation").json()["phase"] == "writing"
        assert time.monotonic() - began < 1


def test_the_same_and_empty_responses_are_drawn_again_and_then_refused(tmp_path):
    drawn = iter(["same", "same", "", "another", "", "kept", "new"] + ["same"] * 99)
    with opened(tmp_path, Writer(say=lambda *_: next(drawn))) as arena:
        arena.store.add_annotator("ann")
        arena.ask(1, "Hi")
        phase(arena, 1, "done")
        shown = held(arena.store, 1)[0]
        assert (shown.left, shown.right) == ("same", "another")
        arena.store.submit(1, shown.id, "tie", key="k")
        arena.ask(1, "He")
        phase(arena, 1, "done")
        shown = held(arena.store, 1)[0]
        assert (shown.left, shown.right) == ("new", "kept"), "the empty one, not the other"
        arena.ask(1, "Ho")
        found = phase(arena, 1, "failed")
        assert found.message == (
            "both responses were the same; ask something else, or in other words."
        )
    with pytest.raises(InputError, match="temperature must be > 0 with one policy"):
        Arena(None, [Writer(varies=False)])


def test_a_pair_that_was_judged_before_is_not_shown_again(tmp_path):
    greedy = [Writer(name, varies=False) for name in "ab"]
    with opened(tmp_path, *greedy) as arena:
        ann, bob = Asker(arena, "ann"), Asker(arena, "bob")
        ann.ask("Hi")
        phase(arena, ann.annotator.id, "done")
        ann.judge(ann.pair()["id"])
        for person in (ann, bob):  # by herself; by as many others as shall judge it
            person.ask("Hi")
            message = phase(arena, person.annotator.id, "failed").message
            assert "these two responses to this query were judged before" in message
        check_books(arena.store)


def test_a_policy_that_fails_is_told_and_the_next_query_is_answered(tmp_path, caplog):
    def fail(prompt, seed):
        if "fail" in prompt:
            raise RuntimeError("no memory")
        return str(seed)

    class Picky(Writer):
        def prepare(self, prompt):
            if "long" in prompt:
                raise InputError("the query has 99 tokens.")
            return prompt

    with opened(tmp_path, Picky(say=fail)) as arena:
        people = [arena.store.add_annotator(name)[0].id for name in ("ann", "bob")]
        arena.ask(people[0], "fail")
        assert "the policy failed" in phase(arena, people[0], "failed").message
        assert "no memory" in caplog.text
        arena.ask(people[0], "too long")
        arena.ask(people[1], "short")
        assert phase(arena, people[0], "failed").message == "the query has 99 tokens."
        phase(arena, people[1], "done")


def test_wrong_queries_are_refused_with_a_sentence(tmp_path):
    with opened(tmp_path, Writer()) as arena:
        ann = Asker(arena, "ann")
        for query, status in ((None, 400), (" \n", 400), (5, 400), ("\ud800", 400),
                              ("x" * (MAX_QUERY + 1), 413)):  # fmt: skip
            body = json.dumps({"query": query})
            headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
            answer = ann.client.post("/api/query", content=body, headers=headers)
            assert answer.status_code == status and answer.json()["error"]
        for after in (True, "1", 1.5):
            assert ann.ask(after=after).status_code == 400
        assert ann.ask(after=7).status_code == ann.ask(after=2**70).status_code == 409
        assert ann.client.post("/api/query", json={"query": "Hi"}).status_code == 403
        other = {"Origin": "https://evil.example", "X-CSRF-Token": ann.csrf}
        assert ann.client.post("/api/query", json={"query": "Hi"}, headers=other).status_code == 403
        ann.client.cookies.clear()
        assert ann.get("/api/stream").status_code == 401
        assert ann.ask().status_code == 401
        assert arena.unfinished() == 0
        script = ann.get("/").headers["content-security-policy"].split("script-src ")[1]
        assert script.count("sha256") >= 3 and "unsafe" not in script


def test_a_conversation_goes_on_with_the_chosen_response(tmp_path):
    with opened(tmp_path, Writer()) as arena:
        ann = Asker(arena, "ann")
        ann.ask("One?")
        phase(arena, ann.annotator.id, "done")
        pair = ann.pair()
        assert ann.ask("Two?").status_code == 409, "the choice comes first"
        ann.judge(pair["id"], "left", key="one")
        talk = ann.get("/api/conversation").json()
        assert talk["after"] == pair["id"]
        assert [turn["role"] for turn in talk["turns"]] == ["Person", "Assistant"]
        assert ann.ask("Two?", after=pair["id"]).status_code == 200
        phase(arena, ann.annotator.id, "done")
        second = ann.pair()
        assert [turn["role"] for turn in second["prompt"]] == ["Person", "Assistant", "Person"]
        assert words(second["prompt"][1]["body"]) == words(pair["left"])
        ann.judge(second["id"], "tie", key="two")
        assert ann.get("/api/conversation").json()["after"] is None, "nothing was chosen"
        exported = [one for one in to_pairs(arena.store).pairs if one.prompt != "One?"]
        assert isinstance(exported[0].prompt[0], Message)
        ann.post("/api/undo", {"presentation": second["id"], "key": "undo"})
        assert ann.pair()["id"] == second["id"]
        check_books(arena.store)


def test_without_a_template_a_conversation_goes_on_as_the_form_says(tmp_path):
    assert FORM.prompt("2?", after=("Q: 1?\nA:", " One.")) == "Q: 1?\nA: One.Q: 2?\nA:"
    alone = Turns()
    assert alone.prompt("as it is ") == "as it is " and not alone.go_on
    with pytest.raises(Refused, match="knows no turns"):
        alone.prompt("2?", after=("1?", " One."))
    for wrong in ("", "{query}{query}", "query"):
        with pytest.raises(InputError, match="must hold {query} once"):
            Turns(form=wrong)
    with pytest.raises(InputError, match="is for policies without a chat template"):
        Turns(form="{query}", messages=True)
    with opened(tmp_path, Writer()) as arena:
        ann = Asker(arena, "ann", FORM)
        ann.ask("One?")
        phase(arena, ann.annotator.id, "done")
        assert words(ann.pair()["prompt"][0]["body"]) == "Q: One?A:"


def test_a_pair_of_another_source_is_leased_with_the_sides_on_the_screen(make_store):
    pair = Candidates("Hi", (Response("one"), Response("two")))
    store = make_store(given=[pair])
    ann, bob = (store.add_annotator(name)[0].id for name in ("ann", "bob"))
    shown = present(store, ann, pair)
    assert held(store, ann)[0].left == "one"
    swapped = Candidates("Hi", pair.responses[::-1])
    assert present(store, ann, swapped) == shown and held(store, ann)[0].left == "two"
    store.submit(ann, shown, "left", key="k")
    assert chosen(store, ann, shown) == ("Hi", "two") and chosen(store, bob, shown) is None
    assert present(store, ann, pair) is None
    assert present(store, bob, pair) is not None
    with pytest.raises(InputError, match="two different ones"):
        present(store, ann, Candidates("Hi", (Response("one"), Response(" one"))))
    check_books(store)


def test_nobody_sees_all_of_both_responses_before_the_store_has_them(tmp_path, monkeypatch):
    seen = []

    def slow(store, annotator, candidates):
        for _ in range(20):
            seen.append(arena.snapshot(annotator).texts)
            time.sleep(0.005)
        texts = tuple(response.text for response in candidates.responses)
        assert texts not in seen and held(store, annotator) == []
        return present(store, annotator, candidates)

    monkeypatch.setattr("dpo_keras.feedback.arena.present", slow)
    with opened(tmp_path, Writer()) as arena:
        arena.store.add_annotator("ann")
        arena.ask(1, "Hi")
        phase(arena, 1, "done")
    assert seen


def test_a_fault_of_the_store_that_nobody_foresaw_leaves_nobody_waiting(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("unforeseen")

    monkeypatch.setattr("dpo_keras.feedback.arena.present", fail)
    with opened(tmp_path, Writer()) as arena:
        arena.ask(1, "Hi")
        assert "the policy failed" in phase(arena, 1, "failed").message


def test_a_store_that_cannot_be_written_fails_the_query_and_not_the_server(tmp_path, monkeypatch):
    with opened(tmp_path, Writer(), chance=random.Random(0)) as arena:
        arena.store.add_annotator("ann")
        with monkeypatch.context() as patch:

            def full(*_):
                raise InputError("the disk is full: nothing was saved.")

            patch.setattr("dpo_keras.feedback.arena.present", full)
            arena.ask(1, "Hi")
            assert "disk is full" in phase(arena, 1, "failed").message
        arena.ask(1, "Hi")
        phase(arena, 1, "done")


KILLED = """
import sys, time
from pathlib import Path
from arena_writers import Writer, opened
with opened(Path(sys.argv[1]), Writer()) as arena:
    ann = arena.store.add_annotator("ann")[0].id
    arena.ask(ann, "Hi")
    while arena.snapshot(ann).phase != "done":
        time.sleep(0.01)
    arena.responders[0].gate.clear()
    bob = arena.store.add_annotator("bob")[0].id
    arena.ask(bob, "Ho")
    print("done", flush=True)
    time.sleep(60)
"""


def test_what_was_shown_completely_outlives_kill_9(tmp_path):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:0] = {folders!r}" + KILLED
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "done\n"
        process.send_signal(signal.SIGKILL)
    store = open_store(tmp_path / "arena.sqlite")
    shown = held(store, 1)
    assert len(shown) == 1 and shown[0].prompt == "Hi" and held(store, 2) == []
    store.submit(1, shown[0].id, "left", key="after")
    check_books(store)
    store.close()
