"""Who the server lets in: tokens, sessions, other sites, other host names, and at what rate."""

import json

import pytest
from feedback_http import Person, client_of
from feedback_rounds import count

from dpo_keras.feedback.request_guard import RateLimit, address_of

HTTPS = address_of("127.0.0.1", "https://a.example")


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
    _, token = store.add_annotator("eve")
    safe = client_of(store, address=HTTPS).post("/api/session", json={"token": token})
    assert "; secure" in safe.headers["set-cookie"].lower()


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
