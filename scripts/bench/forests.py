#!/usr/bin/env python
"""What it brings to lay out in one tree what texts have in common: pairs/s, tokens, fill of rows.

    python scripts/bench/forests.py [--json FILE]

Two sets of pairs, each trained on in packed rows where pairs share trees, and in packed rows where
each pair is a tree of its own, in turns:

* generated: several responses to each prompt, in all pairs, of random tokens. Prompts and responses
  are as long as those of the HH sample;
* HH: the pairs of the sample, whose later turns continue earlier ones.

Both layouts train on the same pairs, an epoch in each round, with a reference in the run.
"""

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import _common as common
import numpy as np


def hh_tokens(baseline: str, count: int, vocabulary: int) -> Any:
    """Tokenize the HH sample by a byte-level BPE that is trained on it."""
    import keras_hub

    from dpo_keras import tokenize_pairs
    from dpo_keras.app.models import train_tokenizer

    end = "<|endoftext|>"
    pairs = common.hh_pairs(baseline, count)
    texts = [str(text) for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    words, merges = train_tokenizer(texts, vocabulary, (end,))

    class Preprocessor:
        tokenize = keras_hub.tokenizers.BytePairTokenizer(words, merges)
        start_token_id = end_token_id = pad_token_id = words[end]

    return tokenize_pairs(pairs, Preprocessor(), max_length=common.MAX_LENGTH)


def generated(like: Any, prompts: int, responses: int, vocabulary: int, seed: int = 0) -> Any:
    """Make all pairs of the responses to each prompt, as long as those of other pairs."""
    random = np.random.default_rng(seed)
    both = np.concatenate([like.chosen.lengths, like.rejected.lengths])

    def text(lengths: np.ndarray, room: int = common.MAX_LENGTH) -> Any:
        return random.integers(2, vocabulary, random.choice(lengths))[:room]

    def answered() -> Iterator[tuple[Any, list[Any]]]:
        for _ in range(prompts):
            prompt = text(like.prompt.lengths)
            room = common.MAX_LENGTH - len(prompt)
            yield prompt, [text(both, room) for _ in range(responses)]

    return common.all_pairs(answered(), common.MAX_LENGTH)


class Layout:
    """A model that trains on one layout of the pairs."""

    def __init__(self, tokenized: Any, share: bool, args: dict[str, Any]):
        from dpo_keras.batching import packed_order, plan_packing

        self.tokenized = tokenized
        self.plan = plan_packing(tokenized, args["batch_size"], share_prompts=share)
        self.order = packed_order(self.plan)
        sizes = (args["layers"], args["width"], args["vocabulary"], common.MAX_LENGTH)
        self.step = common.dpo_model(common.gpt2(*sizes)).make_train_function()

    def batches(self) -> Iterator[Any]:
        """Lay out the steps of the epoch."""
        from dpo_keras.batching import collate_packed

        plan = self.plan
        for grid in self.order.pairs:
            shape = plan.length, plan.slots, plan.pairs
            yield collate_packed(self.tokenized, grid, *shape, trees=plan.trees)

    def epoch(self) -> float:
        """Train an epoch; return its pairs per second."""
        import tensorflow as tf

        found = list(self.batches())
        stacked = {name: np.stack([batch[name] for batch in found]) for name in found[0]}
        ready = iter(tf.data.Dataset.from_tensor_slices(stacked).prefetch(4))
        started = time.perf_counter()
        for _ in found:
            logs = self.step(ready)
        float(logs["loss"])  # waits for the last step
        return len(self.tokenized) / (time.perf_counter() - started)

    def figures(self) -> dict[str, float]:
        """Return what the plan says."""
        sizes = self.plan.sizes
        return {
            "tokens": int(sizes.tokens.sum()),
            "scored": int(sizes.responses.sum()),
            "fill": self.plan.fill,
            "rows": self.plan.rows,
            "length": self.plan.length,
            "pairs_per_step": len(self.tokenized) / self.plan.steps,
        }


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Train both layouts in turn, in this process."""
    like = hh_tokens(task["baseline"], task["pairs"], task["vocabulary"])
    tokenized = like
    if task["name"] == "generated":
        sizes = task["prompts"], task["responses"], task["vocabulary"]
        tokenized = generated(like, *sizes)
    layouts = {share: Layout(tokenized, share, task) for share in (True, False)}
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(-1, task["rounds"]):
        for share, layout in layouts.items():
            rate = layout.epoch()
            if turn >= 0:  # before, it traces and warms up
                rates[share].append(rate)
    return {
        "pairs": len(tokenized),
        "shared": {**layouts[True].figures(), "rates": rates[True]},
        "apart": {**layouts[False].figures(), "rates": rates[False]},
        "ratio": statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True)),
    }


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    common.baseline_option(parser)
    for name, default, meaning in (
        ("prompts", 40, "generated prompts"),
        ("responses", 4, "responses to each of them"),
        ("pairs", 400, "pairs of the HH sample"),
        ("batch-size", 24, "pairs per step, on average"),
        ("rounds", 3, "epochs of each layout"),
        ("layers", 6, "of the GPT-2"),
        ("width", 256, "of its hidden states"),
        ("vocabulary", 16384, "at most, of its tokenizer"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--set", choices=("generated", "HH"), help="only this set of pairs")
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task)))
        return
    names = ("prompts", "responses", "pairs", "batch_size", "rounds", "layers", "width")
    task = {name: getattr(args, name) for name in (*names, "vocabulary", "baseline")}
    figures, rows = {}, []
    for name in [args.set] if args.set else ["generated", "HH"]:
        found = common.in_a_process(__file__, {**task, "name": name}, args.launcher)
        figures[name] = found
        for layout in ("apart", "shared"):
            own = found[layout]
            cells = own["tokens"], own["scored"], f"{own['fill']:.0%}", own["pairs_per_step"]
            ratio = f"{found['ratio']:.2f}" if layout == "shared" else ""
            rate = statistics.median(own["rates"])
            rows.append((f"{name}, {layout}", float(found["pairs"]), *cells, rate, ratio))
    columns = ("pairs", "number", "tokens", "scored", "fill", "pairs/step", "pairs/s", "times")
    common.show("Trees of several pairs", columns, rows)
    common.write(args.json, figures)


if __name__ == "__main__":
    main()
