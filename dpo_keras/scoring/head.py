"""A policy's own language-model head: its projection, as `token_log_probs` takes it."""

from typing import Any

import keras
from keras import ops

from dpo_keras.scoring.chunked_log_probs import token_log_probs


class LanguageModelHead:
    """A policy's own output projection: tied or untied, soft-capped or not, with LoRA or without.

    Args:
        layer: a `keras.layers.ReversibleEmbedding` (what KerasHub's models use) or a
            `keras.layers.Dense` that maps `[..., D]` to `[..., V]`.

    Example:
        >>> layer = keras.layers.ReversibleEmbedding(16, 4)
        >>> layer.build()
        >>> head = LanguageModelHead(layer)
        >>> head.kernel().shape
        TensorShape([4, 16])
    """

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer
        self.soft_cap = getattr(layer, "logit_soft_cap", None)
        self.compute_dtype = getattr(layer, "reverse_dtype", None) or layer.compute_dtype

    @staticmethod
    def supports(layer: Any) -> bool:
        """Whether `layer` is one whose projection can be read off exactly."""
        if getattr(layer, "quantization_mode", None) is not None:
            return False
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            return True
        return isinstance(layer, keras.layers.Dense) and layer.activation is (
            keras.activations.linear
        )

    def _tied(self) -> bool:
        return getattr(self.layer, "tie_weights", False)

    def _variables(self) -> list[Any]:
        if isinstance(self.layer, keras.layers.Dense):
            return [variable for variable in self.layer.variables if "bias" not in variable.name]
        return self.layer.variables if self._tied() else [self.layer.reverse_embeddings]

    def kernel(self) -> Any:
        """The projection `[D, V]` in the dtype that the model multiplies in."""
        if isinstance(self.layer, keras.layers.Dense):
            kernel = self.layer.kernel
        elif self._tied():
            kernel = ops.transpose(ops.convert_to_tensor(self.layer.embeddings))
        else:
            kernel = self.layer.reverse_embeddings
        return ops.cast(ops.convert_to_tensor(kernel), self.compute_dtype)

    def bias(self) -> Any:
        """The bias `[V]`, or None."""
        if isinstance(self.layer, keras.layers.Dense) and self.layer.use_bias:
            return ops.convert_to_tensor(self.layer.bias)
        return None

    def __call__(
        self,
        hidden: Any,
        targets: Any,
        count: Any = None,
        statistics: tuple[str, ...] = (),
        chunk: int | None = None,
    ) -> Any:
        """Log-probs (and statistics) of `targets`; see `token_log_probs`.

        Args:
            hidden: `[N, D]`.
            targets: `[N]` int32.
            count: scalar int32, rows at the front that matter, or None.
            statistics: names from `scoring.chunked.STATISTICS`.
            chunk: rows of logits at a time.

        Returns:
            `[N, 1 + len(statistics)]` float32.
        """
        return token_log_probs(
            ops.cast(hidden, self.compute_dtype),
            self.kernel(),
            self.bias(),
            targets,
            count,
            soft_cap=self.soft_cap,
            statistics=statistics,
            chunk=chunk,
            kernel_trainable=any(variable.trainable for variable in self._variables()),
        )
