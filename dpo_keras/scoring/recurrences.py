"""Recurrences of linear attention as loops in the graph: Qwen 3.5's and RWKV-7's.

KerasHub unrolls them in Python, so that they run only where the length of the rows is static, and
Qwen 3.5's graph grows by hundreds of operations for each chunk of a layer. These compute the same
for any length: where it is not static, in a loop over chunks or tokens.

Notation, for one head: query q, key k and value v of a token are columns.
"""

from collections.abc import Callable
from typing import TypeAlias

import keras
from keras import ops

from dpo_keras.scoring.layer_overrides import Override
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import recurrence_owners

Found: TypeAlias = tuple[Tensor, Tensor | None]
_EPSILON = 1e-6  # of the L2 norms of queries and keys


def recurrence_overrides(model: keras.Model) -> list[Override]:
    """Run the recurrences of a model's layers as loops; [] for a model without any."""
    rules: dict[str, Callable[..., Found]] = {
        "gated_delta_rule": gated_delta_rule,
        "generalized_delta_rule": generalized_delta_rule,
    }
    owners = recurrence_owners(model) if isinstance(model, keras.Model) else {}  # not of tf-keras
    return [
        Override(owner, name, rules[rule])
        for rule, found in owners.items()
        for owner, name in found
    ]


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    padding_mask: Tensor | None = None,
) -> Found:
    r"""Compute the gated delta rule (Yang et al., arXiv 2412.06464) in chunks, in float32.

        S_t = exp(g_t) (I - beta_t k_t k_t') S_{t-1} + beta_t k_t v_t',    o_t = S_t' q_t / sqrt(D)

    with q and k of length 1. Within a chunk all updates are one triangular system.

    Args:
        query: `[batch, length, heads, D]`.
        key: `[batch, length, heads, D]`.
        value: `[batch, length, heads, V]`.
        g: `[batch, length, heads]`, logarithms of decays.
        beta: `[batch, length, heads]`, strengths of updates.
        chunk_size: tokens that are computed at once.
        initial_state: `[batch, heads, D, V]`; None for zeros.
        output_final_state: whether to return the last state, too.
        padding_mask: not used: the layer's projections of padding are 0 already.

    Returns:
        `o` `[batch, length, heads, V]` in the dtype of `query`, and the last state or None.
    """
    dtype, (batch, length, heads, width) = query.dtype, ops.shape(query)
    values = value.shape[-1]
    steps = [_normalized(query) * width**-0.5, _normalized(key), value]
    steps = [ops.cast(states, "float32") for states in steps]
    chunks = (length + chunk_size - 1) // chunk_size
    missing = chunks * chunk_size - length

    def chunked(states: Tensor) -> Tensor:
        """Return `[chunks, batch, heads, chunk, …]`, with zeros behind the end."""
        states = ops.pad(states, [[0, 0], [0, missing], [0, 0], [0, 0]])
        states = ops.reshape(states, (batch, chunks, chunk_size, heads, states.shape[-1]))
        return ops.transpose(states, (1, 0, 3, 2, 4))

    # One array, because ops.scan on TensorFlow wants a known length for several.
    gates = [ops.cast(gate[..., None], "float32") for gate in (g, beta)]
    every = chunked(ops.concatenate([*steps, *gates], axis=-1))
    cuts = [width, 2 * width, 2 * width + values, 2 * width + values + 1]
    if initial_state is None:
        initial_state = ops.zeros((batch, heads, width, values), "float32")
    start = ops.cast(initial_state, "float32")

    def step(state: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        return _delta_chunk(state, *ops.split(chunk, cuts, axis=-1))

    shape = (batch, heads, chunk_size, values)
    state, outputs = _along(step, start, every, shape)
    outputs = ops.transpose(outputs, (1, 0, 3, 2, 4))
    outputs = ops.reshape(outputs, (batch, chunks * chunk_size, heads, values))[:, :length]
    return ops.cast(outputs, dtype), state if output_final_state else None


def _normalized(states: Tensor) -> Tensor:
    squares = ops.sum(states * states, axis=-1, keepdims=True)
    return states * ops.rsqrt(squares + _EPSILON)


def _delta_chunk(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the state behind a chunk and its outputs `[batch, heads, chunk, V]`."""
    size = query.shape[-2]
    lower = ops.tril(ops.ones((size, size)))
    total = ops.cumsum(g, axis=-2)
    # exp(total_i - total_j) for j <= i. Masked before exp, which would overflow above the diagonal.
    decay = ops.exp((total - ops.swapaxes(total, -1, -2)) * lower) * lower
    keys = ops.swapaxes(key, -1, -2)
    system = ops.matmul(key * beta, keys) * decay * (lower - ops.eye(size)) + ops.eye(size)
    known = ops.concatenate([value * beta, key * beta * ops.exp(total)], axis=-1)
    solved = ops.solve_triangular(system, known, lower=True)
    added = solved[..., : value.shape[-1]] - ops.matmul(solved[..., value.shape[-1] :], state)
    outputs = ops.matmul(query * ops.exp(total), state)
    outputs = outputs + ops.matmul(ops.matmul(query, keys) * decay, added)
    last = total[..., -1:, :]
    weighed = ops.swapaxes(key * ops.exp(last - total), -1, -2)
    return state * ops.exp(last) + ops.matmul(weighed, added), outputs


def generalized_delta_rule(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    head_first: bool = False,
) -> Found:
    """Compute RWKV-7's recurrence (Peng et al., arXiv 2503.14456) token by token, in float32.

        S_t = S_{t-1} diag(exp(-exp(w_t))) + S_{t-1} a_t b_t' + v_t k_t',    o_t = S_t r_t

    Args:
        r: receptance `[batch, length, heads, N]`, as are the others.
        w: decay.
        k: key.
        v: value.
        a: direction that is taken out of the state.
        b: direction that takes its place.
        initial_state: `[batch, heads, N, N]`; None for zeros.
        output_final_state: whether to return the last state, too.
        head_first: not used: the layer puts heads third.

    Returns:
        `o` `[batch, length, heads, N]` in the dtype of `r`, and the last state or None.
    """
    dtype, (batch, _, heads, width) = r.dtype, ops.shape(r)
    every = ops.stack([ops.cast(x, "float32") for x in (r, w, k, v, a, b)])
    every = ops.transpose(every, (2, 0, 1, 3, 4))
    if initial_state is None:
        initial_state = ops.zeros((batch, heads, width, width))
    start = ops.broadcast_to(ops.cast(initial_state, "float32"), (batch, heads, width, width))

    def step(state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = ops.unstack(token, 6)
        taken = ops.matmul(state, a[..., None])
        state = state * ops.exp(-ops.exp(w))[..., None, :]
        state = state + taken * b[..., None, :] + v[..., None] * k[..., None, :]
        return state, ops.squeeze(ops.matmul(state, r[..., None]), -1)

    state, outputs = _along(step, start, every, (batch, heads, width))
    outputs = ops.cast(ops.transpose(outputs, (1, 0, 2, 3)), dtype)
    return outputs, state if output_final_state else None


def _along(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    state: Tensor,
    every: Tensor,
    shape: tuple[int | Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Take steps along dimension 0; return the last state and the outputs, each of `shape`."""
    count = every.shape[0]
    if isinstance(count, int):  # XLA wants a known number of steps
        outputs = []
        for number in range(count):
            state, output = step(state, every[number])
            outputs.append(output)
        return state, ops.stack(outputs)

    # The outputs of ops.scan have the shapes of its carry, which gets a place for them.
    def scanned(carry: tuple[Tensor, Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
        found = step(carry[0], values)
        return found, found

    (state, _), (_, outputs) = ops.scan(scanned, (state, ops.zeros(shape, "float32")), every)
    return state, outputs
