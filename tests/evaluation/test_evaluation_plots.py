"""Plots in memory; those of files are in the tests of the report."""

import io
import sys

import pytest

from dpo_keras.errors import InputError
from dpo_keras.evaluation.plots import save_plot


def test_a_plot_can_be_drawn_into_memory():
    file = io.BytesIO()
    save_plot(file, (2.0, 1.0), lambda figure: figure.subplots().plot([0, 1]))
    data = file.getvalue()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (300, 150)


def test_without_matplotlib_the_error_says_how_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="or leave them out with --no-plots"):
        save_plot(io.BytesIO(), (2.0, 1.0), print, without="leave them out with --no-plots")
