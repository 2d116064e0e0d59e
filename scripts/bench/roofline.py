#!/usr/bin/env python
"""How much of this machine's matrix-multiply rate a training step reaches.

    python scripts/bench/roofline.py --checkpoint DIR [--baseline FILE]
    python scripts/bench/roofline.py --checkpoint DIR --profile

The second form tells what the steps' time goes to, by kind of operation.

The rate is measured here, by TensorFlow in float32: of a large square product, the denominator, and
of the products that the step itself is made of, weighed by their arithmetic. Rate and steps are
measured in turn, so that what else runs on the machine slows both.

Counted is only what packed trees need: for T tokens, R response tokens to score, and S pairs of a
token with a token that it sees,

    forward = 2 T (kernels of all layers) + 4 S (width) (layers) + 2 R (width) (vocabulary)

once for the reference and three times for the policy (forward, and twice as much on the way back).
Not counted: places without a token, pairs of tokens that do not see each other, logits computed
again on the way back, softmax, norms, activations, the optimizer, and the input's embedding.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import _common as common
import numpy as np
from _step_profile import operation_spans, table

_LISTED = 24  # operations in a profile's table; the others are in the JSON file


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a model's arithmetic depends on.

    Attributes:
        layers: transformer layers.
        width: of hidden states; queries and values of all heads together are as wide.
        kernels: numbers in the layers' matrices, embeddings and head left out.
        vocabulary: logits per token.
    """

    layers: int
    width: int
    kernels: int
    vocabulary: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a packed batch asks of the model.

    Attributes:
        pairs: compared pairs.
        tokens: tokens, padding left out.
        scored: response tokens of which the head gives log-probs.
        visible: pairs (i, j) where token i sees token j, itself included.
    """

    pairs: int
    tokens: int
    scored: int
    visible: int

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray]) -> "Work":
        """Count what is in a batch, by the contract of packed batches."""
        real = batch["padding_mask"] == 1
        return cls(
            int((batch["weight"] > 0).sum()),
            int(real.sum()),
            int((batch["owner"] >= 0).sum()),
            int(batch["reach"][real].sum()),
        )


def forward_flops(work: Work, shape: Shape) -> int:
    """Additions and multiplications of one pass over trees, without gradient."""
    attention = 4 * work.visible * shape.width * shape.layers
    head = 2 * work.scored * shape.width * shape.vocabulary
    return 2 * work.tokens * shape.kernels + attention + head


def step_flops(work: Work, shape: Shape, reference: bool) -> int:
    """Count what a training step on these trees needs."""
    return (3 + reference) * forward_flops(work, shape)


def shape_of(policy: Any) -> Shape:
    """Read a KerasHub causal language model's shape from its backbone."""
    backbone = policy.backbone
    kernels = [v for v in backbone.trainable_variables if v.path.endswith("kernel")]
    return Shape(
        backbone.num_layers,
        backbone.hidden_dim,
        sum(int(np.prod(kernel.shape)) for kernel in kernels),
        backbone.vocabulary_size,
    )


def products(backbone: Any, tokens: int, chunk: int) -> list[tuple[int, int, int, float]]:
    """List the products [m, k] x [k, n] of a forward pass and its gradients, and their weights.

    Args:
        backbone: whose kernels count, each viewed as a matrix from width to the rest.
        tokens: rows of hidden states.
        chunk: rows of logits at a time.

    Returns:
        `(m, k, n, flops)`: the arithmetic that a step with a reference spends in that shape. A
        third of it is forward and one more third each of the gradients, and the reference's pass.
    """
    width = backbone.hidden_dim
    kinds: dict[tuple[int, int, int], float] = {}
    matrices = [
        (tokens, width, int(np.prod(v.shape)) // width)
        for v in backbone.trainable_variables
        if v.path.endswith("kernel")
    ]
    head = [(chunk, width, backbone.vocabulary_size)] * max(tokens // 2 // chunk, 1)
    for m, k, n in matrices + head:
        flops = 2.0 * m * k * n
        for product, times in (((m, k, n), 2), ((m, n, k), 1), ((k, m, n), 1)):
            kinds[product] = kinds.get(product, 0.0) + times * flops
    return [(*product, flops) for product, flops in kinds.items()]


def measured_rate(shapes: list[tuple[int, int, int, float]]) -> Callable[[], float]:
    """Make a function that measures flops per second over products, weighted by their flops."""
    import tensorflow as tf

    def runner(m: int, k: int, n: int) -> Callable[[], float]:
        left, right = tf.random.normal((m, k)), tf.random.normal((k, n))
        product = tf.function(lambda: tf.reduce_sum(tf.matmul(left, right)[:1]))
        product()
        repeat = max(int(2e9 / (2.0 * m * k * n)), 1)

        def seconds_per_flop() -> float:
            started = time.perf_counter()
            for _ in range(repeat):
                product()
            return (time.perf_counter() - started) / (2.0 * m * k * n * repeat)

        return seconds_per_flop

    runners = [(runner(m, k, n), flops) for m, k, n, flops in shapes]
    total = sum(flops for _, flops in runners)

    def rate() -> float:
        return total / sum(flops * run() for run, flops in runners)

    return rate


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Rates and steps in turn, in this process."""
    import keras_hub
    import tensorflow as tf

    from dpo_keras import preference_dataset, tokenize_pairs
    from dpo_keras.scoring import cache_reference
    from dpo_keras.scoring.chunked_log_probs import chunk_size

    policy = keras_hub.models.CausalLM.from_preset(task["checkpoint"])
    shape = shape_of(policy)
    pairs = common.hh_pairs(task["baseline"], task["pairs"])
    tokenized = tokenize_pairs(pairs, policy.preprocessor, max_length=common.MAX_LENGTH)
    if task["cached"]:
        tokenized = cache_reference(policy, tokenized, batch_size=8, batching="packed")
    dataset = preference_dataset(tokenized, batch_size=8, batching="packed", epochs=None)
    model = common.dpo_model(policy, "cached" if task["cached"] else "frozen_copy")
    step = model.make_train_function()
    works: list[Work] = []

    def batches() -> Iterator[Any]:
        for batch in dataset:
            works.append(Work.of({name: value.numpy() for name, value in batch.items()}))
            yield batch

    # Few at a time, each ready before the clock starts.
    stream = batches()
    spec = dataset.element_spec
    length = spec["token_ids"].shape[0] * spec["token_ids"].shape[2]
    if task["profile"]:
        return {"operations": _profile(step, [next(stream) for _ in range(task["steps"])], spec)}
    square = measured_rate([(2048, 2048, 2048, 1.0)])
    own = measured_rate(products(policy.backbone, length, chunk_size(shape.vocabulary)))
    found: dict[str, list[float]] = {"square": [], "own": [], "step": [], "pairs": [], "fill": []}
    for turn in range(-1, task["rounds"]):
        works.clear()
        ready = iter(_dataset([next(stream) for _ in range(task["steps"])], spec, tf))
        rates = square(), own()
        started = time.perf_counter()
        for _ in range(task["steps"]):
            step(ready)
        seconds = time.perf_counter() - started
        if turn < 0:  # traces, compiles and warms up
            continue
        flops = sum(step_flops(work, shape, not task["cached"]) for work in works)
        found["square"].append(rates[0])
        found["own"].append(rates[1])
        found["step"].append(flops / seconds)
        found["pairs"].append(sum(work.pairs for work in works) / seconds)
        found["fill"].append(sum(work.tokens for work in works) / (task["steps"] * length))
    return {**found, "shape": dataclasses.asdict(shape), "tokens_per_step": length}


def _profile(step: Callable[[Any], Any], batches: list[Any], spec: Any) -> list[Any]:
    """Run the same steps three times; return the `table` of the third time."""
    import tensorflow as tf

    def run() -> None:
        ready = iter(_dataset(batches, spec, tf))
        for _ in batches:
            step(ready)

    run()
    run()
    return table(operation_spans(run), len(batches))


def _dataset(batches: list[Any], spec: Any, tf: Any) -> Any:
    stacked = {name: tf.stack([batch[name] for batch in batches]) for name in spec}
    return tf.data.Dataset.from_tensor_slices(stacked).prefetch(len(batches))


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    common.baseline_option(parser)
    parser.add_argument("--checkpoint", help="a KerasHub or Hugging Face model directory")
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7, help="of rate and steps in turn")
    parser.add_argument("--steps", type=int, default=8, help="in each round")
    parser.add_argument("--profile", action="store_true", help="list operations instead of rates")
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task)))
        return
    if args.checkpoint is None:
        parser.error("--checkpoint is needed")
    task = {"checkpoint": args.checkpoint, "baseline": args.baseline, "pairs": args.pairs}
    task |= {"rounds": args.rounds, "steps": args.steps, "profile": args.profile}
    figures, rows = {}, []
    for name in ("in the run", "cached"):
        cached = name == "cached"
        found = common.in_a_process(__file__, {**task, "cached": cached}, args.launcher)
        if args.profile:
            figures[name] = found
            columns = ("operation", "", "ms per step", "share", "calls per step")
            common.show(f"Reference {name}", columns, found["operations"][:_LISTED])
            continue
        rates = {key: statistics.median(found[key]) for key in ("square", "own", "step", "pairs")}
        ratios = zip(found["step"], found["square"], found["own"], strict=True)
        shares = [(step / square, step / own) for step, square, own in ratios]
        of_square, of_own = (statistics.median(column) for column in zip(*shares, strict=True))
        figures[name] = {**found, "of_square": of_square, "of_own": of_own}
        gigaflops = (f"{rates[key] / 1e9:.1f}" for key in ("square", "own", "step"))
        rows.append((name, *gigaflops, f"{of_square:.0%}", f"{of_own:.0%}", rates["pairs"]))
    if rows:
        columns = ("reference", "2048³ GF/s", "own products GF/s", "needed in a step GF/s")
        common.show("Roofline", (*columns, "of 2048³", "of own products", "pairs/s"), rows)
    common.write(args.json, figures)


if __name__ == "__main__":
    main()
