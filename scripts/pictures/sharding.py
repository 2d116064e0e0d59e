"""The picture `sharding`: which of eight devices holds what.

It shows a mesh, the parts of two weights and of a batch, and the memory of three meshes. The
figures are read from JAX on eight simulated devices, where `dpo_keras.distribution` places a tiny
policy and Adam's state: `figures` runs this module as a process of its own, which prints them.
"""

import collections
import json
import os
import re
import subprocess
import sys
from typing import Any

import keras
import keras_hub
import numpy as np
from pictures.canvas import (
    BATCH,
    BLUE,
    FAINT,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    SMALL,
    Canvas,
    Figures,
    percent,
    tiny_policy,
    tokens,
)

import dpo_keras
from dpo_keras.batching import collate

SHOWN = "data=2, model=4"
MESHES: dict[str, dict[str, Any]] = {
    "data=8": {"data": 8},
    SHOWN: {"data": 2, "model": 4},
    f"{SHOWN}, fsdp=True": {"data": 2, "model": 4, "fsdp": True},
}
PARTS = (LIGHT[BLUE], LIGHT[GREEN], LIGHT[ORANGE], "#f3e6a8")  # of weights
HALVES = ("#d3d9de", "#f4f5f7")  # of a batch


def figures() -> Figures:
    """Ask JAX on eight simulated devices, in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "pictures.sharding"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def _placed() -> Figures:
    """Put the policy, Adam's state and a batch on each mesh, and read what each device holds."""
    found: Figures = {"shares": {}}
    for name, mesh in MESHES.items():
        chosen = dpo_keras.distribution(keras_hub.models.GPT2Backbone, **mesh)
        keras.distribution.set_distribution(chosen)
        policy = tiny_policy()
        optimizer = keras.optimizers.AdamW()
        optimizer.build(policy.trainable_variables)
        kept = [v.value for v in (*policy.variables, *optimizer.variables)]
        held: collections.Counter[int] = collections.Counter()
        for shard in (shard for value in kept for shard in value.addressable_shards):
            held[shard.device.id] += shard.data.nbytes
        found["shares"][name] = max(held.values()) / sum(value.nbytes for value in kept)
        if name == SHOWN:
            ids = collate(tokens()[1], np.arange(BATCH))["token_ids"]
            layout = chosen.get_data_layout(ids.shape)
            found["arrays"] = {
                "embedding": _pieces(_weight(policy, "token_embedding/embeddings")),
                "query kernel": _pieces(_weight(policy, "query/kernel")),
                "batch": _pieces(keras.distribution.distribute_tensor(ids, layout)),
            }
    return found


def _weight(policy: Any, end: str) -> Any:
    return next(v.value for v in policy.variables if v.path.endswith(end))


def _pieces(array: Any) -> Figures:
    """Tell the shape of an array, and of each part where it begins and which devices hold it."""
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for shard in array.addressable_shards:
        ends = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
        holders.setdefault(tuple(ends), []).append(shard.device.id)
    pieces = [{"ends": ends, "devices": sorted(ids)} for ends, ids in sorted(holders.items())]
    return {"shape": list(array.shape), "spec": str(array.sharding.spec), "pieces": pieces}


def draw(found: Figures) -> Canvas:
    """Draw the mesh, the parts of two weights and of a batch, and the memory of each mesh."""
    canvas = Canvas(f"Eight devices as a mesh: {SHOWN}", 806)
    embedding, kernel, batch = found["arrays"].values()
    explained = "model axis: each column holds one part of the weights"
    canvas.text(432, 62, explained, ha="center")
    for device in range(8):
        row, column = divmod(device, 4)
        x, y, wide = 112 + 168 * column, 84 + 86 * row, 160
        canvas.box(x, y, wide, 76, facecolor=HALVES[row], edgecolor=FAINT)
        canvas.box(x + 1, y + 38, wide - 2, 37, facecolor=PARTS[column])
        canvas.text(x + wide / 2, y + 19, f"device {device}", ha="center", weight="bold")
        (piece,) = (piece for piece in batch["pieces"] if device in piece["devices"])
        begin, end = piece["ends"][0]
        held = f"part {column}, pairs {begin}–{end - 1}"
        canvas.text(x + wide / 2, y + 57, held, size=SMALL, ha="center")
    canvas.text(20, 166, "data axis:\neach row\nhas its own\npairs", size=SMALL)
    _draw_array(canvas, 20, "token embedding", ("tokens", "states"), embedding)
    _draw_array(canvas, 290, "kernel of queries", ("states", "heads", ""), kernel)
    _draw_array(canvas, 560, "batch of token ids", ("pairs", "texts", "places"), batch)
    canvas.text(20, 624, "Weights and Adam's state, the most that one device holds", weight="bold")
    rows = [("one device", 1.0, percent(1), GREY)]
    for name, share in found["shares"].items():
        rows.append((name, share, percent(share), BLUE if name == SHOWN else GREY))
    canvas.bars(660, rows, 250)
    return canvas


def _draw_array(
    canvas: Canvas, x: float, title: str, dimensions: tuple[str, ...], array: Figures
) -> None:
    """Draw an array as a square, cut along the dimension that is split."""
    shape, side, top = array["shape"], 216, 366
    axes = re.findall(r"None|'\w+'", array["spec"])
    (split,) = (number for number, axis in enumerate(axes) if axis != "None")
    axis = axes[split][1:-1]
    sizes = [f"{size} {what}" for size, what in zip(shape, dimensions, strict=True)]
    canvas.text(x, 302, title, weight="bold", va="baseline")
    canvas.text(x, 326, " × ".join(sizes).strip(), size=SMALL, va="baseline")
    cut = f"split along {dimensions[split]} ({axis} axis)"
    canvas.text(x, 350, cut, size=SMALL, color=FAINT, va="baseline")
    colours = PARTS if axis == "model" else HALVES
    for colour, piece in zip(colours, array["pieces"], strict=True):
        begin, end = (place / shape[split] * side for place in piece["ends"][split])
        devices = ", ".join(map(str, piece["devices"]))
        middle, look = (begin + end) / 2, {"size": SMALL, "ha": "center"}
        if split == 0:
            canvas.box(x, top + begin, side, end - begin, facecolor=colour, edgecolor=FAINT)
            canvas.text(x + side / 2, top + middle, f"devices {devices}", **look)
        else:
            canvas.box(x + begin, top, end - begin, side, facecolor=colour, edgecolor=FAINT)
            canvas.text(x + middle, top + side / 2, f"devices\n{devices}", rotation=90, **look)


if __name__ == "__main__":
    print(json.dumps(_placed()))
