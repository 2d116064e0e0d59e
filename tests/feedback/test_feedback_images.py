"""Images beside candidates: read, shown to whoever judges and to nobody else, and exported."""

import json

import pytest
from feedback_http import Person
from vision_tiny import png

from dpo_keras.errors import InputError
from dpo_keras.feedback import open_store, read_candidates, to_pairs
from dpo_keras.preferences import read_preferences, write_preferences

LINE = {"prompt": "What is it?", "responses": ["A cat.", "A dog."]}


@pytest.fixture
def shown(tmp_path):
    """A round of one pair with two images: one of a file, one in the line itself."""
    (tmp_path / "cat.png").write_bytes(png(1))
    inside = read_preferences([{**LINE, "chosen": "a", "rejected": "b", "image": png(2)}])
    line = {**LINE, "images": ["cat.png", inside[0].images[0].as_text()]}
    (tmp_path / "candidates.jsonl").write_text(json.dumps(line))
    store = open_store(tmp_path / "feedback.sqlite", create=True)
    store.add(read_candidates(tmp_path / "candidates.jsonl"))
    yield store
    store.close()


def address(presentation, number=0):
    return f"/api/image?presentation={presentation['id']}&number={number}"


def test_the_page_shows_the_images_of_a_prompt(shown):
    person = Person(shown, "ann")
    (one,) = person.next()["presentations"]
    assert one["images"] == 2
    for number, seed in enumerate((1, 2)):
        answer = person.get(address(one, number))
        assert answer.content == png(seed)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "img-src 'self' data:;" in policy and "default-src 'none'" in policy


def test_only_who_was_shown_a_pair_gets_its_images(shown, tmp_path):
    ann, bob = Person(shown, "ann"), Person(shown, "bob")
    (one,) = ann.next()["presentations"]
    assert bob.get(address(one)).status_code == 404
    ann.client.cookies.clear()
    assert ann.get(address(one)).status_code == 401


@pytest.mark.parametrize("number", ["2", "-1", "../cat.png", "", "9" * 30])
def test_a_request_names_no_file(shown, number):
    ann = Person(shown, "ann")
    (one,) = ann.next()["presentations"]
    assert ann.get(address(one, number)).status_code in (400, 404)


def test_a_file_that_is_gone_is_no_secret_path(shown, tmp_path):
    ann = Person(shown, "ann")
    (one,) = ann.next()["presentations"]
    (tmp_path / "cat.png").write_bytes(png(7))  # another one in its place
    answer = ann.get(address(one))
    assert answer.status_code == 404 and str(tmp_path) not in answer.text


def test_exported_pairs_keep_the_images(shown, tmp_path):
    ann = Person(shown, "ann")
    (one,) = ann.next()["presentations"]
    ann.judge(one["id"])
    pairs = to_pairs(shown).pairs
    assert [image.read() for image in pairs[0].images] == [png(1), png(2)]
    write_preferences(pairs, tmp_path / "pairs.jsonl")
    assert list(read_preferences(tmp_path / "pairs.jsonl")) == pairs


def test_a_broken_image_is_named_with_its_line(tmp_path):
    lines = [LINE, {**LINE, "image": "lost.png"}, {"prompt": "", "responses": []}]
    (tmp_path / "candidates.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="line 2.*lost.png") as caught:
        read_candidates(tmp_path / "candidates.jsonl")
    assert "line 3" in str(caught.value)
