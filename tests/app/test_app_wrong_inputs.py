"""Fifty wrong inputs by hand: one message that says what to do, exit code 2, no traceback."""

import json
import shlex
import sqlite3

import pytest

from dpo_keras.preferences import build_preferences, read_preferences

PAIR = {"prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "No."}
CANDIDATES = {"prompt": "How are you?", "responses": ["Fine, thanks.", "No."]}

# Wrong files, by name. What stands in them is written once for all cases.
TEXTS = {
    "empty.jsonl": "",
    "empty.csv": "prompt,chosen,rejected\n",
    "not.json": "hello\n",
    "column.csv": "prompt,chosen,bad\nHow are you?,Fine.,No.\n",
    "column.jsonl": json.dumps({"question": "a", "chosen": "b", "rejected": "c"}) + "\n",
    "labels.jsonl": json.dumps({**PAIR, "preference": 2}) + "\n",
    "equal.jsonl": json.dumps({**PAIR, "rejected": PAIR["chosen"]}) + "\n",
    "pairs.txt": json.dumps(PAIR) + "\n",
    "pairs.jsonl": json.dumps(PAIR) + "\n",
    "no.parquet": "PAR1 it is not",
    "list.yaml": "- model\n- data\n",
    "tabs.yaml": "model:\n\tpath: x\n",
    "one.jsonl": json.dumps({**CANDIDATES, "responses": ["Fine."]}) + "\n",
    "gold.jsonl": json.dumps({**CANDIDATES, "gold": 2}) + "\n",
    "makers.jsonl": json.dumps({**CANDIDATES, "makers": ["a"]}) + "\n",
    "broken.jsonl": '{"prompt": "How are you?", "responses": [\n',
    "good.jsonl": json.dumps(CANDIDATES) + "\n",
    "prompts.jsonl": json.dumps({"question": "How are you?"}) + "\n",
    "page.sqlite": "<!doctype html>",
}

# Each row: the words after `dpo-keras`, and what the message has to say. `{}` is the folder of the
# files above; `good.yaml` in it is right.
CASES = [
    # the configuration's keys and values
    ("validate {}/missing.yaml", "missing.yaml: can not be read"),
    ("validate {}", "can not be read"),
    ("validate {}/latin.yaml", "must be UTF-8"),
    ("validate {}/list.yaml", "key"),
    ("validate {}/tabs.yaml", "line 2"),
    ("validate {}/twice.yaml", "seed is given twice"),
    ("validate {}/good.yaml trainning.epochs=1", "did you mean training"),
    ("validate {}/good.yaml training.epoch=1", "did you mean training.epochs?"),
    ("validate {}/good.yaml training.epochs=many", "must be a whole number, got many"),
    ("validate {}/good.yaml training.epochs=0", "must be >= 1, got 0"),
    ("validate {}/good.yaml training.learning_rate=-1e-4", "must be > 0, got -1e-4"),
    ("validate {}/good.yaml training.schedule=cosin", "id you mean 'cosine'?"),
    ("validate {}/good.yaml training.strategy=parameter_server", "dpo_keras.legacy"),
    ("validate {}/good.yaml training.backend=torch", "must be one of auto, tensorflow or jax"),
    ("validate {}/good.yaml training.backend=jax", "Set KERAS_BACKEND=jax before Keras is"),
    ("validate {}/good.yaml 'training.mesh={{data: 0}}'", "training.mesh.data must be >= 1, got 0"),
    ("validate {}/good.yaml 'training.mesh={{model: 2}}'", "training.mesh needs Keras on jax"),
    ("validate {}/good.yaml data.held_out=1.5", "data.held_out must be < 1, got 1.5"),
    ("validate {}/good.yaml seed", "override 'seed'"),
    ("validate {}/good.yaml export=yes", "must be a section: keys with values"),
    # the objective
    ("validate {}/good.yaml loss.type=sigmoyd", "id you mean 'sigmoid'?"),
    ("validate {}/good.yaml loss.beta=-1", "loss.beta must be"),
    ("validate {}/good.yaml loss.gamma=1", "loss.gamma"),
    ("validate {}/good.yaml loss.label_smoothing=0.7", "loss.label_smoothing"),
    ("validate {}/good.yaml 'loss.penalties={{nil: 1}}'", "nll"),
    ("validate {}/good.yaml loss.divergence=kl", "reverse_kl"),
    # models
    ("validate {}/good.yaml model.path={}/nowhere", "give a model directory"),
    ("validate {}/good.yaml model.path={}", "config.json was looked for"),
    ("validate {}/good.yaml model.path=gemma3_1bb", "did you mean gemma3_1b"),
    ("validate {}/good.yaml model.path={}/pairs.jsonl", "is not a .keras archive"),
    ("validate {}/good.yaml model.path=null", "model must have path"),
    # data files
    ("data inspect {}/nowhere.jsonl", "no such file"),
    ("data inspect {}", "name the files in it"),
    ("data inspect {}/pairs.txt", "unknown suffix '.txt'"),
    ("data inspect {}/empty.jsonl", "no records"),
    ("data inspect {}/empty.csv", "no records"),
    ("data inspect {}/not.json", "not JSON"),
    ("data inspect {}/column.csv", "column 'rejected' is missing"),
    ("data inspect {}/column.jsonl", "prompt"),
    ("data inspect {}/labels.jsonl", "preference"),
    ("data inspect {}/equal.jsonl", "same"),
    ("data inspect {}/no.parquet", "not a Parquet file"),
    ("data inspect {}/utf16.jsonl", "save it as UTF-8"),
    ("data inspect {}/pairs.jsonl {}/pairs.jsonl", "is given twice"),
    ("data inspect builtin:sales", "builtin:support"),
    ("data inspect {}/pairs.jsonl --format xml", "jsonl"),
    ("data inspect {}/cut_shard", "cut off"),
    ("data build {}/pairs.jsonl -o {}/cut_shard", "cut_shard"),
    # runs
    ("evaluate {} builtin:support", "run"),
    ("generate {}/good.yaml {}/prompts.jsonl", "prompt"),
    ("export {}/nowhere {}/saved/1", "nowhere"),
    # people's feedback
    ("annotate {}/one.jsonl --store {}/new.sqlite", "two or more texts"),
    ("annotate {}/gold.jsonl --store {}/new.sqlite", "gold must be the index"),
    ("annotate {}/makers.jsonl --store {}/new.sqlite", "makers must name"),
    ("annotate {}/broken.jsonl --store {}/new.sqlite", "line 1: is not JSON"),
    ("annotate {}/good.jsonl --store {}/new.sqlite -a admin", "give another to --annotator"),
    ("feedback report {}/nowhere.sqlite", "nowhere.sqlite"),
    ("feedback report {}/page.sqlite", "page.sqlite"),
    ("feedback export {}/other.sqlite {}/pairs_out.jsonl", "other.sqlite"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gpt2_preset):
    path = tmp_path_factory.mktemp("wrong")
    for name, text in TEXTS.items():
        (path / name).write_text(text)
    model = f"model: {{path: {gpt2_preset}}}\ndata: {{path: 'builtin:support', max_length: 64}}\n"
    model += "evaluation: {max_new_tokens: 8}\n"
    (path / "good.yaml").write_text(model)
    (path / "twice.yaml").write_text(model + "seed: 1\nseed: 2\n")
    (path / "latin.yaml").write_bytes("name: \xe9".encode("latin-1"))
    (path / "utf16.jsonl").write_text(json.dumps(PAIR), encoding="utf-16")
    build_preferences(read_preferences("builtin:support", limit=3), path / "cut_shard")
    shard = next((path / "cut_shard").glob("*tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with sqlite3.connect(path / "other.sqlite") as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    other.close()
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("words", "message"), CASES)
def test_a_wrong_input_gives_one_message_and_exit_code_2(run, folder, words, message):
    before = contents(folder)
    code, out, err = run(*shlex.split(words.format(*[folder] * words.count("{}"))))
    assert code == 2 and out == "" and "Traceback" not in err, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    # Wrong records stand under a line that says that none was right.
    problems = [line for line in errors if not line.endswith("no preference pair could be read:")]
    assert len(problems) == 1 and message in problems[0], err
    changed = {name for name, now in contents(folder).items() if now != before.get(name)}
    assert {name for name in changed if not name.startswith("new.sqlite")} == set()


def test_there_are_fifty_of_them():
    assert len({words for words, _ in CASES}) >= 50
