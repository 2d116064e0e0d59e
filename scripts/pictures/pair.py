"""The picture `pair`: one bundled pair on its way from text to loss.

Its two responses stand side by side: their token ids, log-probs under policy and reference,
scores and probabilities, then the log-likelihood ratio and the loss. The figures are those of a
tiny policy that is trained here for a few steps.
"""

import textwrap
from typing import Any

import keras
import numpy as np
from pictures.canvas import (
    FAINT,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PAPER,
    SMALL,
    Canvas,
    Figures,
    support,
    tiny_policy,
    tokens,
)

import dpo_keras
from dpo_keras.training import SupervisedModel, train_preferences, warm_up

SHOWN = 1  # of the pairs
BETA = 0.1


def figures() -> Figures:
    """Train a tiny policy a little, and follow one pair from its text to its loss."""
    policy, (_, tokenized) = tiny_policy(), tokens()
    first = SupervisedModel(policy)
    first.compile(keras.optimizers.AdamW(3e-3))
    warm_up(first, tokenized, epochs=8, batch_size=32)
    model = dpo_keras.DPOModel(policy)
    loss = dpo_keras.DPOLoss("sigmoid", beta=BETA, penalties={"nll": 1.0})
    model.compile(keras.optimizers.AdamW(1e-3), loss=loss)
    steps = train_preferences(model, tokenized, epochs=2, batch_size=32)
    found = model(dpo_keras.batching.collate(tokenized, [SHOWN]))
    shown = support()[SHOWN]
    return {
        "steps": steps,
        "beta": BETA,
        "texts": [shown.prompt, shown.chosen, shown.rejected],
        "ids": [part.take(np.array([SHOWN])).flat_values.tolist() for part in tokenized.parts],
        **{name: _rounded(found[name]) for name in ("policy", "reference", "scores", "llr")},
        "probabilities": _rounded(found["probabilities"]),
        "loss": _rounded(loss.terms(np.ones(1, np.float32), found)["preference_loss"]),
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in np.ravel(values)]


def draw(found: Figures) -> Canvas:
    """Draw the stages of the pair from top to bottom, its two responses side by side."""
    canvas = Canvas("One pair, from text to loss", 722)
    _draw_labels(canvas)
    canvas.box(20, 48, 760, 118, facecolor=LIGHT[GREY])
    canvas.text(34, 66, "prompt x", weight="bold")
    canvas.text(34, 106, found["texts"][0], size=SMALL)
    ids = found["ids"][0]
    shown = f"{' '.join(map(str, ids[:9]))} … {' '.join(map(str, ids[-3:]))}"
    shown = f"{len(ids)} token ids: {shown} (0 begins and ends a text)"
    canvas.text(34, 151, shown, size=SMALL, color=FAINT)
    for column, (name, colour) in enumerate((("chosen", GREEN), ("rejected", ORANGE))):
        x = 196 + 298 * column
        canvas.arrow((x + 143, 164), (x + 143, 184))
        canvas.box(x, 186, 286, 322, facecolor=LIGHT[colour])
        canvas.text(x + 14, 206, f"{name} response y", weight="bold")
        text = textwrap.fill(found["texts"][1 + column].strip(), 30)
        canvas.text(x + 14, 246, text, size=SMALL)
        ids = textwrap.fill(" ".join(map(str, found["ids"][1 + column])), 28)
        canvas.text(x + 14, 306, ids, size=SMALL, color=FAINT)
        policy, reference, score = (
            _nats(found[name][column]) for name in ("policy", "reference", "scores")
        )
        canvas.text(x + 143, 368, policy, ha="center", weight="bold")
        canvas.text(x + 143, 420, reference, ha="center", weight="bold")
        formula = f"{found['beta']} · ({policy} − {reference})".replace("− −", "+ ")
        canvas.text(x + 143, 464, formula, size=SMALL, ha="center")
        canvas.text(x + 143, 488, f"= {score}", ha="center", weight="bold")
        canvas.arrow((x + 143, 508), (x + 143, 528))
    _draw_results(canvas, found)
    return canvas


def _draw_labels(canvas: Canvas) -> None:
    reference = r"log π$_{\mathrm{ref}}$"
    labels = (
        (246, "text", ""),
        (306, "token ids", ""),
        (368, "log π(y | x)", "of the policy"),
        (420, reference + "(y | x)", "of the reference"),
        (476, "score S", f"β (log π − {reference})"),
        (552, "probability P", "softmax of both S"),
        (626, "LLR", "log-likelihood ratio"),
        (684, "loss", "without penalties"),
    )
    for y, name, explained in labels:
        canvas.text(20, y - 10 * bool(explained), name, weight="bold")
        canvas.text(20, y + 12, explained, size=SMALL, color=FAINT)


def _draw_results(canvas: Canvas, found: Figures) -> None:
    """Draw both probabilities as one bar, and what follows from them."""
    first, second = found["probabilities"]
    canvas.box(196, 530, 584, 44, facecolor=ORANGE)
    canvas.box(196, 530, 584 * first, 44, facecolor=GREEN)
    inside = {"ha": "center", "weight": "bold", "color": PAPER}
    canvas.text(196 + 292 * first, 552, f"{first:.3f}", **inside)
    canvas.text(780 - 292 * second, 552, f"{second:.3f}", **inside)
    ratio = f"log P(chosen) − log P(rejected) = log {first:.3f} − log {second:.3f} ="
    loss = f"−log P(chosen) = −log {first:.3f} ="
    for y, formula, name in ((626, ratio, "llr"), (684, loss, "loss")):
        end = canvas.text(196, y, formula)
        canvas.text(end + 6, y, _nats(found[name][0]), weight="bold")


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
