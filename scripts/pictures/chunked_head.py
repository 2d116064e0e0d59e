"""The picture `chunked_head`: which logits exist at a time when a batch is scored.

It shows the hidden states of a batch, those that predict a response token, the chunks in which
these go through the head, and the memory of the logits of each way. The figures are counted in a
batch of bundled pairs; the chunk is the one that the package takes for Gemma 3's vocabulary.
"""

import numpy as np
from pictures.canvas import (
    BATCH,
    BLUE,
    GREY,
    INK,
    LIGHT,
    PAPER,
    SMALL,
    Canvas,
    Figures,
    percent,
    tokens,
)

from dpo_keras.batching import collate
from dpo_keras.scoring.chunked_log_probs import chunk_size

VOCABULARY = 262_144  # of Gemma 3
TOP = 86  # of the hidden states


def figures() -> Figures:
    """Count the places of a batch that predict response tokens, and the logits of each way."""
    batch = collate(tokens()[1], np.arange(BATCH))
    grid = np.where(batch["padding_mask"].reshape(2 * BATCH, -1), 1, 0)
    length = grid.shape[1]
    for row, (source, owner) in enumerate(zip(batch["source"], batch["owner"], strict=True)):
        grid[2 * row + source[owner >= 0] // length, source[owner >= 0] % length] = 2
    places, predicting = grid.size, int((batch["owner"] >= 0).sum())
    chunk = chunk_size(VOCABULARY)
    return {
        "grid": ["".join(map(str, row)) for row in grid],
        "places": places,
        "predicting": predicting,
        "chunk": chunk,
        "vocabulary": VOCABULARY,
        "MiB": [count * VOCABULARY * 4 / 2**20 for count in (places, predicting, chunk)],
    }


def draw(found: Figures) -> Canvas:
    """Draw a batch's places, those that are gathered, their chunks, and the logits of each way."""
    canvas = Canvas("The head runs only where a response token is predicted", 626)
    grid, wide, high = found["grid"], 8, 15
    canvas.text(20, 66, f"1. Hidden states: {len(grid) // 2} pairs, 2 rows each", weight="bold")
    colours = {"0": PAPER, "1": LIGHT[GREY], "2": BLUE}
    for row, line in enumerate(grid):
        for column, kind in enumerate(line):
            look = {"facecolor": colours[kind], "edgecolor": GREY, "linewidth": 0.4}
            canvas.box(20 + wide * column, TOP + high * row, wide, high, **look)
    right, bottom = 20 + wide * len(grid[0]), TOP + high * len(grid)
    predicts = f"predicts a response token: {found['predicting']}"
    legend = (("2", predicts), ("1", "prompt or last token"), ("0", "padding"))
    for number, (kind, text) in enumerate(legend):
        y = bottom + 26 + 26 * number
        look = {"facecolor": colours[kind], "edgecolor": GREY, "linewidth": 0.8}
        canvas.box(20, y - 8, 16, 16, **look)
        canvas.text(44, y, text, size=SMALL)
    _draw_chunks(canvas, found, right, bottom)
    _draw_memory(canvas, found, bottom + 146)
    return canvas


def _draw_chunks(canvas: Canvas, found: Figures, right: float, bottom: float) -> None:
    """Draw the gathered states beside the grid, cut in chunks, and the logits of one chunk."""
    predicting, chunk = found["predicting"], found["chunk"]
    canvas.text(436, 66, "2. Gathered", weight="bold")
    canvas.text(586, 66, "3. Head, by chunks", weight="bold")
    canvas.arrow((right + 8, (TOP + bottom) / 2), (448, (TOP + bottom) / 2))
    scale = (bottom - TOP) / predicting
    for begin in range(0, predicting, chunk):
        size = min(chunk, predicting - begin)
        y, height = TOP + scale * begin, scale * size
        middle = y + height / 2
        canvas.box(456, y, 60, height, facecolor=BLUE, edgecolor=PAPER, linewidth=2)
        canvas.text(486, middle, f"{size}", ha="center", weight="bold", color=PAPER)
        if begin == 0:
            colour, text = INK, "logits in memory now"
            look = {"facecolor": LIGHT[BLUE], "edgecolor": BLUE}
        else:
            colour, text = GREY, "not made yet"
            look = {"edgecolor": GREY, "linestyle": (0, (4, 3))}
        canvas.arrow((520, middle), (580, middle), colour=colour)
        canvas.box(586, y + 3, 194, height - 6, **look)
        canvas.text(683, middle, text, size=SMALL, ha="center")
    text = "The backward pass makes the logits of\neach chunk again: none is kept."
    canvas.text(436, bottom + 52, text, size=SMALL)


def _draw_memory(canvas: Canvas, found: Figures, y: float) -> None:
    """Draw the logits of all places, of those gathered, and of a chunk as bars."""
    title = f"Logits in float32, with Gemma 3's vocabulary of {found['vocabulary']:,}"
    canvas.text(20, y, title, weight="bold")
    ways = (
        (f"all {found['places']} places", GREY),
        (f"the {found['predicting']} gathered", LIGHT[BLUE]),
        (f"one chunk of {found['chunk']}", BLUE),
    )
    rows = []
    for (label, colour), size in zip(ways, found["MiB"], strict=True):
        share = size / found["MiB"][0]
        rows.append((label, share, f"{size:,.0f} MiB ({percent(share)})", colour))
    canvas.bars(y + 36, rows, 190)
