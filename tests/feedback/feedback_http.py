"""A signed-in client of the server, as the page is one."""

from starlette.testclient import TestClient

from dpo_keras.feedback.annotation_server import make_app

BASE = "http://127.0.0.1"


def client_of(store, **options):
    return TestClient(make_app(store, **options), base_url=BASE, raise_server_exceptions=False)


class Person:
    """Somebody with the page open."""

    def __init__(self, store, name, *, admin=False, **options):
        self.annotator, self.token = store.add_annotator(name, admin=admin)
        self.client = client_of(store, **options)
        answer = self.client.post("/api/session", json={"token": self.token})
        assert answer.status_code == 200, answer.text
        self.cookie = answer.headers["set-cookie"]
        self.csrf = self.get("/api/me").json()["csrf"]

    def get(self, path, **options):
        return self.client.get(path, **options)

    def post(self, path, body, **headers):
        return self.client.post(path, json=body, headers={"X-CSRF-Token": self.csrf, **headers})

    def next(self, count=1):
        return self.get(f"/api/next?count={count}").json()

    def judge(self, presentation, choice="left", key="k", **more):
        body = {"presentation": presentation, "choice": choice, "key": key, **more}
        return self.post("/api/judgements", body)
