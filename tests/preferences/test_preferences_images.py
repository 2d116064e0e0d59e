"""Images beside prompts: forms, rules, and what keeps them."""

import base64
import json

import pytest
from vision_tiny import png

from dpo_keras.preferences import (
    InvalidPreferences,
    Preferences,
    audit,
    build_preferences,
    read_preferences,
    write_preferences,
)

ANSWERS = {"chosen": "A cat.", "rejected": "A dog."}
QUESTION = {"prompt": "What is it?", **ANSWERS}


def encoded(seed):
    return base64.b64encode(png(seed)).decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for seed in (1, 2):
        (tmp_path / f"img/{seed}.png").write_bytes(png(seed))
    (tmp_path / "img/cut.png").write_bytes(png(1)[:-9])
    return tmp_path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turn(*parts):
    return {**ANSWERS, "prompt": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    "record",
    [
        {**QUESTION, "images": ["img/1.png"]},
        {**QUESTION, "image": "img/1.png"},
        {**QUESTION, "images": [{"bytes": encoded(1), "path": "lost.png"}]},
        {**QUESTION, "images": [f"data:image/png;base64,{encoded(1)}"]},
        {**QUESTION, "image": encoded(1)},
        {**turn({"type": "image"}, {"type": "text", "text": "What?"}), "images": ["img/1.png"]},
        turn({"type": "image", "image": "img/1.png"}, {"type": "text", "text": "What?"}),
        turn(
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(1)}"}},
            {"type": "text", "text": "What?"},
        ),
    ],
)
def test_an_image_is_read_in_every_convention(folder, record):
    (pair,) = read_preferences(write_lines(folder / "pairs.jsonl", record))
    assert [image.read() for image in pair.images] == [png(1)]


def test_every_fault_of_a_record_is_named_together(folder):
    record = {**QUESTION, "chosen": "", "images": ["img/lost.png", "img/cut.png"]}
    file = write_lines(folder / "pairs.jsonl", QUESTION, record)
    report = read_preferences(file).report
    assert {problem.rule for problem in report.problems} == {
        "missing image",
        "broken image",
        "empty response",
    }
    assert all(problem.line == 2 for problem in report.problems)
    text = str(report.problems)
    assert str(folder / "img/lost.png") in text
    assert str(folder / "img/cut.png") in text


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({**QUESTION, "images": ["https://host/1.png"]}, "remote image"),
        ({**QUESTION, "prompt": "<image><image>", "images": ["img/1.png"]}, "the prompt's places"),
        (turn({"type": "image"}), "the prompt's places"),
        ({**QUESTION, "images": ["img/1.png"], "image": "img/2.png"}, "given once"),
        ({**QUESTION, "images": [7]}, "must be a path"),
    ],
)
def test_what_is_no_image_is_refused(folder, record, rule):
    with pytest.raises(InvalidPreferences, match=rule):
        read_preferences(write_lines(folder / "pairs.jsonl", record))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_written_pairs_keep_their_images(folder, suffix):
    records = [{**QUESTION, "images": ["img/1.png", png(3)]}, QUESTION]
    records[0]["images"][0] = str(folder / "img/1.png")
    pairs = read_preferences(records)
    write_preferences(pairs, folder / f"out.{suffix}")
    assert list(read_preferences(folder / f"out.{suffix}")) == list(pairs)
    # In the file's own folder paths are relative, so that both can be moved.
    assert str(folder) not in (folder / f"out.{suffix}").read_text()


def test_a_pair_with_another_image_is_another_pair(folder):
    records = [{**QUESTION, "image": str(folder / f"img/{seed}.png")} for seed in (1, 2, 1)]
    pairs = read_preferences(records)
    assert [found[0] for found in audit(pairs).duplicates] == [2]
    assert audit(pairs).with_images == 3
    assert "with images: 3" in audit(pairs).summary()
    hashes = pairs.prompt_hashes.tolist()
    assert hashes[0] == hashes[2] != hashes[1]
    built = build_preferences(pairs, folder / "built")
    assert list(built) == list(pairs)
    assert built.prompt_hashes.tolist() == hashes
    assert built.report.with_images == 3


def test_a_changed_file_is_noticed(folder):
    (pair,) = Preferences(read_preferences([{**QUESTION, "image": folder / "img/1.png"}]))
    (folder / "img/1.png").write_bytes(png(2))
    with pytest.raises(ValueError, match="is not the image that was there"):
        pair.images[0].read()
