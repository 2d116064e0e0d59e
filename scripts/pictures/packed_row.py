"""The picture `packed_row`: four bundled pairs in one row, and the row's attention mask.

It shows the row as a strip, the tokens of its first tree, and who sees whom. The figures are the
batch that `dpo_keras.batching` packs, and the mask that the tree attention makes of it.
"""

import itertools
from typing import Any

import numpy as np
from pictures.canvas import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PAPER,
    POINTS,
    SMALL,
    WIDTH,
    Canvas,
    Figures,
    percent,
    tokens,
)

from dpo_keras.batching import collate_packed, plan_packing
from dpo_keras.scoring.tree_attention import TreeLayout

ROW = [1, 2, 4, 5]  # of the pairs
KINDS = {
    "p": (GREY, "prompt"),
    "c": (GREEN, "chosen"),
    "r": (ORANGE, "rejected"),
    "b": (BLUE, "chosen and rejected"),  # of two pairs
}


def figures() -> Figures:
    """Lay four pairs out as one row, and ask for its attention mask."""
    _, tokenized = tokens()
    batch = collate_packed(tokenized, [ROW], trees=plan_packing(tokenized).trees)
    used = int(batch["padding_mask"].sum())
    layout = TreeLayout(batch["positions"][:, 0], batch["reach"][:, 0])
    sees = np.asarray(layout.biases(None)[0])[0, 0, :used, :used] == 0
    prompts, chosen, rejected = (int(sum(part.lengths[ROW])) for part in tokenized.parts)
    return {
        "ids": batch["token_ids"][0, 0, :used].tolist(),
        "kinds": "".join(_kinds(batch)[:used]),
        "trees": np.flatnonzero(batch["positions"][0, 0, :used] == 0).tolist(),
        "sees": ["".join("01"[int(one)] for one in row) for row in sees],
        "responses": sorted({owner: place for place, owner in reversed(_places(batch))}.values()),
        "pairs": len(ROW),
        "apart": 2 * prompts + chosen + rejected,
    }


def _places(batch: Any) -> list[tuple[int, int]]:
    """Find where each response token stands: (place, number of its response)."""
    ids, positions, reach = (batch[n][0, 0] for n in ("token_ids", "positions", "reach"))
    found = []
    slots = zip(*(batch[name][0] for name in ("source", "target", "owner")), strict=True)
    for source, target, owner in slots:
        if owner >= 0:
            behind = np.arange(source + 1, source + reach[source])
            following = behind[positions[behind] == positions[source] + 1]
            (place,) = following[ids[following] == target]
            found.append((int(place), int(owner)))
    return found


def _kinds(batch: Any) -> list[str]:
    """Tell of each place what it belongs to: p(rompt), c(hosen), r(ejected) or b(oth)."""
    chosen, rejected = (set(batch["responses"][0, :, n].tolist()) for n in (0, 1))
    found = ["p"] * batch["token_ids"].shape[2]
    for place, owner in _places(batch):
        kind = "c" if owner in chosen else "r"
        kind = "b" if owner in chosen & rejected else kind
        found[place] = kind if found[place] in ("p", kind) else "b"
    return found


def draw(found: Figures) -> Canvas:
    """Draw the row as a strip, the tokens of its first tree, and the mask."""
    used, kinds = len(found["ids"]), found["kinds"]
    trees = [*found["trees"], used]
    title = f"{found['pairs']} pairs in one packed row: {used} tokens in place of {found['apart']}"
    canvas = Canvas(title, 886)
    scale = 760 / used
    changes = {place for place in range(1, used) if kinds[place] != kinds[place - 1]}
    for begin, end in itertools.pairwise(sorted({*trees, *found["responses"], *changes})):
        look = {"facecolor": KINDS[kinds[begin]][0], "edgecolor": PAPER}
        canvas.box(20 + scale * begin, 52, scale * (end - begin), 34, **look)
    pairs_of = ("two pairs of one prompt", "a pair", "a pair")
    for number, (begin, end) in enumerate(itertools.pairwise(trees)):
        x, right = 20 + scale * begin + 2, 20 + scale * end - 2
        canvas.axes.plot([x, x, right, right], [92, 98, 98, 92], color=FAINT, linewidth=1.4)
        canvas.text((x + right) / 2, 114, f"tree {number + 1}: {pairs_of[number]}", ha="center")
    y = _draw_tree(canvas, found, trees[1])
    _draw_mask(canvas, found, y + 44)
    return canvas


def _draw_tree(canvas: Canvas, found: Figures, end: int) -> float:
    """Write the tokens of the first tree, a box each; return where the last line is."""
    canvas.text(20, 152, "The tokens of tree 1  (■ begins and ends a text)", weight="bold")
    tokenizer, _ = tokens()
    x, y = 0.0, 160.0
    for place, number in enumerate(found["ids"][:end]):
        word = str(tokenizer.detokenize([number])).replace("<|endoftext|>", "■")
        word = word.replace("\n", "⏎").strip()
        colour, name = KINDS[found["kinds"][place]]
        width = _width(canvas, word or " ") + 8
        if place == 0 or place in found["responses"]:
            y, x = y + 31, 112
            canvas.text(104, y + 5, name, size=SMALL, ha="right", va="baseline")
        elif x + width > WIDTH - 14:
            y, x = y + 27, 112
        canvas.box(x, y - 11.5, width, 23, facecolor=LIGHT[colour], edgecolor=colour)
        canvas.text(x + width / 2, y + 5, word, size=SMALL, ha="center", va="baseline")
        x += width + 3
    return y


def _width(canvas: Canvas, text: str) -> float:
    """Measure a text that is not drawn."""
    drawn = canvas.figure.text(0, 0, text, fontsize=POINTS * SMALL)
    found = drawn.get_window_extent(canvas.renderer).width
    drawn.remove()
    return float(found)


def _draw_mask(canvas: Canvas, found: Figures, y: float) -> None:
    """Draw who sees whom, in the colour of the token that is seen."""
    side, left, top = 420, 60, y + 52
    sees = np.array([list(line) for line in found["sees"]]) == "1"
    colours = [list(bytes.fromhex(KINDS[kind][0][1:])) for kind in found["kinds"]]
    shown = np.where(sees[..., None], np.array(colours, np.uint8), np.uint8(255))
    extent = (left, left + side, top + side, top)
    canvas.text(20, y, "The attention mask of the row", weight="bold")
    canvas.axes.imshow(shown, extent=extent, interpolation="nearest", aspect="auto")
    canvas.axes.set(xlim=(0, WIDTH), ylim=(canvas.height, 0))
    canvas.box(left, top, side, side, facecolor="none", edgecolor=GREY)
    look = {"size": SMALL, "ha": "center"}
    canvas.text(left + side / 2, top - 14, "column: the token that is seen", **look)
    canvas.text(left - 18, top + side / 2, "row: the token that looks", rotation=90, **look)
    notes = (
        ("A token sees", "its prompt and its own\nresponse, up to itself."),
        ("It does not see (white)", "other responses,\nnor other trees."),
        (f"{percent(sees.mean())} of the square", "is attended to."),
    )
    for number, (first, second) in enumerate(notes):
        canvas.text(510, top + 60 + 110 * number, first, weight="bold", va="top")
        canvas.text(510, top + 84 + 110 * number, second, va="top")
