"""Image pairs through the command line: training, samples of the run, candidates."""

import json
from pathlib import Path

import pytest
import vision_tiny

import dpo_keras
from dpo_keras.app.models import load_model, save_policy
from dpo_keras.feedback import read_candidates

PROMPT = "What is picture {}?<image>"
SETTINGS = """
model: {path: preset}
data: {path: pairs.jsonl, held_out_path: held_out.jsonl, max_length: 60}
training: {batch_size: 4, max_steps: 1, learning_rate: 0.001}
evaluation: {max_new_tokens: 20, prompts: 3, batch_size: 4}
output: run
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds a preset that sees images, and pairs with pictures beside their file."""
    monkeypatch.chdir(tmp_path)
    save_policy(vision_tiny.gemma3(), tmp_path / "preset")
    (tmp_path / "photos").mkdir()
    records = []
    for number in range(6):
        (tmp_path / f"photos/{number}.png").write_bytes(vision_tiny.png(number))
        record = {"prompt": PROMPT.format(number), "images": [f"photos/{number}.png"]}
        records.append({**record, "chosen": " I am fine", "rejected": " don't worry"})
    # Its prompt fits, but not with twenty new tokens behind it.
    records[5]["prompt"] = "How are you? Hello, I am fine. " + records[5]["prompt"]
    for name, some in (("pairs", records[:4]), ("held_out", records[3:])):
        lines = [json.dumps(record) + "\n" for record in some]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "config.yaml").write_text(SETTINGS)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """Keeps what policies were asked, and answers without sampling."""
    calls = []

    def respond(policy, prompts, *, images=None, seed=0, return_ended=False, **options):
        shown = [[Path(one.path).name for one in row] for row in images.rows.tolist()]
        calls.append((prompts, shown))
        texts = [f"I am {seed}" if return_ended else [f"I am {s}" for s in seed] for _ in prompts]
        return (texts, [True for _ in prompts]) if return_ended else texts

    for place in ("dpo_keras.evaluation.samples", "dpo_keras.training"):
        monkeypatch.setattr(f"{place}.generate_responses", respond)
    return calls


def test_a_run_answers_prompts_with_their_images(folder, run, asked):
    code, _, said = run("train", "config.yaml")
    assert code == 0, said
    assert "prompts with images not answered in samples: 1 (longer than 40 tokens)" in said
    before, after = asked
    assert before == after
    prompts, shown = before
    assert shown == [["3.png"], ["4.png"]]
    tokenizer = load_model("run/policy").preprocessor
    held_out = dpo_keras.read_preferences("held_out.jsonl")
    expected = dpo_keras.tokenize_pairs(held_out, tokenizer, max_length=60)
    assert [list(ids) for ids in prompts] == expected.prompt.tolist()[:2]


def test_candidates_are_drawn_with_the_images_and_keep_them(folder, run, asked):
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lines = [{"prompt": r["prompt"], "image": r["images"][0]} for r in records]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "Hi"}]))
    code, _, said = run("generate", "config.yaml", prompts, "--output", folder / "candidates.jsonl")
    assert code == 0, said
    assert asked[0][1] == [["0.png"], ["1.png"], ["2.png"], ["3.png"], []]
    written = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    assert [line.get("images") for line in written] == [*(r["images"] for r in records), None]
    read = read_candidates(folder / "candidates.jsonl")
    assert [len(one.images) for one in read] == [1, 1, 1, 1, 0]
    prompts.write_text('{"prompt": "Hi"}\n{"prompt": "Who?", "images": ["absent.png"]}\n')
    code, _, said = run("generate", "config.yaml", prompts)
    assert code == 2 and "line 2: images: missing image: image 1 must name an image file" in said
