"""The report of a round as text, HTML and JSON."""

import json

import pytest
from feedback_rounds import judge_all

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, assess
from dpo_keras.feedback.quality_report import html, text, write


def test_the_report_shows_hostile_names_as_text(make_store, tmp_path):
    name = "<script>alert(1)</script>\u202e$x$"
    given = [
        Candidates(f"p{n}", (Response(f"a{n}", name), Response(f"b{n}", "other"))) for n in range(6)
    ]
    store = make_store(given=given, overlap=1)
    person, _ = store.add_annotator(name)
    judge_all(store, person.id, lambda shown: "left" if hash(shown.left) % 2 else "tie")
    quality = assess(store, resamples=20)
    page = html(quality)
    assert "<script>" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "\u202e" not in text(quality)
    for suffix in (".html", ".json", ".txt"):
        write(quality, tmp_path / f"report{suffix}")
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["judgements"] == 6
    with pytest.raises(InputError, match="must end in"):
        write(quality, tmp_path / "report.pdf")


def test_an_empty_store_has_a_report(make_store):
    quality = assess(make_store(2), resamples=5)
    assert quality.counts["judgements"] == 0 and "0 judgements" in text(quality)
    assert html(quality)
