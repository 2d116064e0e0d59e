"""The server: what it does, what it refuses and how that is said, and that nothing is lost."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from feedback_browser import served, until
from feedback_http import BASE, Person
from feedback_rounds import check_books, count

from dpo_keras.errors import InputError
from dpo_keras.feedback import annotation_server, open_store
from dpo_keras.feedback.annotation_server import bind, run
from dpo_keras.feedback.request_guard import Address, address_of


def test_a_person_judges_all_pairs_and_sees_the_progress(store, ann):
    for turn in range(4):
        answer = ann.next(3)
        one = answer["presentations"][0]
        assert answer["own"] == turn and answer["wanted"] == 8
        assert ann.judge(one["id"], key=str(turn), seconds=1.5).status_code == 200
    answer = ann.next()
    assert answer["presentations"] == [] and answer["waiting"] is False and answer["own"] == 4
    assert count(store) == 4
    check_books(store)


def test_what_is_sent_to_people_hides_makers(store, ann):
    assert set(ann.next()["presentations"][0]) == {"id", "prompt", "left", "right"}
    assert '"a"' not in ann.get("/api/next").text


def test_pairs_that_the_page_knows_are_not_sent_again(store, ann):
    ids = [one["id"] for one in ann.next(3)["presentations"]]
    again = ann.get(f"/api/next?count=3&known={ids[0]},{ids[2]}").json()["presentations"]
    assert [set(one) == {"id"} for one in again] == [True, False, True]
    assert [one["id"] for one in again] == ids


def test_undo_over_http(store, ann):
    one = ann.next()["presentations"][0]["id"]
    assert ann.judge(one).json()["undoable"] == one
    assert ann.post("/api/undo", {"presentation": one, "key": "u"}).json()["undoable"] is None
    assert ann.next()["presentations"][0]["id"] == one
    check_books(store)


def test_submitting_twice_is_harmless(store, ann):
    one = ann.next()["presentations"][0]["id"]
    first, second = ann.judge(one).json(), ann.judge(one).json()
    assert first["judgement"] == second["judgement"] and second["again"]
    assert count(store) == 1


def test_a_second_tab_is_told(store, ann):
    one = ann.next()["presentations"][0]["id"]
    ann.judge(one, key="one")
    answer = ann.judge(one, "right", key="two")
    assert answer.status_code == 409 and "judged before" in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"\xff\xfe", 400),
        (b"[" * 60_000, 400),
        (b"{}", 400),
        (b'{"presentation": 1e400, "choice": "left", "key": "k"}', 400),
        (b'{"presentation": 99999999999999999999999, "choice": "left", "key": "k"}', 400),
        (b'{"presentation": 1, "choice": {"a": 1}, "key": []}', 400),
        (b'{"presentation": 1, "choice": "left", "key": "k", "seconds": NaN}', 400),
        (b'{"presentation": 1, "choice": "left", "key": "k", "reason": "\\ud800"}', 400),
        (b'{"x": "' + b"a" * 70_000 + b'"}', 413),
    ],
)
def test_broken_bodies_are_refused_with_a_message(store, ann, content, status):
    ann.next()
    for path in ("/api/judgements", "/api/undo"):
        if b"seconds" in content and path == "/api/undo" or b"reason" in content:
            continue
        headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
        answer = ann.client.post(path, content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]
    assert count(store) == 0


def test_a_reason_that_is_no_text_is_refused(store, ann):
    one = ann.next()["presentations"][0]["id"]
    body = b'{"presentation": %d, "choice": "left", "key": "k", "reason": "\\ud800"}' % one
    headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    answer = ann.client.post("/api/judgements", content=body, headers=headers)
    assert answer.status_code == 400 and "reason" in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"presentation": %s1%s, "choice": "left", "key": "k"}' % (b"[" * 900, b"]" * 900),
        b'{"presentation": 1, "choice": %s1%s, "key": "k"}' % (b'{"a":' * 900, b"}" * 900),
    ],
)
def test_values_that_are_nested_deep_are_refused(store, ann, body):
    headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    answer = ann.client.post("/api/judgements", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"], answer.text


def test_seconds_of_400_digits_are_a_day_at_most(store, ann):
    one = ann.next()["presentations"][0]["id"]
    assert ann.judge(one, seconds=10**399).status_code == 200
    assert store.database.rows("SELECT seconds FROM judgements")[0][0] == 86_400.0


def test_the_log_moves_into_the_file_when_it_is_quiet(store, tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_server, "QUIET_SECONDS", 0.05)
    _, token = store.add_annotator("bob")
    with served(store) as address:
        client = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/api/session", json.dumps({"token": token}), headers)
        assert client.getresponse().status == 200
        until(lambda: (tmp_path / "feedback.sqlite-wal").stat().st_size == 0)
        client.close()
    shutil.copy(tmp_path / "feedback.sqlite", tmp_path / "copy.sqlite")
    copy = open_store(tmp_path / "copy.sqlite", clock=store.clock)
    assert copy.start_session(token)[0].name == "bob"
    copy.close()


def test_requests_of_one_moment_share_a_transaction(store, monkeypatch):
    people = [Person(store, f"person {number}") for number in range(4)]
    app = people[0].client.app
    groups = []
    together = store.database.run_together
    monkeypatch.setattr(
        store.database, "run_together", lambda jobs: groups.append(len(jobs)) or together(jobs)
    )

    async def everybody():
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE,
                              headers={"Cookie": person.cookie.partition(";")[0]})
            for person in people
        ]  # fmt: skip
        return await asyncio.gather(*(client.get("/api/next") for client in clients))

    answers = asyncio.run(everybody())
    assert [answer.status_code for answer in answers] == [200] * 4
    assert groups == [4]
    check_books(store)


def test_a_body_in_pieces_is_limited_too(store, ann):
    headers = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json"}
    pieces = (b"x" * 1000 for _ in range(100))
    answer = ann.client.post("/api/judgements", content=pieces, headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "query", ["count=x", "count=-1", "known=1,x", "count=" + "9" * 5000, "known=" + "1" * 100]
)
def test_broken_queries_are_refused(ann, query):
    assert ann.get(f"/api/next?{query}").status_code == 400


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/annotate.js", "//etc/passwd",
     "/feedback.sqlite", "/api/", "/static/../schema.sql"],
)  # fmt: skip
def test_no_path_leads_to_the_file_system(ann, path):
    answer = ann.get(path)
    assert answer.status_code == 404 and "there is nothing here" in answer.json()["error"]


def test_other_methods_are_refused(ann):
    assert ann.client.delete("/api/judgements").status_code == 405
    assert ann.get("/api/judgements").status_code == 405


def test_a_full_disk_is_said_and_the_judgement_can_be_sent_again(store, ann, monkeypatch):
    one = ann.next()["presentations"][0]["id"]
    taken = store.database.batched

    def full(*_, **__):
        from dpo_keras.feedback import StoreError

        raise StoreError("store: the disk is full: nothing was saved.")

    monkeypatch.setattr(store.database, "batched", full)
    answer = ann.judge(one, key="same")
    assert answer.status_code == 503 and "disk is full" in answer.json()["error"]
    assert answer.headers["retry-after"] == "5"
    monkeypatch.setattr(store.database, "batched", taken)
    assert ann.judge(one, key="same").status_code == 200
    assert count(store) == 1


def test_an_unforeseen_error_is_answered_without_its_insides(store, ann, monkeypatch):
    monkeypatch.setattr(store, "next", lambda *_: 1 / 0)
    answer = ann.get("/api/next")
    assert answer.status_code == 500 and "ZeroDivision" not in answer.text
    assert answer.json()["error"].startswith("the server failed")


def test_the_overview_is_the_administrators(store, ann):
    assert ann.get("/api/admin").status_code == 403
    boss = Person(store, "boss", admin=True, assess=lambda store: {"figures": []})
    ann.judge(ann.next()["presentations"][0]["id"])
    seen = boss.get("/api/admin").json()
    assert seen["judged"] == 1 and seen["wanted"] == 8 and seen["agreement"] == {"figures": []}
    assert [(row["name"], row["judged"]) for row in seen["people"]] == [("ann", 1)]
    assert sum(hour[1] for hour in seen["hours"]) == 1


def test_a_taken_port_is_said(store):
    listening = bind("127.0.0.1", 0)
    listening.listen()
    with pytest.raises(InputError, match="cannot be listened on"):
        bind("127.0.0.1", listening.getsockname()[1])
    listening.close()


def test_addresses_and_the_names_they_answer_to():
    assert address_of("127.0.0.1", None) == Address(frozenset({"127.0.0.1"}))
    proxied = Address(frozenset({"a.example"}), "https://a.example:8443", "/x")
    assert address_of("0.0.0.0", "https://A.example:8443/x/") == proxied and proxied.secure
    assert address_of("127.0.0.1", "https://a.example:443").origin == "https://a.example"
    with pytest.raises(InputError, match="--url"):
        address_of("0.0.0.0", None)
    for wrong in (
        "a.example",
        "ftp://a.example",
        "https://",
        "https://a@b",
        "https://a?b",
        "https://a/#b",
        "https://[",
        "https://a:99999",
    ):
        with pytest.raises(InputError, match="url must be"):
            address_of("127.0.0.1", wrong)


async def nobody(scope, receive, send):
    raise AssertionError("nobody asks")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_soon_as_the_server_is_announced_ends_it(number):
    """As from a program that reads the links and has enough of it at once."""
    listening = bind("127.0.0.1", 0)
    before = signal.getsignal(number)
    run(nobody, listening, announce=lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before
    assert listening.fileno() == -1, "nobody waits at a closed door"


def test_connections_are_accepted_when_the_server_is_announced():
    listening = bind("127.0.0.1", 0)

    def announce():
        socket.create_connection(listening.getsockname(), timeout=5).close()
        os.kill(os.getpid(), signal.SIGINT)

    run(nobody, listening, announce)
