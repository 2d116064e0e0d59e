r"""Log-probs of target tokens under a language-model head, in chunks.

The log-probability of target token t under hidden state h is

    log p(t | h) = z_t - log sum_v exp(z_v),    z = cap(h W)

with W the model's own output projection and cap(z) = c tanh(z / c) where the model soft-caps its
logits. Logits of a long batch over a large vocabulary are the largest tensor of preference
training by far. Here they exist one chunk at a time, and the backward pass recomputes them.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from keras import ops

from dpo_keras.utils import Tensor

Kernel: TypeAlias = Tensor | Callable[[], Tensor]

# 2**23 float32 logits are 32 MiB: large enough for efficient products, small beside the model. Past
# 256 rows products become no faster, and the last chunk is mostly empty.
_LOGITS_PER_CHUNK = 2**23
_ROWS_PER_CHUNK = 256


def entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    """Compute H(p) = -sum p log p of each row."""
    return -ops.sum(probs * log_probs, axis=-1)


def log_squared_norm(log_probs: Tensor, probs: Tensor) -> Tensor:
    """Compute log sum p^2 of each row: the normaliser of WPO's token weights (arXiv 2406.11827)."""
    return ops.log(ops.sum(ops.square(probs), axis=-1))


STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": entropy,
    "log_squared_norm": log_squared_norm,
}
"""Figures of each row of logits, from its log-probs and probabilities `[N, V]`."""


def chunk_size(vocabulary_size: int) -> int:
    """Return the rows of logits to work on at a time: a power of two between 64 and 256."""
    size = _ROWS_PER_CHUNK
    while size > 64 and size * vocabulary_size > _LOGITS_PER_CHUNK:
        size //= 2
    return size


def token_log_probs(
    hidden: Tensor,
    kernel: Kernel,
    bias: Tensor | None,
    targets: Tensor,
    count: Tensor | None = None,
    *,
    soft_cap: float | None = None,
    statistics: tuple[str, ...] = (),
    chunk: int | None = None,
    kernel_trainable: bool = True,
) -> Tensor:
    """Compute log-probs of target tokens without ever holding all the logits.

    The products run in the dtype of `hidden`; log-softmax and every sum run in float32. Gradients
    reach `hidden`, `kernel` and `bias`; the backward pass recomputes the logits chunk by chunk.

    Args:
        hidden: `[N, D]`, hidden states that predict the targets.
        kernel: `[D, V]`, the output projection; or a function that makes it for each chunk, and
            then there is no gradient of it.
        bias: `[V]`, or None.
        targets: `[N]` int32 token ids.
        count: scalar int32, number of rows at the front that matter. The chunks behind them are
            skipped, and their results are 0. None computes all rows.
        soft_cap: the c of cap(z) = c tanh(z / c), or None.
        statistics: names from `STATISTICS` to compute as well, without gradient.
        chunk: rows of logits at a time; by default `chunk_size(V)`, and 256 for a function.
        kernel_trainable: whether to compute the gradient of the kernel.

    Returns:
        `[N, 1 + len(statistics)]` float32: the log-probs, then each statistic.

    Example:
        >>> hidden, kernel = ops.zeros((3, 4)), ops.zeros((4, 8))
        >>> logps = token_log_probs(hidden, kernel, None, ops.array([0, 3, 7], "int32"))
        >>> [round(float(logp), 4) for logp in logps[:, 0]]   # -log 8
        [-2.0794, -2.0794, -2.0794]
    """
    rows = ops.shape(hidden)[0]
    kernel_trainable = kernel_trainable and not callable(kernel)
    chunk = chunk or (_ROWS_PER_CHUNK if callable(kernel) else chunk_size(kernel.shape[1]))
    if isinstance(rows, int):
        chunk = min(chunk, max(rows, 1))
    total = (rows + chunk - 1) // chunk
    active = total if count is None else ops.cast((count + chunk - 1) // chunk, "int32")
    targets = _padded(ops.cast(targets, "int32"), total * chunk)
    chunks = _Chunks(targets, chunk, active, soft_cap, statistics, kernel_trainable)
    values = {"hidden": _padded(hidden, total * chunk), "kernel": kernel, "bias": bias}
    # Only what needs a gradient is an argument; the rest is closed over.
    trained = ["hidden"]
    trained += ["kernel"] if kernel_trainable else []
    trained += [] if bias is None else ["bias"]

    @ops.custom_gradient
    def differentiable(*given: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        inputs = {**values, **dict(zip(trained, given, strict=True))}

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            if upstream is None:
                (upstream,) = args
            found = chunks.backward(upstream, **inputs)
            gradients = tuple(found[name] for name in trained)
            return gradients[0] if len(gradients) == 1 else gradients

        return chunks.forward(**inputs), gradient

    return differentiable(*(values[name] for name in trained))[:rows]


class _Chunks(NamedTuple):
    """The chunks of one call: how their log-probs and gradients are computed, one at a time."""

    targets: Tensor
    size: int
    active: Tensor
    soft_cap: float | None
    statistics: tuple[str, ...]
    kernel_trainable: bool

    def forward(self, hidden: Tensor, kernel: Kernel, bias: Tensor | None) -> Tensor:
        def body(index: Tensor, results: Tensor) -> tuple[Tensor, Tensor]:
            start = index * self.size
            states = _rows(hidden, start, self.size)
            logits = logits_of(states, made(kernel), bias, self.soft_cap)
            log_probs = ops.log_softmax(logits, axis=-1)
            found = [_at(log_probs, _rows(self.targets, start, self.size))]
            if self.statistics:
                probs = ops.exp(log_probs)
                found += [STATISTICS[name](log_probs, probs) for name in self.statistics]
            return index + 1, _write(results, start, ops.stack(found, axis=-1), self.size)

        shape = (ops.shape(hidden)[0], 1 + len(self.statistics))
        return _loop(self.active, body, (ops.zeros(shape, "float32"),))[0]

    def backward(
        self, upstream: Tensor, hidden: Tensor, kernel: Kernel, bias: Tensor | None
    ) -> dict[str, Tensor]:
        def body(index: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
            dhidden, dkernel, dbias = found
            start = index * self.size
            states, matrix = _rows(hidden, start, self.size), made(kernel)
            logits = logits_of(states, matrix, bias, self.soft_cap)
            probs = ops.softmax(logits, axis=-1)
            target = _rows(self.targets, start, self.size)
            scale = _rows(upstream, start, self.size)[:, :1]
            # d log p_t / d z = onehot(t) - p, without a matrix of one-hot rows.
            places = ops.stack([ops.arange(self.size, dtype="int32"), target], axis=-1)
            at_target = scale[:, 0] * (1.0 - _at(probs, target))
            dlogits = ops.scatter_update(-scale * probs, places, at_target)
            if self.soft_cap is not None:
                dlogits = dlogits * (1.0 - ops.square(logits / self.soft_cap))
            dlogits_low = ops.cast(dlogits, states.dtype)
            update = ops.matmul(dlogits_low, ops.transpose(matrix))
            dhidden = _write(dhidden, start, update, self.size)
            if self.kernel_trainable:
                product = ops.matmul(ops.transpose(states), dlogits_low)
                dkernel = dkernel + ops.cast(product, "float32")
            if bias is not None:
                dbias = dbias + ops.sum(dlogits, axis=0)
            return index + 1, dhidden, dkernel, dbias

        trained = kernel if self.kernel_trainable and not callable(kernel) else None
        start = (
            ops.zeros_like(hidden),
            ops.zeros(() if trained is None else tuple(trained.shape), "float32"),
            ops.zeros(() if bias is None else tuple(bias.shape), "float32"),
        )
        dhidden, dkernel, dbias = _loop(self.active, body, start)
        return {
            "hidden": dhidden,
            "kernel": None if trained is None else ops.cast(dkernel, trained.dtype),
            "bias": dbias if bias is None else ops.cast(dbias, bias.dtype),
        }


def made(kernel: Kernel) -> Tensor:
    """Return a kernel that may be a function that makes it."""
    return kernel() if callable(kernel) else kernel


def log_probs_of(logits: Tensor, targets: Tensor, statistics: tuple[str, ...] = ()) -> Tensor:
    """Compute what `token_log_probs` computes, from full logits `[N, V]`."""
    log_probs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    found = [_at(log_probs, targets)]
    if statistics:
        constant = ops.stop_gradient(log_probs)
        probs = ops.exp(constant)
        found += [STATISTICS[name](constant, probs) for name in statistics]
    return ops.stack(found, axis=-1)


def logits_of(
    states: Tensor, kernel: Tensor, bias: Tensor | None, soft_cap: float | None
) -> Tensor:
    """Compute the logits `[N, V]` of states `[N, D]`, in float32."""
    logits = ops.matmul(states, kernel)
    if bias is not None:
        logits = logits + ops.cast(bias, logits.dtype)
    logits = ops.cast(logits, "float32")
    return logits if soft_cap is None else soft_cap * ops.tanh(logits / soft_cap)


def _at(log_probs: Tensor, targets: Tensor) -> Tensor:
    return ops.squeeze(ops.take_along_axis(log_probs, targets[:, None], axis=-1), axis=-1)


def _padded(values: Tensor, length: Tensor) -> Tensor:
    missing = length - ops.shape(values)[0]
    return ops.pad(values, [[0, missing]] + [[0, 0]] * (len(values.shape) - 1))


def _rows(values: Tensor, start: Tensor, size: int) -> Tensor:
    rest = tuple(values.shape[1:])
    return ops.slice(values, (start, *(0 for _ in rest)), (size, *rest))


def _write(matrix: Tensor, start: Tensor, update: Tensor, size: int) -> Tensor:
    # Not ops.slice_update: on TensorFlow that is an XLA op, slow outside XLA.
    places = (start + ops.arange(size, dtype="int32"))[:, None]
    return ops.scatter_update(matrix, places, ops.cast(update, matrix.dtype))


def _loop(
    active: Tensor, body: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    start = ops.zeros((), "int32")
    results = ops.while_loop(lambda index, *_: index < active, body, (start, *state))
    return tuple(results[1:])
