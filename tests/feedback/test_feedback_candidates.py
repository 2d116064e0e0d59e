"""Candidates are read and become pairs."""

import gzip
import json

import pytest

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Imported, Response, read_candidates
from dpo_keras.feedback.annotation_api import _shown
from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.candidates import maker_label


def test_candidates_become_pairs_once(make_store):
    given = [
        Candidates(
            "p", (Response("x"), Response("y"), Response("z"), Response(" x "), Response(""))
        ),
        Candidates("alone", (Response("x"), Response("x"))),
    ]
    store = make_store(given=[])
    added = store.add(given)
    assert (added.pairs, added.known, added.identical, added.empty, added.alone) == (3, 0, 2, 1, 1)
    again = store.add(given)
    assert (again.pairs, again.known) == (0, 3)
    assert store.add([Candidates("p", (Response("y"), Response("x"), Response("w")))]).pairs == 2


def test_what_was_added_is_summed_up():
    assert Imported(pairs=3, gold=1, empty=2).summary() == (
        "3 new pairs (1 with a known answer), 0 known; left out: 0 identical and 2 empty "
        "responses, 0 prompts without two different responses"
    )


@pytest.mark.parametrize(
    ("maker", "expected"),
    [
        ("a", Response("x", "a")),
        (None, Response("x")),
        ({}, Response("x", "unnamed", {})),
        ({"policy": "b", "seed": 3}, Response("x", "b", {"policy": "b", "seed": 3})),
    ],
)
def test_makers_are_labels_or_settings(tmp_path, make_store, maker, expected):
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["x", "y"], "makers": [maker, None]}))
    read = read_candidates(path)
    assert read[0].responses == (expected, Response("y"))
    assert make_store(given=read).progress().wanted > 0


def test_a_fault_carries_its_line_and_its_name(tmp_path):
    path = tmp_path / "candidates.jsonl"
    path.write_text('{"prompt": "p", "responses": ["x", "y"], "makers": null, "gold": 2}\n[]\n')
    with pytest.raises(InputError) as error:
        read_candidates(path)
    first, second = error.value.problems
    assert first == f"{path} line 1: gold must be the index of a response, 0 to 1, got 2."
    assert first.argument == f"{path} line 1: gold"
    assert second == f"{path} line 2: must be a JSON object, got list."


def test_maker_label_leaves_the_seed_out():
    setting = {"policy": "runs/a", "temperature": 0.7, "top_p": 1.0, "seed": 3}
    assert maker_label(setting) == "runs/a temperature=0.7 top_p=1"


LINE = json.dumps({"prompt": "p", "responses": ["x", "y"]})


def test_candidates_with_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "candidates.jsonl"
    path.write_text(LINE, encoding="utf-8-sig")
    assert read_candidates(path)[0].prompt == "p"


@pytest.mark.parametrize("damage", ["cut off", "changed", "no gzip"])
def test_a_damaged_gzip_of_candidates_is_said(tmp_path, damage):
    content = bytearray(gzip.compress("\n".join([LINE] * 50).encode()))
    if damage == "cut off":
        del content[-10:]
    elif damage == "changed":
        content[12:30] = bytes(18)
    else:
        content = LINE.encode()
    path = tmp_path / "candidates.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="candidates.jsonl.gz is a damaged gzip file"):
        read_candidates(path)


@pytest.mark.parametrize("levels", [60, 5_000])
def test_candidates_that_are_nested_deep_are_a_fault_of_their_line(tmp_path, levels):
    path = tmp_path / "candidates.jsonl"
    nested = f"{'[' * levels}1{']' * levels}"
    path.write_text(f'{LINE}\n{{"prompt": "p", "responses": ["x", "y"], "other": {nested}}}\n')
    with pytest.raises(InputError, match=r"line 2: must not be nested deeper than 50 levels"):
        read_candidates(path)


def test_a_key_twice_is_a_fault_of_its_line(tmp_path):
    path = tmp_path / "candidates.jsonl"
    path.write_text(f'{LINE}\n{{"prompt": "p", "responses": ["x", "y"], "prompt": "q"}}\n')
    with pytest.raises(InputError, match=r"line 2: must hold each key once; 'prompt' is there tw"):
        read_candidates(path)


def test_a_prompt_that_calls_a_tool_is_kept_whole_and_shown_as_text(tmp_path):
    call = {"function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    prompt = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "wet"},
    ]
    path = tmp_path / "candidates.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "responses": ["Yes.", "No."]}))
    (found,) = read_candidates(path)
    assert [turn.as_dict() for turn in found.prompt] == [
        prompt[0],
        prompt[1] | {"content": ""},
        prompt[2],
    ]
    turns = _shown(Presentation(1, [turn.as_dict() for turn in found.prompt], "Yes.", "No."))
    assert "Bonn" in json.dumps(turns["prompt"][1])
