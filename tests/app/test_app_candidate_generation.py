"""Candidates: who made what, several policies and settings, and what is drawn again."""

import json
from types import SimpleNamespace

import pytest
from tiny import Letters

from dpo_keras.app import candidate_generation as module
from dpo_keras.app.candidate_generation import generate
from dpo_keras.app.config import Config
from dpo_keras.errors import InputError
from dpo_keras.feedback import read_candidates


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One?", "id": "a"}\n{"prompt": "Two?"}\n')
    return path


def config(name):
    return Config(model={"path": name}, data={"path": "builtin:support"}, seed=7)


@pytest.fixture
def scripted(monkeypatch):
    """Policies are their paths; `answers[seed](prompt)` is what is sampled, by default unique."""
    calls = []
    answers = {}

    def respond(policy, inputs, *, seed, temperature, **options):
        calls.append((policy, seed, temperature, list(inputs)))

        def answer(one, prompt):
            return answers[one](prompt) if one in answers else f"{policy} {one} {prompt}"

        return [[answer(one, prompt) for one in seed] for prompt in inputs]

    monkeypatch.setattr(module, "load_model", lambda path, dtype: str(path))
    monkeypatch.setattr("dpo_keras.training.generate_responses", respond)
    return calls, answers


class Notes:
    def __init__(self):
        self.notes = []

    def stage(self, title):
        pass

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, total, **values):
        pass


def test_each_response_says_what_made_it(scripted, prompts, tmp_path):
    found = generate(config("m"), prompts, top_p=0.9, output=tmp_path / "c.jsonl")
    assert [one.get("id") for one in found] == ["a", None]
    for one in found:
        assert [(m["policy"], m["top_p"], m["seed"]) for m in one["makers"]] == [
            ("m", 0.9, 7), ("m", 0.9, 8),
        ]  # fmt: skip
    read = read_candidates(tmp_path / "c.jsonl")
    assert [response.text for response in read[0].responses] == found[0]["responses"]
    assert read[0].responses[0].maker == read[0].responses[1].maker, "seeds are no policies"


def test_a_prompt_without_tokens_is_named_rather_than_given_the_next_ones_responses():
    class Quiet(Letters):
        start_token_id = None

        def tokenize(self, texts):
            return super().tokenize([text.replace("?", "") for text in texts])

    settings = Config(model={"path": "m"}, data={"path": "builtin:support", "template": "plain"})
    records = [{"prompt": "a"}, {"prompt": "?"}, {"prompt": "b"}]
    with pytest.raises(InputError, match="prompts: pair 1: no prompt token"):
        module.model_inputs(records, settings.data.template, SimpleNamespace(preprocessor=Quiet()))


def test_policies_and_temperatures_take_turns(scripted, prompts):
    found = generate(
        config("m"), prompts, responses=4, compare=[config("n")], temperature=[0.5, 1.0]
    )
    assert [(m["policy"], m["temperature"]) for m in found[0]["makers"]] == [
        ("m", 0.5), ("m", 1.0), ("n", 0.5), ("n", 1.0),
    ]  # fmt: skip
    with pytest.raises(InputError, match="at least 4"):
        generate(config("m"), prompts, compare=[config("n")], temperature=[0.5, 1.0])


def test_two_greedy_policies_can_be_compared_but_one_cannot_write_twice(scripted, prompts):
    found = generate(config("m"), prompts, compare=[config("n")], temperature=0.0)
    assert [m["policy"] for m in found[0]["makers"]] == ["m", "n"]
    with pytest.raises(InputError, match="at 0 all are the same"):
        generate(config("m"), prompts, temperature=0.0)


def test_identical_and_empty_responses_are_drawn_again(scripted, prompts):
    calls, answers = scripted
    answers[7] = lambda prompt: "same"
    answers[8] = lambda prompt: " same " if prompt == "One?" else "  "
    progress = Notes()
    found = generate(config("m"), prompts, progress=progress)
    assert [one["responses"] for one in found] == [["same", "m 10 One?"], ["same", "m 10 Two?"]]
    assert found[0]["makers"][1]["seed"] == 10 and progress.notes == []
    # Both candidates of both prompts at once, then the second ones alone.
    assert [(call[1], len(call[3])) for call in calls] == [([7, 8], 2), ([10], 2)]


def test_what_stays_identical_or_empty_is_left_out_and_counted(scripted, prompts, tmp_path):
    calls, answers = scripted
    for seed in range(7, 30):
        answers[seed] = lambda prompt, seed=seed: "same" if prompt == "One?" else str(seed)
    progress = Notes()
    found = generate(config("m"), prompts, progress=progress, output=tmp_path / "c.jsonl")
    assert [one["prompt"] for one in found] == ["Two?"]
    assert "1 identical" in progress.notes[0]
    assert "1 prompts without two different responses" in progress.notes[0]
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 1
    assert [len(call[3]) for call in calls] == [2, 1, 1, 1]


def test_nothing_usable_is_an_error(scripted, prompts):
    _, answers = scripted
    for seed in range(7, 30):
        answers[seed] = lambda prompt: ""
    with pytest.raises(InputError, match="no prompt has two different responses"):
        generate(config("m"), prompts)


def test_the_same_seed_gives_the_same_candidates(scripted, prompts):
    first = json.dumps(generate(config("m"), prompts, seed=3))
    assert json.dumps(generate(config("m"), prompts, seed=3)) == first
    assert json.dumps(generate(config("m"), prompts, seed=4)) != first


def test_an_output_that_exists_is_refused_before_anything_is_sampled(scripted, prompts, tmp_path):
    calls, _ = scripted
    output = tmp_path / "c.jsonl"
    output.write_text("precious")
    with pytest.raises(InputError, match="output: .*c.jsonl exists"):
        generate(config("m"), prompts, output=output)
    assert calls == [] and output.read_text() == "precious"
    found = generate(config("m"), prompts, output=output, overwrite=True)
    assert [json.loads(line) for line in output.read_text().splitlines()] == found
