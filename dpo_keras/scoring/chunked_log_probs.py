r"""The language-model head applied to response tokens only, in chunks.

The log-probability of target token t under hidden state h is

    log p(t | h) = z_t - log sum_v exp(z_v),    z = cap(h W)

with W the model's own output projection and cap(z) = c tanh(z / c) where the model soft-caps its
logits. Logits of a long batch over a large vocabulary are the largest tensor of preference
training by far. Here they exist only one chunk at a time, in the forward pass and again,
recomputed, in the backward pass.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

# 2**23 float32 logits are 32 MiB: large enough for efficient products, small beside the model. Past
# 256 rows products become no faster, and the last chunk is mostly empty.
_LOGITS_PER_CHUNK = 2**23
_ROWS_PER_CHUNK = 256

STATISTICS: dict[str, Callable[[Any, Any], Any]] = {}


def _statistic(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    STATISTICS[function.__name__] = function
    return function


@_statistic
def entropy(log_probs: Any, probs: Any) -> Any:
    """H(p) = -sum p log p, of each row."""
    return -ops.sum(probs * log_probs, axis=-1)


@_statistic
def log_squared_norm(log_probs: Any, probs: Any) -> Any:
    """Log sum p^2, of each row: the normaliser of WPO's token weights (arXiv 2406.11827)."""
    return ops.log(ops.sum(ops.square(probs), axis=-1))


def chunk_size(vocabulary_size: int) -> int:
    """Rows of logits worked on at a time, so that a chunk of them stays near 32 MiB.

    Args:
        vocabulary_size: number of columns of the logits.

    Returns:
        A power of two between 64 and 256.

    Example:
        >>> chunk_size(8_192), chunk_size(262_144)
        (256, 64)
    """
    size = _ROWS_PER_CHUNK
    while size > 64 and size * vocabulary_size > _LOGITS_PER_CHUNK:
        size //= 2
    return size


def _capped(logits: Any, soft_cap: float | None) -> Any:
    return logits if soft_cap is None else soft_cap * ops.tanh(logits / soft_cap)


def token_log_probs(
    hidden: Any,
    kernel: Any,
    bias: Any,
    targets: Any,
    count: Any = None,
    *,
    soft_cap: float | None = None,
    statistics: tuple[str, ...] = (),
    chunk: int | None = None,
    kernel_trainable: bool = True,
) -> Any:
    """Log-probabilities of target tokens, without ever holding all the logits.

    The products run in the dtype of `hidden`; log-softmax and every sum run in float32. Gradients
    reach `hidden`, `kernel` and `bias`; logits are recomputed chunk by chunk on the way back.

    Args:
        hidden: `[N, D]`, hidden states that predict the targets.
        kernel: `[D, V]`, the output projection.
        bias: `[V]`, or None.
        targets: `[N]` int32 token ids.
        count: scalar int32, how many rows at the front matter; the chunks behind them are skipped
            and their results are 0. None means all of them.
        soft_cap: the c of cap(z) = c tanh(z / c), or None.
        statistics: names from `STATISTICS` to compute as well, without gradient.
        chunk: rows of logits at a time; by default `chunk_size(V)`.
        kernel_trainable: False spares the gradient of a frozen kernel.

    Returns:
        `[N, 1 + len(statistics)]` float32: the log-probs, then each statistic.

    Example:
        >>> hidden, kernel = ops.zeros((3, 4)), ops.zeros((4, 8))
        >>> logps = token_log_probs(hidden, kernel, None, ops.array([0, 3, 7], "int32"))
        >>> [round(float(logp), 4) for logp in logps[:, 0]]   # -log 8
        [-2.0794, -2.0794, -2.0794]
    """
    width, vocabulary = kernel.shape
    rows = ops.shape(hidden)[0]
    chunk = chunk or chunk_size(vocabulary)
    if isinstance(rows, int):
        chunk = min(chunk, max(rows, 1))
    chunks = (rows + chunk - 1) // chunk
    active = chunks if count is None else ops.cast((count + chunk - 1) // chunk, "int32")
    hidden = _padded(hidden, chunks * chunk)
    targets = _padded(ops.cast(targets, "int32"), chunks * chunk)
    columns = 1 + len(statistics)

    def forward(hidden: Any, kernel: Any, bias: Any) -> Any:
        def body(index: Any, results: Any) -> tuple[Any, Any]:
            start = index * chunk
            logits = _logits(_rows(hidden, start, chunk), kernel, bias, soft_cap)
            log_probs = ops.log_softmax(logits, axis=-1)
            target = _entries(targets, start, chunk)
            found = [_at(log_probs, target)]
            if statistics:
                probs = ops.exp(log_probs)
                found += [STATISTICS[name](log_probs, probs) for name in statistics]
            update = ops.stack(found, axis=-1)
            return index + 1, _write(results, start, update, chunk)

        results = ops.zeros((chunks * chunk, columns), "float32")
        return _loop(active, body, (results,))[0]

    def backward(hidden: Any, kernel: Any, bias: Any, upstream: Any) -> tuple[Any, Any, Any]:
        def body(index: Any, dhidden: Any, dkernel: Any, dbias: Any) -> tuple[Any, ...]:
            start = index * chunk
            states = _rows(hidden, start, chunk)
            logits = _logits(states, kernel, bias, soft_cap)
            probs = ops.softmax(logits, axis=-1)
            target = _entries(targets, start, chunk)
            scale = _rows(upstream, start, chunk)[:, :1]
            # d log p_t / d z = onehot(t) - p, with the one written where it is, and not as a
            # matrix of zeros around it.
            places = ops.stack([ops.arange(chunk, dtype="int32"), target], axis=-1)
            at_target = scale[:, 0] * (1.0 - _at(probs, target))
            dlogits = ops.scatter_update(-scale * probs, places, at_target)
            if soft_cap is not None:
                dlogits = dlogits * (1.0 - ops.square(logits / soft_cap))
            dlogits_low = ops.cast(dlogits, states.dtype)
            update = ops.matmul(dlogits_low, ops.transpose(kernel))
            dhidden = _write(dhidden, start, update, chunk)
            if kernel_trainable:
                product = ops.matmul(ops.transpose(states), dlogits_low)
                dkernel = dkernel + ops.cast(product, "float32")
            if bias is not None:
                dbias = dbias + ops.sum(dlogits, axis=0)
            return index + 1, dhidden, dkernel, dbias

        state = (
            ops.zeros_like(hidden),
            ops.zeros((width, vocabulary) if kernel_trainable else (), "float32"),
            ops.zeros((vocabulary,) if bias is not None else (), "float32"),
        )
        dhidden, dkernel, dbias = _loop(active, body, state)
        return dhidden, ops.cast(dkernel, kernel.dtype), dbias

    arguments = [hidden]
    if kernel_trainable:
        arguments.append(kernel)
    if bias is not None:
        arguments.append(bias)

    # Only what needs a gradient is an argument; the rest is closed over.
    @ops.custom_gradient
    def differentiable(*given: Any) -> Any:
        values = list(given)
        states = values.pop(0)
        weights = values.pop(0) if kernel_trainable else kernel
        offset = values.pop(0) if bias is not None else None

        def gradient(*args: Any, upstream: Any = None) -> Any:
            if upstream is None:
                (upstream,) = args
            dhidden, dkernel, dbias = backward(states, weights, offset, upstream)
            gradients = [dhidden]
            if kernel_trainable:
                gradients.append(dkernel)
            if bias is not None:
                gradients.append(ops.cast(dbias, bias.dtype))
            return gradients[0] if len(gradients) == 1 else tuple(gradients)

        return forward(states, weights, offset), gradient

    return differentiable(*arguments)[:rows]


def log_probs_of(logits: Any, targets: Any, statistics: tuple[str, ...] = ()) -> Any:
    """The same as `token_log_probs` from logits that are there already: the plain path.

    Args:
        logits: `[N, V]`, any float dtype.
        targets: `[N]` int32 token ids.
        statistics: names from `STATISTICS`, computed without gradient.

    Returns:
        `[N, 1 + len(statistics)]` float32.

    Example:
        >>> print(round(float(log_probs_of(ops.zeros((1, 4)), ops.array([2]))[0, 0]), 4))
        -1.3863
    """
    log_probs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    found = [_at(log_probs, targets)]
    if statistics:
        constant = ops.stop_gradient(log_probs)
        probs = ops.exp(constant)
        found += [STATISTICS[name](constant, probs) for name in statistics]
    return ops.stack(found, axis=-1)


def _logits(states: Any, kernel: Any, bias: Any, soft_cap: float | None) -> Any:
    logits = ops.matmul(states, kernel)
    if bias is not None:
        logits = logits + ops.cast(bias, logits.dtype)
    return _capped(ops.cast(logits, "float32"), soft_cap)


def _at(log_probs: Any, targets: Any) -> Any:
    return ops.squeeze(ops.take_along_axis(log_probs, targets[:, None], axis=-1), axis=-1)


def _padded(values: Any, length: Any) -> Any:
    missing = length - ops.shape(values)[0]
    return ops.pad(values, [[0, missing]] + [[0, 0]] * (len(values.shape) - 1))


def _rows(matrix: Any, start: Any, size: int) -> Any:
    return ops.slice(matrix, (start, 0), (size, matrix.shape[1]))


def _entries(vector: Any, start: Any, size: int) -> Any:
    return ops.slice(vector, (start,), (size,))


def _write(matrix: Any, start: Any, update: Any, size: int) -> Any:
    # Not ops.slice_update: on TensorFlow that is an XLA op, slow outside XLA.
    places = (start + ops.arange(size, dtype="int32"))[:, None]
    return ops.scatter_update(matrix, places, ops.cast(update, matrix.dtype))


def _loop(active: Any, body: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    start = ops.zeros((), "int32")
    results = ops.while_loop(lambda index, *_: index < active, body, (start, *state))
    return tuple(results[1:])
