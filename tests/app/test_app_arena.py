"""`dpo-keras arena`: runs, presets and SavedModels that answer; what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from arena_writers import phase
from test_app_feedback_commands import Browser

from dpo_keras.app.arena_policies import Decoding, open_responders
from dpo_keras.app.config import Config
from dpo_keras.errors import InputError
from dpo_keras.feedback import open_store
from dpo_keras.feedback.arena import Arena
from dpo_keras.feedback.live_pairs import held
from dpo_keras.preferences import Message, read_preferences
from dpo_keras.serving import export
from dpo_keras.training import generate_responses

ROOT = Path(__file__).parents[2]
QUERY = "The lamp is red"
OPTIONS = Decoding(temperature=1.0, top_p=0.9, max_new_tokens=8)


def answers(responder, prompts, seeds):
    texts = {}
    for number, text, ended in responder.respond(list(map(responder.prepare, prompts)), seeds):
        texts[number] = text, ended
    assert all(ended for _, ended in texts.values())
    return [texts[number][0] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def preset(gpt2_preset):
    return open_responders([str(gpt2_preset)], OPTIONS)[0]


@pytest.fixture(scope="module")
def saved_model(gpt2, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "lamp" / "1"
    export(gpt2, path, signatures=("generate",), max_new_tokens=6, temperature=1.0, max_length=48)
    return path


def test_a_preset_writes_what_generate_responses_writes(preset):
    expected = [
        generate_responses(preset.policy, [QUERY], seed=seed, **preset.options)[0]
        for seed in (5, 9)
    ]
    assert answers(preset, [QUERY, QUERY], [5, 9]) == expected
    assert preset.setting["policy"].endswith("gpt2_preset") and preset.setting["top_p"] == 0.9
    with pytest.raises(InputError, match=r"tokens, and a policy reads 56 at most"):
        preset.prepare(QUERY * 20)
    with pytest.raises(InputError, match="messages need a chat template"):
        preset.prepare((Message("user", "Hi"),))


def test_with_a_template_a_policy_reads_conversations(preset):
    (chat,) = open_responders([preset.setting["policy"]], OPTIONS, template="plain")
    turns = (Message("user", "red?"), Message("assistant", "It"), Message("user", "40?"))
    rows = [chat.prepare(turns), chat.prepare("red?\nIt\n40?\n")]
    assert chat.reads_messages and rows[0] == rows[1]
    assert len(answers(chat, [turns], [1])) == 1


def test_a_run_samples_as_its_configuration_says(gpt2_preset, tmp_path):
    config = Config(
        model={"path": str(gpt2_preset)},
        data={"path": "builtin:support", "template": "plain", "max_length": 40},
        evaluation={"temperature": 0.5, "max_new_tokens": 5},
    )
    (tmp_path / "config.yaml").write_text(config.resolved())
    with pytest.raises(InputError, match="no trained policy yet"):
        open_responders([str(tmp_path)])
    shutil.copytree(gpt2_preset, tmp_path / "policy")
    (of_run,) = open_responders([str(tmp_path)], Decoding(top_p=0.9))
    assert of_run.reads_messages and of_run.room == 35
    assert of_run.setting == {
        "policy": str(tmp_path), "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 5
    }  # fmt: skip
    with pytest.raises(InputError, match="a policy reads 35 at most"):
        of_run.prepare(QUERY * 12)


def test_a_saved_model_and_a_policy_meet_in_the_arena(preset, saved_model, tmp_path):
    (served,) = open_responders([str(saved_model.parent)])  # the newest version of a name
    assert not served.streams and served.varies and served.setting["temperature"] == 1.0
    with pytest.raises(InputError, match="reads no conversation"):
        served.prepare((Message("user", "Hi"),))
    store = open_store(tmp_path / "round.sqlite", create=True)
    store.add_annotator("ann")
    arena = Arena(store, [preset, served])
    arena.ask(1, QUERY)
    phase(arena, 1, "done")
    assert held(store, 1)[0].prompt == QUERY
    makers = {row[0] for row in store.database.rows("SELECT maker FROM responses")}
    assert {maker.split(" ")[0].rpartition("/")[2] for maker in makers} == {"gpt2_preset", "lamp"}
    arena.close()
    store.close()


def test_what_is_wrong_is_said_in_one_sentence(run, gpt2_preset, tmp_path):
    def failed(*words):
        code, out, err = run("arena", *words, "--port", 0, "--store", tmp_path / "s.sqlite")
        assert code == 2 and out == ""
        return " ".join(err.split())

    assert "form must hold {query} once" in failed(gpt2_preset, "--form", "Q:")
    assert "is neither a directory here nor a KerasHub preset" in failed("gtp2")
    assert "RUN must name each policy once" in failed(gpt2_preset, gpt2_preset)
    greedy = (gpt2_preset, "--max-new-tokens", 8, "--temperature", 0)
    assert "temperature must be > 0 with one policy" in failed(*greedy)
    words = (gpt2_preset, "--max-new-tokens", 8, "--template", "plain", "--form", "{query}")
    assert "is for policies without a chat template" in failed(*words)
    (tmp_path / "text").write_text("no store")
    code, _, err = run("arena", gpt2_preset, "--port", 0, "--store", tmp_path / "text")
    assert code == 2 and "is not a feedback store" in " ".join(err.split())


class Seat(Browser):
    """Somebody with the arena's page open in another process."""

    def pair(self):
        for _ in range(1000):
            if shown := self.send("GET", "/api/next")["presentations"]:
                return shown[0]
            time.sleep(0.05)
        raise AssertionError("no pair came")


@pytest.mark.slow
def test_the_command_serves_and_goes_on_after_kill_9(gpt2_preset, tmp_path, run):
    store = tmp_path / "round.sqlite"
    command = [sys.executable, "-m", "dpo_keras.app", "arena", str(gpt2_preset), "--store",
               str(store), "-a", "ann", "-a", "bob", "--port", "0", "--json",
               "--max-new-tokens", "8", "--form", r"{query}\n"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def started():
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        lines = ""
        while True:
            lines += process.stdout.readline()
            try:
                return process, json.loads(lines)
            except ValueError:
                assert process.poll() is None

    def ended(process):
        process.wait()
        process.stdout.close()

    process, found = started()
    try:
        ann = Seat(found["links"][0]["link"])
        ann.send("POST", "/api/query", {"query": QUERY})
        pair = ann.pair()
        process.kill()  # SIGKILL
        ended(process)
        process, found = started()
        ann.connect(found["url"].split("/")[2])
        again = ann.pair()
        assert (again["left"], again["right"]) == (pair["left"], pair["right"])
        body = {"presentation": pair["id"], "choice": "left", "key": "one"}
        ann.send("POST", "/api/judgements", body)
        talk = ann.send("GET", "/api/conversation")
        ann.send("POST", "/api/query", {"query": "more", "after": talk["after"]})
        body = {"presentation": ann.pair()["id"], "choice": "right", "key": "two"}
        ann.send("POST", "/api/judgements", body)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        ended(process)
    assert run("feedback", "report", store, "--resamples", 20)[0] == 0
    assert run("feedback", "export", store, tmp_path / "pairs.jsonl")[0] == 0
    first, second = read_preferences(tmp_path / "pairs.jsonl")
    assert first.prompt == f"{QUERY}\n" and second.prompt == f"{QUERY}\n{first.chosen}more\n"
