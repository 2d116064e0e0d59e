"""What pictures share: a canvas, its colours, figures in a PNG, and a tiny policy to look at."""

from __future__ import annotations

import io
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, PngImagePlugin

from dpo_keras.utils import reports

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github"
Figures: TypeAlias = dict[str, Any]

# The colours of reports, and light ones for areas.
INK, FAINT, PAPER = reports.INK, "#5d6873", "#ffffff"
BLUE, GREEN, ORANGE, GREY = reports.TRAIN, reports.CHOSEN, reports.REJECTED, reports.FAINT
LIGHT = {BLUE: "#cfe6f5", GREEN: "#c4ebdd", ORANGE: "#fbdcc6", GREY: "#e9ecef"}
WIDTH = 800  # pixels at which pictures are laid out; they have half as many again
SIZE, SMALL = 17, 15  # of letters, in those pixels
POINTS = 0.72  # in one of those pixels
PAIRS, BATCH = 400, 8  # of builtin:support: those that are trained on, and in a batch


class Canvas:
    """A white picture of 800 pixels in width, with y downwards, on which no texts may overlap.

    Args:
        title: what stands at the top.
        height: in the same pixels.
    """

    def __init__(self, title: str, height: int):
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=PAPER)
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.height, self.texts = height, []
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.text(20, 26, title, size=20, weight="bold")

    def text(self, x: float, y: float, text: str, size: float = SIZE, **options: Any) -> float:
        """Write around y, from x on (or as `ha` says); return the x at which the text ends."""
        given = {"color": INK, "va": "center", "linespacing": 1.25, **options}
        drawn = self.axes.text(x, y, text, fontsize=POINTS * size, **given)
        self.texts.append(drawn)
        return float(drawn.get_window_extent(self.renderer).x1)

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        """Draw a rectangle from its upper left corner on."""
        given = {"facecolor": PAPER, "edgecolor": "none", "linewidth": 1, **options}
        self.axes.add_patch(Rectangle((x, y), width, height, **given))

    def arrow(self, *places: tuple[float, float], colour: str = FAINT) -> None:
        """Draw a line through places with a head at its end."""
        if len(places) > 2:
            self.axes.plot(*zip(*places[:-1], strict=True), color=colour, linewidth=1.6)
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", places[-1], places[-2], arrowprops={**style, "mutation_scale": 14})

    def bars(self, y: float, rows: list[tuple[str, float, str, str]], left: float) -> None:
        """Draw horizontal bars: label, length from 0 to 1, what stands behind it, colour."""
        for number, (label, share, value, colour) in enumerate(rows):
            middle = y + 34 * number
            self.text(left - 12, middle, label, size=SMALL, ha="right")
            length = (WIDTH - left - 150) * share
            self.box(left, middle - 12, length, 24, facecolor=colour, edgecolor=FAINT)
            self.text(left + length + 8, middle, value, size=SMALL)

    def check(self) -> None:
        """Refuse texts that overlap, or leave the picture."""
        boxes = [(text.get_text(), text.get_window_extent(self.renderer)) for text in self.texts]
        for text, box in boxes:
            inside = box.x0 >= 0 and box.x1 <= WIDTH and box.y0 >= 0 and box.y1 <= self.height
            assert inside, f"{text!r} leaves the picture: {box}"
        for (one, first), (other, second) in itertools.combinations(boxes, 2):
            assert not first.overlaps(second), f"{one!r} overlaps {other!r}"


def percent(share: float) -> str:
    """Write a share from 0 to 1."""
    return f"{100 * share:.0f} %"


def save(canvas: Canvas, figures: Figures, path: Path) -> None:
    """Write a picture and its figures as a PNG of few colours."""
    canvas.check()
    drawn = io.BytesIO()
    canvas.figure.savefig(drawn, dpi=150, format="png")
    small = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("figures", json.dumps(figures), zip=True)
    small.save(path, optimize=True, pnginfo=texts)


def recorded(path: Path) -> Figures:
    """Return the figures that a picture was drawn from."""
    with Image.open(path) as picture:
        found: Figures = json.loads(picture.text["figures"])
    return found


@cache
def support() -> list[Any]:
    """Return the first pairs of builtin:support."""
    from dpo_keras.preferences.quickstart_data import support_pairs

    return list(support_pairs(PAIRS))


def tiny_policy() -> Any:
    """Build the quickstart's policy, with a tokenizer trained on the pairs and random weights."""
    import keras

    from dpo_keras.app.config_sections import Scratch
    from dpo_keras.app.models import build_policy

    keras.utils.set_random_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
    scratch = Scratch(family="gpt2", vocabulary_size=600, max_sequence_length=64, **sizes)
    texts = [text for pair in support() for text in (pair.prompt, pair.chosen, pair.rejected)]
    return build_policy(scratch, texts)


@cache
def tokens() -> tuple[Any, Any]:
    """Return the policy's tokenizer, and the pairs as tokens."""
    import dpo_keras

    policy = tiny_policy()
    tokenized = dpo_keras.tokenize_pairs(support(), policy.preprocessor, max_length=64)
    return policy.preprocessor.tokenizer, tokenized
