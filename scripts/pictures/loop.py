"""The picture `loop`: the stages of a round of improvement, and what five rounds brought.

The figures are the table of good replies in the guide of the command line (`dpo_keras/app/`), which
says how they were measured; nothing is trained here.
"""

import re
from typing import Any

from pictures.canvas import (
    BLUE,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    POINTS,
    ROOT,
    SIZE,
    SMALL,
    Canvas,
    Figures,
)

STAGES = (
    ("generate", "the policy\nanswers\nprompts"),
    ("select", "the pairs\nworth a\njudgement"),
    ("judge", "a person,\nor a function\nor model"),
    ("train", "DPO on\nall pairs\nso far"),
    ("evaluate", "on prompts\nthat were\nheld out"),
)
# Of each row of the table: its name here, colour, marker, and how far above it numbers stand.
LINES = {
    "": ("the judge is always right", BLUE, "o", 12),
    "judge.error_rate=0.2": ("20 % of its verdicts are wrong", ORANGE, "s", -14),
}


def figures() -> Figures:
    """Read the shares of good replies from the table in the guide of the command line."""
    guide = (ROOT / "dpo_keras/app/README.md").read_text(encoding="utf-8")
    section = guide.split("## Rounds of improvement")[1].split("\n## ")[0]
    rows = re.findall(r"^\| *(?:`(.*?)`)? *\|((?: [01]\.\d+ \|)+)$", section, re.MULTILINE)
    return {name: [float(cell) for cell in cells.split("|")[:-1]] for name, cells in rows}


def draw(found: Figures) -> Canvas:
    """Draw the stages of a round, and the share of good replies after each round."""
    canvas = Canvas("Rounds of improvement", 640)
    width, gap = 128, 30
    for number, (name, explained) in enumerate(STAGES):
        x = 20 + (width + gap) * number
        canvas.box(x, 54, width, 122, facecolor=LIGHT[BLUE], edgecolor=BLUE)
        look = {"ha": "center", "va": "baseline"}
        canvas.text(x + width / 2, 84, name, weight="bold", **look)
        for line, words in enumerate(explained.split("\n")):
            canvas.text(x + width / 2, 112 + 22 * line, words, size=SMALL, **look)
        if number:
            canvas.arrow((x - gap + 2, 115), (x - 2, 115), colour=INK)
    canvas.arrow((716, 178), (716, 212), (84, 212), (84, 178), colour=INK)
    canvas.text(400, 230, "the next round begins with the policy of this one", ha="center")
    _draw_rounds(canvas.figure.add_axes((0.09, 0.1, 0.885, 0.45)), found)
    return canvas


def _draw_rounds(axes: Any, found: Figures) -> None:
    bold = {"fontsize": POINTS * SIZE, "weight": "bold"}
    above = {"ha": "center", "va": "center", "textcoords": "offset points", **bold}
    for row, shares in found.items():
        name, colour, marker, offset = LINES[row]
        axes.plot(shares, color=colour, marker=marker, markersize=8, linewidth=2.4, label=name)
        for number, share in enumerate(shares[1:], 1):
            axes.annotate(f"{share:.3f}", (number, share), (0, offset), color=colour, **above)
    start = found[""][0]  # of both rows
    axes.annotate(f"{start:.3f}", (0, start), (0, -16), color=INK, **above)
    axes.set(xlim=(-0.3, 4.3), ylim=(0.8, 1.04), yticks=(0.8, 0.85, 0.9, 0.95, 1))
    axes.set_xticks(range(5), [f"round {number}" for number in range(5)])
    title = "Share of good replies to held-out prompts"
    axes.set_title(title, loc="left", pad=10, color=INK, **bold)
    axes.tick_params(labelsize=POINTS * SMALL, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT[GREY])
    axes.legend(loc="lower right", fontsize=POINTS * SIZE, frameon=False, labelcolor=INK)
