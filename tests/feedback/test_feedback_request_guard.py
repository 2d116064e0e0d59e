"""Who the server lets in: tokens, sessions, other sites, other host names, and at what rate."""

import http.client
import json
import logging
import socket
import time
from urllib.parse import urlsplit

import pytest
from feedback_browser import served, until
from feedback_http import BASE, Person, client_of
from feedback_rounds import check_books, count
from starlette.testclient import TestClient

from dpo_keras.errors import InputError
from dpo_keras.feedback import request_guard
from dpo_keras.feedback.annotation_server import make_app
from dpo_keras.feedback.request_guard import RateLimit, address_of

HTTPS = address_of("127.0.0.1", "https://a.example")
BELOW = address_of("127.0.0.1", "https://a.example/round/two")


@pytest.mark.parametrize("path", ["/api/me", "/api/next", "/api/admin"])
def test_nothing_is_told_to_strangers(store, path):
    stranger = client_of(store)
    assert stranger.get(path).status_code == 401
    stranger.cookies.set(f"feedback_{store.id}", "forged")
    assert stranger.get(path).status_code == 401


@pytest.mark.parametrize("path", ["/api/judgements", "/api/undo"])
def test_nothing_is_taken_from_strangers(store, path):
    assert client_of(store).post(path, json={"presentation": 1}).status_code == 401


def test_forged_and_expired_tokens_are_refused(store, clock):
    client = client_of(store)
    _, token = store.add_annotator("bob", days=1)
    for wrong in ("x" * 32, token[:-1], token + "a", ""):
        assert client.post("/api/session", json={"token": wrong}).status_code in (400, 401)
    for wrong in (None, 3, ["x"], "x" * 1000):
        assert client.post("/api/session", json={"token": wrong}).status_code == 400
    clock.now += 86_401
    answer = client.post("/api/session", json={"token": token})
    assert answer.status_code == 401 and "expired" in answer.json()["error"]
    assert "set-cookie" not in answer.headers


def test_a_session_ends(store, ann, clock):
    clock.now += 31 * 86_400
    assert ann.get("/api/next").status_code == 401


def test_the_cookie_is_kept_from_scripts_and_other_sites(store):
    cookie = Person(store, "bob").cookie.lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    assert "path=/;" in cookie


@pytest.mark.parametrize(
    ("address", "prefix", "path"), [(HTTPS, "__Host-", "/"), (BELOW, "__Secure-", "/round/two")]
)
def test_https_binds_the_cookie_to_the_host_and_the_browser_to_https(store, address, prefix, path):
    _, token = store.add_annotator("eve")
    answer = client_of(store, address=address).post("/api/session", json={"token": token})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{prefix}feedback_{store.id}=") and "; Secure" in cookie
    assert f"; Path={path};" in cookie and "Domain" not in cookie
    # Below a path the host is not ours alone.
    assert ("strict-transport-security" in answer.headers) == (address is HTTPS)
    assert "strict-transport-security" not in client_of(store).get("/").headers


def test_a_new_link_signs_the_old_one_out(store):
    bob, eve = Person(store, "bob"), Person(store, "eve")
    store.add_annotator("bob")
    assert bob.get("/api/next").status_code == 401
    assert eve.get("/api/next").status_code == 200
    store.add_annotator("eve", end_sessions=False)
    assert eve.get("/api/next").status_code == 200


def test_a_removed_person_is_out_at_once_and_their_judgements_stay(store, ann):
    ann.judge(ann.next()["presentations"][0]["id"])
    ann.next(2)
    store.remove_annotator("ann")
    assert ann.get("/api/next").status_code == 401
    assert client_of(store).post("/api/session", json={"token": ann.token}).status_code == 401
    assert count(store) == 1 and store.progress().judged == 1
    assert store.database.rows("SELECT 1 FROM presentations WHERE state = 'leased'") == []
    check_books(store)
    with pytest.raises(InputError, match="known annotator, got 'nobody'"):
        store.remove_annotator("nobody")


def test_who_logs_out_is_out_with_every_copy_of_the_cookie(store, ann):
    other_browser = Person(store, "bob")
    secret = ann.client.cookies[f"feedback_{store.id}"]
    answer = ann.post("/api/logout", {})
    assert answer.status_code == 200 and "max-age=0" in answer.headers["set-cookie"].lower()
    ann.client.cookies.set(f"feedback_{store.id}", secret)
    assert ann.get("/api/next").status_code == 401
    assert other_browser.get("/api/next").status_code == 200
    other_browser.csrf = "forged"
    assert other_browser.post("/api/logout", {}).status_code == 403


def test_a_valid_link_cannot_start_sessions_without_end(store):
    _, token = store.add_annotator("bob")
    client = client_of(store)
    codes = [client.post("/api/session", json={"token": token}).status_code for _ in range(15)]
    assert codes == [200] * 10 + [429] * 5
    assert store.database.rows("SELECT count(*) FROM sessions")[0][0] == 10


def test_tokens_and_names_that_are_no_text_are_refused(store):
    answer = client_of(store).post("/api/session", content=b'{"token": "\\udcff"}',
                                   headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 401 and "not valid" in answer.json()["error"]
    assert store.session("\udcff") is None
    for arguments in (("b\udcffb",), ("bob", "g\udcff")):
        with pytest.raises(InputError, match="valid text"):
            store.add_annotator(*arguments)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"X-CSRF-Token": ""}, 403),
        ({"X-CSRF-Token": "ä".encode()}, 403),
        ({"X-CSRF-Token": "0" * 64}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_cross_site_posts_are_refused(store, ann, headers, status):
    one = ann.next()["presentations"][0]["id"]
    body = json.dumps({"presentation": one, "choice": "left", "key": "k"})
    sent = {"X-CSRF-Token": ann.csrf, "Content-Type": "application/json", **headers}
    answer = ann.client.post("/api/judgements", content=body, headers=sent)
    assert answer.status_code == status and answer.json()["error"]
    assert count(store) == 0
    good = {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
    assert ann.post("/api/judgements", json.loads(body), **good).status_code == 200


def test_a_csrf_token_of_somebody_else_is_refused(store, ann):
    bob = Person(store, "bob")
    one = ann.next()["presentations"][0]["id"]
    ann.csrf = bob.csrf
    assert ann.judge(one).status_code == 403


def test_signing_in_across_sites_is_refused(store):
    _, token = store.add_annotator("bob")
    answer = client_of(store).post(
        "/api/session", json={"token": token}, headers={"Origin": "http://evil.example"}
    )
    assert answer.status_code == 403 and "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "evil@localhost"])
def test_other_host_names_are_refused(store, host):
    answer = client_of(store).get("/", headers={"Host": host})
    assert answer.status_code == 421 and "Content-Security-Policy" in answer.headers


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_the_loopback_names_are_served(store, host):
    assert client_of(store).get("/", headers={"Host": host}).status_code == 200


def test_every_answer_has_the_security_headers(store, ann):
    for answer in (ann.get("/"), ann.get("/admin"), ann.get("/api/next"), ann.get("/none")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "trusted-types 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_requests_beyond_the_rate_are_told_to_wait(store):
    fast = Person(store, "fast", rate=0.001, burst=5)
    answers = [fast.get("/api/next") for _ in range(8)]
    assert [a.status_code for a in answers] == [200] * 4 + [429] * 4
    assert answers[-1].headers["retry-after"] == "1"


def test_guessing_tokens_is_slowed(store):
    client = client_of(store)
    codes = [client.post("/api/session", json={"token": f"x{n}"}).status_code for n in range(25)]
    assert codes[0] == 401 and codes[-1] == 429


def test_a_bucket_is_filled_at_the_rate_up_to_the_burst():
    now = [0.0]
    limit = RateLimit(rate=1, burst=2, clock=lambda: now[0])
    assert [limit.allows("ann") for _ in range(3)] == [True, True, False]
    now[0] = 1.0
    assert [limit.allows(name) for name in ("ann", "ann", "bob")] == [True, False, True]
    now[0] = 100.0
    assert [limit.allows("ann") for _ in range(3)] == [True, True, False]


def test_a_proxy_that_gives_its_own_name_for_the_server_works(store):
    """As nginx does by default: Host is 127.0.0.1:8000, the page's origin another."""
    behind = client_of(store, address=HTTPS)
    _, token = store.add_annotator("bob")
    body = {"token": token}
    for headers, status in (
        ({"Origin": "https://a.example"}, 200),
        ({"Origin": "https://a.example", "Host": "a.example"}, 200),
        ({"Origin": "https://a.example", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://a.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://a.example:444"}, 403),
        ({"Origin": "https://evil.example"}, 403),
    ):
        assert behind.post("/api/session", json=body, headers=headers).status_code == status


def test_a_proxy_of_which_the_server_does_not_know_is_told_once_with_what_to_do(store, caplog):
    request_guard._told.clear()
    client = client_of(store)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            answer = client.post(
                "/api/session", json={"token": "x"}, headers={"Origin": "https://a.example"}
            )
            assert answer.status_code == 403 and "--url" in answer.json()["error"]
            answer = client.get("/", headers={"Host": "a.example"})
            assert answer.status_code == 421 and "--url" in answer.json()["error"]
    first, second = caplog.messages
    assert "'https://a.example'" in first and "--url" in first
    assert "'a.example'" in second and "--url" in second


def test_a_proxy_that_hides_its_clients_is_told_once(store, caplog):
    request_guard._told.clear()
    loopback = TestClient(make_app(store, address=HTTPS), base_url=BASE, client=("127.0.0.1", 1))
    with caplog.at_level(logging.WARNING):
        assert loopback.get("/api/me").status_code == loopback.get("/api/me").status_code == 401
    assert len(caplog.messages) == 1 and "X-Forwarded-For" in caplog.messages[0]


def test_a_page_below_a_path_works_whether_the_proxy_cuts_the_path_or_not(store):
    _, token = store.add_annotator("ann")
    for path in ("", "/round/two"):
        client = client_of(store, address=BELOW)
        assert client.get(f"{path}/").status_code == 200
        answer = client.post(f"{path}/api/session", json={"token": token})
        assert answer.status_code == 200
        client.cookies.set(*answer.headers["set-cookie"].partition(";")[0].split("=", 1))
        assert client.get(f"{path}/api/me").json()["csrf"]
    client = client_of(store, address=BELOW)
    moved = client.get("/round/two", follow_redirects=False)
    assert moved.status_code == 308 and moved.headers["location"] == "/round/two/"
    assert client.get("/other/api/me").status_code == 404
    assert b"fetch(`.${path}`" in client.get("/").content, "the page asks relative to its address"


def connected(address):
    return socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), 20)


def gone(connection):
    """Whether the server has ended a connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_505_silent_connections_shut_nobody_out(store):
    with served(store) as address:
        silent = [connected(address) for _ in range(505)]
        began = time.monotonic()
        client = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
        client.request("GET", "/")
        assert client.getresponse().status == 200 and time.monotonic() - began < 5
        open_ones = 505 - sum(map(gone, silent))
        assert open_ones < request_guard.MAX_CONNECTIONS_OF_ADDRESS
        assert gone(silent[0]) and not gone(silent[-1]), "the oldest make room"
        client.close()
        for one in silent:
            one.close()


def test_the_whole_server_holds_so_many_connections(store, monkeypatch):
    monkeypatch.setattr(request_guard, "MAX_CONNECTIONS", 5)
    with served(store) as address:
        silent = [connected(address) for _ in range(7)]
        until(lambda: sum(map(gone, silent)) == 2)
        for one in silent:
            one.close()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)
def test_who_keeps_the_server_waiting_is_dropped(store, monkeypatch, sent):
    """Before the first request, within its headers, and after an answer."""
    monkeypatch.setattr(request_guard, "HEADER_SECONDS", 0.1)
    monkeypatch.setattr(request_guard, "KEEP_ALIVE_SECONDS", 0.1)
    monkeypatch.setattr(request_guard, "CHECK_SECONDS", 0.02)
    with served(store) as address, connected(address) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(1 << 20):
            received += part
        assert received.startswith(b"HTTP/1.1 200" if sent.endswith(b"\r\n\r\n") else b"")


def test_a_slow_answer_is_not_cut_off(store, monkeypatch):
    monkeypatch.setattr(request_guard, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(request_guard, "CHECK_SECONDS", 0.01)
    boss = Person(store, "boss", admin=True)
    boss.judge(boss.next()["presentations"][0]["id"])

    def slow(_):
        time.sleep(0.3)
        return {"figures": []}

    with served(store, assess=slow) as address:
        client = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
        client.request("GET", "/api/admin", headers={"Cookie": boss.cookie.partition(";")[0]})
        assert json.loads(client.getresponse().read())["agreement"] == {"figures": []}
        client.close()


def test_connections_are_counted_by_whom_they_come_from():
    network = request_guard._network
    assert network("10.0.0.1") != network("10.0.0.2")
    assert network("2001:db8::1") == network("2001:db8::2:3") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") != network("::ffff:10.0.0.2"), "IPv4 on an IPv6 socket"
    assert network("fe80::1%eth0") == network("fe80::2%eth0")
