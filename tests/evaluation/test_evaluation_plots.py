"""Plots by themselves; those of files are in the tests of the report."""

import base64
import re
import sys

import numpy as np
import pytest
from evaluation_columns import held_out

from dpo_keras.errors import InputError
from dpo_keras.evaluation.plots import _thinned, reliability
from dpo_keras.utils.reports import INK, TRAIN, Plot, save_png, svg_address


def line(figure):
    figure.subplots().plot([0, 1], color=TRAIN, label="a < b")


def test_a_plot_can_be_saved_as_png(tmp_path):
    save_png(Plot((2.0, 1.0), line), tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (300, 150)


def test_an_svg_names_its_colours_for_light_and_for_dark_and_is_the_same_each_time():
    address = svg_address(Plot((2.0, 1.0), line))
    kind, _, content = address.partition(",")
    text = base64.b64decode(content).decode()
    assert kind == "data:image/svg+xml;base64" and "prefers-color-scheme:dark" in text
    drawn = text.replace(re.search("<style>:root.*?</style>", text)[0], "")
    assert "var(--c0)" in drawn and TRAIN not in drawn and INK not in drawn
    assert "DejaVu" not in text and "system-ui" in text
    assert svg_address(Plot((2.0, 1.0), line)) == address


def test_the_reliability_plot_has_an_axis_from_0_to_1_and_no_bin_of_one_pair():
    from matplotlib.figure import Figure

    margins = [0.01] * 20 + [1.0] + [3.0] * 20  # one pair is alone in its bin
    figure = Figure()
    reliability(held_out(margins), None).draw(figure)
    top = figure.axes[0]
    low, high = top.get_ylim()
    assert -0.05 < low <= 0 and 1 <= high < 1.05
    points = top.containers[0].lines[0].get_xdata()
    assert len(points) == 2 and all(abs(x - 1 / (1 + np.exp(-1.0))) > 0.05 for x in points)


def test_a_long_curve_is_thinned_and_keeps_its_extremes():
    x = np.arange(50_000.0)
    y = np.sin(x)
    y[[7, 40_000]] = np.nan, 9.0
    kept_x, kept_y = _thinned(x, y)
    assert len(kept_x) <= 2000 and (np.diff(kept_x) > 0).all()
    assert np.nanmax(kept_y) == 9.0 and np.nanmin(kept_y) == np.nanmin(y)


def test_without_matplotlib_the_error_says_how_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="or leave them out with --no-plots"):
        svg_address(Plot((2.0, 1.0), line), without="leave them out with --no-plots")
