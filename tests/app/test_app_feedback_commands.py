"""Human feedback from the command line, and the way from candidates to a trained policy."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app_tiny import SIZES

from dpo_keras.app.cli import main
from dpo_keras.app.feedback_commands import make_links
from dpo_keras.feedback import Settings, open_store, read_candidates
from dpo_keras.preferences import read_preferences, support_pairs

ROOT = Path(__file__).parents[2]


def write_candidates(path, count=30):
    lines = []
    for number, pair in enumerate(support_pairs()[:count]):
        record = {
            "id": f"c{number}",
            "prompt": pair.prompt,
            "responses": [pair.chosen, pair.rejected],
            "makers": [{"policy": "runs/a", "temperature": 0.5}, "b"],
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def closed():
    """Closes the connections of a test."""
    yield
    while Browser.connections:
        Browser.connections.pop().close()


class Browser:
    """What the page does, without a window: signs in with a link, fetches, judges."""

    connections = []

    def __init__(self, link):
        address, _, token = link.partition("#")
        self.connect(address.split("/")[2])
        self.headers = {"Content-Type": "application/json"}
        self.send("POST", "/api/session", {"token": token})
        self.headers["X-CSRF-Token"] = self.send("GET", "/api/me")["csrf"]

    def connect(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=20)
        self.connections.append(self.connection)

    def send(self, method, path, body=None):
        content = None if body is None else json.dumps(body)
        status = 429
        while status == 429:  # faster than people are; the page waits too
            self.connection.request(method, path, content, self.headers)
            response = self.connection.getresponse()
            answer = json.loads(response.read())
            status = response.status
            time.sleep(0.1 if status == 429 else 0)
        assert response.status == 200, answer
        if cookie := response.headers["set-cookie"]:
            self.headers["Cookie"] = cookie.partition(";")[0]
        return answer

    def judge_all(self, choose):
        done = 0
        while shown := self.send("GET", "/api/next")["presentations"]:
            body = {"presentation": shown[0]["id"], "choice": choose(shown[0]), "key": f"k{done}"}
            body["key"] += self.headers["X-CSRF-Token"][:20]
            self.send("POST", "/api/judgements", body)
            done += 1
        return done


def start(folder, *options):
    command = [
        sys.executable, "-m", "dpo_keras.app", "annotate", str(folder / "candidates.jsonl"),
        "--store", str(folder / "feedback.sqlite"), "--port", "0", "--json", *options,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    text = ""
    for line in server.stdout:
        text += line
        if line == "}\n":
            return server, json.loads(text)
    errors = server.stderr.read()
    stop(server)
    raise AssertionError(errors)


def stop(server, how=signal.SIGINT):
    server.send_signal(how)
    try:
        return server.wait(30)
    finally:
        server.kill()
        server.stdout.close()
        server.stderr.close()


def letters(text):
    """A text without what Markdown may have taken for markup."""
    return re.sub(r"\W|_", "", text)


def text_of(node):
    return node if isinstance(node, str) else "".join(text_of(child) for child in node[2])


@pytest.mark.slow
def test_candidates_to_page_to_pairs_to_a_trained_policy(tmp_path, capsys):
    """The whole way: candidates, two people on the page, report, export, training."""
    write_candidates(tmp_path / "candidates.jsonl")
    better = {
        (letters(one.prompt), letters(one.responses[0].text))
        for one in read_candidates(tmp_path / "candidates.jsonl")
    }
    server, started = start(
        tmp_path, "-a", "ann:experts", "-a", "bob", "--overlap", "2", "--repeat-share", "0"
    )
    try:
        links = {one["name"]: one["link"] for one in started["links"]}
        assert set(links) == {"ann", "bob", "admin"}

        def choose(shown):
            prompt = "".join(text_of(node) for node in shown["prompt"][0]["body"])
            left = "".join(text_of(node) for node in shown["left"])
            return "left" if (letters(prompt), letters(left)) in better else "right"

        assert [Browser(links[name]).judge_all(choose) for name in ("ann", "bob")] == [30, 30]
        overview = Browser(links["admin"]).send("GET", "/api/admin")
        assert overview["judged"] == overview["wanted"] == 60
        assert overview["agreement"]["figures"][0]["value"] == 1.0
    finally:
        assert stop(server) == 0, "Ctrl-C is how people end it"

    store = str(tmp_path / "feedback.sqlite")
    assert main(["feedback", "report", store, "--json", "-o", str(tmp_path / "r.html")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agreement"]["raw_agreement"]["value"] == 1.0
    assert {person["name"] for person in report["people"]} == {"ann", "bob"}
    assert set(report["policies"]) == {"runs/a temperature=0.5", "b"}
    assert "data:image/svg+xml" in (tmp_path / "r.html").read_text()

    pairs = tmp_path / "pairs.jsonl"
    assert main(["feedback", "export", store, str(pairs), "--label", "each"]) == 0
    read = read_preferences(pairs)
    assert len(read) == 60 and {pair.preference for pair in read} == {1.0}
    assert {(pair.annotator, pair.group) for pair in read} == {("ann", "experts"), ("bob", None)}
    known = {(pair.prompt, pair.chosen) for pair in support_pairs()[:30]}
    assert {(pair.prompt, pair.chosen) for pair in read} == known, "by response, not by side"

    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({
        "output": str(tmp_path / "run"),
        "model": {"scratch": {**SIZES, "num_layers": 1, "max_sequence_length": 96}},
        "data": {"path": str(pairs), "held_out": 0.2, "max_length": 96},
        "training": {"batch_size": 8, "learning_rate": 1e-3, "buckets": 1},
        "evaluation": {"prompts": 0, "max_new_tokens": 8, "batch_size": 8},
    }))  # fmt: skip
    capsys.readouterr()
    assert main(["train", str(config), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] >= 5 and result["pairs"]["train"] + result["pairs"]["held_out"] == 60


@pytest.mark.slow
def test_a_server_that_was_killed_goes_on_with_the_same_people(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl", 4)
    server, started = start(tmp_path, "-a", "ann")
    link = started["links"][0]["link"]
    first = Browser(link)
    shown = first.send("GET", "/api/next")["presentations"][0]
    first.send("POST", "/api/judgements",
               {"presentation": shown["id"], "choice": "left", "key": "k"})  # fmt: skip
    stop(server, signal.SIGKILL)
    server, again = start(tmp_path, "-a", "ann")
    try:
        assert again["links"][0]["link"] is None, "only hashes of tokens are kept"
        address = again["url"].split("/")[2]
        first.connect(address)
        assert first.send("GET", "/api/next")["own"] == 1, "the session holds"
        Browser(link.replace(link.split("/")[2], address))
    finally:
        stop(server)
    server, renewed = start(tmp_path, "-a", "ann", "--renew")
    stop(server)
    assert renewed["links"][0]["link"].partition("#")[2] != link.partition("#")[2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["no candidates"]),
        ("{\n[]\n", ["line 1: is not JSON", "line 2: must be a JSON object"]),
        ('{"prompt": "", "responses": ["a"]}\n', ["prompt must be", "two or more texts"]),
        ('{"prompt": "p", "responses": ["a", "b"], "makers": ["x"], "gold": 2, "group": []}\n',
         ["makers must", "gold must", "group must"]),
        ('{"prompt": "p", "responses": ["a", "\\ud800"]}\n', ["half of a character"]),
        ('{"prompt": [{"role": "robot", "content": "x"}], "responses": ["a", "b"]}\n', ["prompt"]),
    ],
)  # fmt: skip
def test_every_fault_of_candidates_is_named(tmp_path, capsys, content, words):
    path = tmp_path / "candidates.jsonl"
    path.write_text(content)
    assert main(["annotate", str(path), "--store", str(tmp_path / "f.sqlite")]) == 2
    errors = capsys.readouterr().err
    assert [word for word in words if word not in errors] == []
    assert not (tmp_path / "f.sqlite").exists()


def test_what_annotate_cannot_do_is_said(tmp_path, capsys):
    path = str(write_candidates(tmp_path / "candidates.jsonl", 2))
    store = ["--store", str(tmp_path / "f.sqlite"), "--port", "0"]
    for options, words in (
        (["--host", "0.0.0.0"], "--url"),
        (["--guidelines", str(tmp_path / "none.md")], "guidelines"),
        (["-a", "admin"], "administrator"),
        (["-a", " "], "1 to 100 characters"),
        (["-a", "ann", "-a", "bob", "-a", "ann:experts"], "'ann' is there twice"),
        (["-a", "\udcff"], "valid text"),
        (["--url", "https://a.example/x?y"], "url must be"),
    ):
        assert main(["annotate", path, *store, *options]) == 2
        assert words in capsys.readouterr().err


def test_report_and_export_of_what_is_no_store(tmp_path, capsys):
    assert main(["feedback", "report", str(tmp_path / "none.sqlite")]) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "x.sqlite").write_text("text")
    assert main(["feedback", "export", str(tmp_path / "x.sqlite"), "p.jsonl"]) == 2
    assert "not a feedback store" in capsys.readouterr().err


def test_a_backup_is_made_and_replaces_nothing_unasked(tmp_path, capsys):
    store = open_store(tmp_path / "f.sqlite", Settings(), create=True)
    copy = tmp_path / "copy.sqlite"
    command = ["feedback", "backup", str(tmp_path / "f.sqlite"), str(copy)]
    assert main(command) == 0 and "holds all of" in capsys.readouterr().out
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    store.add_annotator("ann")
    assert main([*command, "--force"]) == 0
    store.close()
    copied = open_store(copy)
    assert [person.name for person in copied.annotators()] == ["ann"]
    copied.close()


def test_a_removed_person_needs_a_new_link(tmp_path, capsys):
    store = open_store(tmp_path / "f.sqlite", Settings(), create=True)
    make_links(store, ["ann", "bob"], False, "")
    assert [one["link"] for one in make_links(store, ["bob"], False, "")][:1] == [None]
    assert main(["feedback", "remove", str(tmp_path / "f.sqlite"), "bob"]) == 0
    assert "Removed: bob" in capsys.readouterr().out
    assert store.names_with_links() == ["ann"]
    assert make_links(store, ["bob"], False, "")[0]["link"] is not None
    assert main(["feedback", "remove", str(tmp_path / "f.sqlite"), "nobody"]) == 2
    assert "known annotator" in capsys.readouterr().err
    store.close()


def test_the_administrator_stays_signed_in_over_a_restart_but_not_a_renewal(tmp_path):
    store = open_store(tmp_path / "f.sqlite", Settings(), create=True)
    token = make_links(store, [], False, "")[-1]["link"].partition("#")[2]
    _, secret = store.start_session(token)
    make_links(store, [], False, "")
    assert store.session(secret) and store.start_session(token) is None
    make_links(store, [], True, "")
    assert store.session(secret) is None
    store.close()


def test_bad_options_of_export_are_named_together(tmp_path, capsys):
    store = open_store(tmp_path / "f.sqlite", Settings(), create=True)
    store.close()
    arguments = ["feedback", "export", str(tmp_path / "f.sqlite"), "p.jsonl"]
    assert main([*arguments, "--label", "x", "--ties", "y"]) == 2
    errors = capsys.readouterr().err
    assert "label must be one of" in errors and "ties must be one of" in errors


def test_the_commands_do_not_wait_for_tensorflow(tmp_path):
    code = (
        "import sys; from dpo_keras.app.cli import main; "
        f"main(['feedback', 'report', {str(tmp_path / 'none')!r}]); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
