"""The report: what it says, in three forms, and that nothing in it can act."""

import html.parser
import json
import re
import struct
import sys

import numpy as np
import pytest
from evaluation_columns import held_out, samples

from dpo_keras.errors import InputError
from dpo_keras.evaluation import write_report
from dpo_keras.evaluation.run_report import as_json, cell, fence, prose, shown, visible
from dpo_keras.preferences import PreferencePair

random = np.random.default_rng(0)
MARGIN = random.normal(1.0, 1.0, 60)
EVIL = '<script>alert("x")</script> | ``` ![i](http://e.v/i.png)\x1b[31m \u202egnp\ud800'
ALL_FILES = {
    *("report.md", "report.html", "report.json"),
    *("training_curves.png", "margins.png", "reliability.png"),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """As `callbacks.RunLog` writes it, cut off by a kill, with a step that broke."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    names = (
        "loss",
        "reward_accuracy",
        "reward_margin",
        "chosen_reward",
        "grad_norm",
        "penalty/nll",
    )
    rows = [{"step": i, **dict.fromkeys(names, 1.0 / i)} for i in range(1, 41)]
    rows[30]["loss"] = float("nan")
    rows.append({"epoch": 1, "step": 40, "val_loss": 0.5})
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 41, "lo')
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory, log):
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    pairs = [PreferencePair(f"prompt {i}", "good", f"bad {i}", id=f"pair-{i}") for i in range(60)]
    worst = int(np.argmin(MARGIN))
    pairs[worst] = PreferencePair("prompt <b>", "good", "bad `", annotator=EVIL[:-1])
    report = write_report(
        folder,
        held_out(MARGIN, group=[0] * 60, group_names=("<i>|group",)),
        before=held_out(0 * MARGIN, group=[0] * 60, group_names=("<i>|group",)),
        samples_before=samples([0, 1] * 5),
        samples_after=samples([1] * 10, responses=[EVIL[:-1]] * 10),
        metrics_jsonl=log,
        config_text="loss:\n  beta: 0.1  # <b>\n",
        pairs=pairs,
        title="A <title>",
        details={"data": "pairs.jsonl", "note": EVIL},
    )
    return folder, report


class Tags(html.parser.HTMLParser):
    """All tags of a document, with their attributes, and whether they nest."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.broken = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)


def test_all_files_are_there_and_named(written):
    folder, report = written
    assert {path.name for path in folder.iterdir()} == ALL_FILES
    assert {path.name for path in report.paths.values()} == ALL_FILES
    assert report.notices == ["1 lines of the training log could not be read."]
    assert "training_broke" in [finding.code for finding in report.findings]


def test_html_is_well_formed_loads_nothing_and_runs_nothing(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == tags.broken == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "iframe", "object", "link", "base", "form", "title>", "b", "i"}
    sources = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    # A panel for each of the six logged quantities, the margins and the reliability.
    assert len(sources) == 8
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not any(name.startswith("on") for _, a in tags.seen for name in a)
    assert "&lt;script&gt;" in text
    assert not any(mark in text for mark in "\x1b\u202e")


def test_markdown_holds_foreign_text_in_code_blocks_or_escaped(written):
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    assert not any(mark in text for mark in "\x1b\u202e")
    outside, fence_mark = [], None
    for line in text.splitlines():
        if fence_mark is None and line.startswith("```"):
            fence_mark = line.removesuffix("text")
        elif line == fence_mark:
            fence_mark = None
        elif fence_mark is None:
            outside.append(line)
    assert fence_mark is None
    assert not any("<script" in line.replace("\\<", "") for line in outside)
    assert not any("![i]" in line for line in outside)
    # Every table has as many cells in each row as in its head.
    widths = [line.replace("\\|", "").count("|") for line in outside]
    for one, other in zip(widths, widths[1:], strict=False):
        assert not one or not other or one == other


def test_json_is_strict_and_holds_every_figure_unrounded(written):
    text = (written[0] / "report.json").read_text(encoding="utf-8")

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    figure = found["held_out"]["after"]["figures"]["reward_margin"]
    assert figure["value"] == pytest.approx(MARGIN.mean(), rel=1e-12)
    assert found["changes"]["reward_margin"]["value"] == pytest.approx(MARGIN.mean())
    assert found["changes"]["preferred"]["value"] == 0.5
    assert found["details"]["note"] == EVIL  # lossless
    assert len(found["samples"]["after"]["records"]) == 10
    assert len(found["held_out"]["after"]["calibration"]["bins"]) == 10
    assert found["config"].startswith("loss:")


def test_tables_have_no_blank_columns(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    tables = re.findall("<table.*?</table>", text, re.DOTALL)
    for table in tables:
        rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
        for column in zip(*rows, strict=True):
            assert any(column[1:]), table
    assert len(tables) >= 6 and "<table" in text.partition("by group")[2]


@pytest.mark.parametrize("name", ["training_curves", "margins", "reliability"])
def test_plots_are_images_of_some_size_and_not_blank(written, name):
    data = written[1].paths[name].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 500 and height > 400
    assert len(data) > 10_000


def test_the_headline_tells_the_change(written):
    text = (written[0] / "report.md").read_text(encoding="utf-8")
    right = (MARGIN > 0).mean()
    head = text.split("##")[0]
    assert f"Held-out reward accuracy: {right:.3f}" in head
    assert f"0.500 before: +{right - 0.5:.3f}" in head
    assert "Share of generated responses that the judge prefers: 1.000" in head


def test_a_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    after = held_out(MARGIN)
    report = write_report(tmp_path, after)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "Plots need matplotlib" in report.notices[0]
    assert "Plots need matplotlib" in (tmp_path / "report.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="Plots need matplotlib"):
        write_report(tmp_path, after, plots=True)


def test_plots_of_an_earlier_report_do_not_stay(tmp_path):
    write_report(tmp_path, held_out(MARGIN))
    assert (tmp_path / "margins.png").exists()
    report = write_report(tmp_path, held_out([float("nan"), 1.0]))
    assert not (tmp_path / "margins.png").exists()
    assert "margins" not in report.paths
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "reliability.png").write_bytes(b"old")
    write_report(tmp_path, held_out(MARGIN), plots=False)
    assert not list(tmp_path.glob("*.png"))


def test_reports_of_little_are_written_too(tmp_path):
    undefined = held_out([1.0], weight=[0.0])
    for number, after in enumerate([held_out([1.0]), held_out([0.0]), undefined]):
        report = write_report(
            tmp_path / str(number), after, samples_after=samples([]) if 0 else None
        )
        json.loads(report.paths["json"].read_text(encoding="utf-8"))


def test_measurements_of_different_pairs_are_not_compared(tmp_path):
    report = write_report(
        tmp_path,
        held_out(MARGIN),
        before=held_out(MARGIN[:50]),
        samples_before=samples([1], prompts=["other"]),
        samples_after=samples([1]),
        plots=False,
    )
    assert [notice.split()[1] for notice in report.notices] == ["figures", "responses"]
    assert "change" not in report.paths["markdown"].read_text(encoding="utf-8").split("##")[1]


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics_jsonl .*nowhere.jsonl' cannot be read"):
        write_report(tmp_path, held_out(MARGIN), metrics_jsonl=tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="there are 1 of them, and pair 59 was measured"):
        write_report(tmp_path, held_out(MARGIN), pairs=[PreferencePair("a", "b", "c")])


def test_long_texts_are_cut_in_their_middle():
    text = shown("a" * 5000 + "b" * 5000)
    assert text.startswith("a" * 500) and text.endswith("b" * 500)
    assert "8,800 characters left out" in text


def test_text_in_markdown_never_acts():
    assert cell("a\n\nb") == "a b"
    assert cell("[x](javascript:y) www.e.v") == r"\[x\](javascript:y) www\.e.v"
    assert fence("````").splitlines()[0] == "`````text"
    assert cell("a|b <i>\n![x](http://y)") == r"a\|b \<i\> \!\[x\](http\://y)"
    assert fence("```") == "````text\n```\n````"
    assert prose("Use `ld_alpha` for group <b>.") == r"Use `ld_alpha` for group \<b\>."


def test_control_characters_are_written_out_and_those_that_scripts_need_stay():
    assert visible("a\x1b[31mb\r\nc\td") == "a\\x1b[31mb\nc\td"
    assert visible("a\x00\x7f\x9b\u202e\ud800") == r"a\x00\x7f\x9b\u202e\ud800"
    for needed in ("می\u200cروم", "👩\u200d👧", "\u200fא"):
        assert visible(needed) == needed


def test_json_escapes_what_cannot_be_shown_and_loses_nothing():
    given = {"text": "café \u202e\ud800\x7f\x1b"}
    assert as_json(given) == '{\n "text": "café \\u202e\\ud800\\u007f\\u001b"\n}\n'
    assert json.loads(as_json(given)) == given


@pytest.mark.parametrize("plots", [False, None])
def test_a_report_that_cannot_be_written_leaves_the_earlier_one_whole(tmp_path, monkeypatch, plots):
    write_report(tmp_path, held_out(MARGIN), title="first", plots=plots)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("dpo_keras.utils.atomic_files.flush_to_disk", _full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, held_out(-MARGIN), title="second", plots=plots)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def _full_disk(path):
    raise OSError("no space")
