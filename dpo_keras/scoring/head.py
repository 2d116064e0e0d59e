"""A policy's own language-model head: its projection, as `token_log_probs` takes it."""

import keras
from keras import ops

from dpo_keras.scoring.chunked_log_probs import token_log_probs
from dpo_keras.utils.keras_hub_internals import reversible_settings
from dpo_keras.utils.tensors import Tensor


class LanguageModelHead:
    """A policy's own output projection: tied or untied, soft-capped or not, with LoRA or without.

    The layer is a `keras.layers.ReversibleEmbedding` (what KerasHub's models use) or a
    `keras.layers.Dense`, from `[..., D]` to `[..., V]`.
    """

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer
        self.tied, self.soft_cap, dtype = False, None, None
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            self.tied, self.soft_cap, dtype = reversible_settings(layer)
        self.compute_dtype = dtype or layer.compute_dtype

    @staticmethod
    def supports(layer: object) -> bool:
        """Tell whether `layer` is one whose projection can be read off exactly."""
        if getattr(layer, "quantization_mode", None) is not None:
            return False
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            return True
        linear = keras.activations.linear
        return isinstance(layer, keras.layers.Dense) and layer.activation is linear

    def _is_trainable(self) -> bool:
        if isinstance(self.layer, keras.layers.Dense) or self.tied:
            return any(v.trainable for v in self.layer.variables if "bias" not in v.name)
        return bool(self.layer.reverse_embeddings.trainable)

    def kernel(self) -> Tensor:
        """Return the projection `[D, V]` in the dtype that the model multiplies in."""
        if isinstance(self.layer, keras.layers.Dense):
            kernel = self.layer.kernel
        elif self.tied:
            kernel = ops.transpose(ops.convert_to_tensor(self.layer.embeddings))
        else:
            kernel = self.layer.reverse_embeddings
        return ops.cast(ops.convert_to_tensor(kernel), self.compute_dtype)

    def bias(self) -> Tensor | None:
        """Return the bias `[V]`, or None."""
        if isinstance(self.layer, keras.layers.Dense) and self.layer.use_bias:
            return ops.convert_to_tensor(self.layer.bias)
        return None

    def __call__(
        self,
        hidden: Tensor,
        targets: Tensor,
        count: Tensor | None = None,
        statistics: tuple[str, ...] = (),
        chunk: int | None = None,
    ) -> Tensor:
        """Compute `token_log_probs` of `targets` with this projection."""
        return token_log_probs(
            ops.cast(hidden, self.compute_dtype),
            self.kernel(),
            self.bias(),
            targets,
            count,
            soft_cap=self.soft_cap,
            statistics=statistics,
            chunk=chunk,
            kernel_trainable=self._is_trainable(),
        )


def split_backbone_and_head(policy: object) -> tuple[keras.Model, LanguageModelHead] | None:
    """Take a policy apart where its logits are exactly head(backbone(inputs)); else return None.

    KerasHub's causal language models are functional models of two steps, backbone and reversed
    embedding. A model with any other step (a scaling of the logits, a quantized head) stays whole.
    """
    backbone = getattr(policy, "backbone", None)
    operations = getattr(policy, "operations", None)
    if not isinstance(backbone, keras.Model) or operations is None:
        return None
    steps = [
        operation
        for operation in operations
        if operation is not backbone and not isinstance(operation, keras.layers.InputLayer)
    ]
    if len(steps) != 1 or not LanguageModelHead.supports(steps[0]):
        return None
    return backbone, LanguageModelHead(steps[0])
