"""A policy taken apart: its backbone, and its own language-model head."""

import keras
from keras import ops

from dpo_keras.scoring.chunked_log_probs import Kernel, logits_of, token_log_probs
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import leading_image_states, reversed_embedding
from dpo_keras.utils.keras_hub_internals import reversible_settings
from dpo_keras.utils.keras_quantization import (
    dequantized_head,
    dequantized_kernel,
    head_parts,
    kernel_parts,
    quantization_mode,
    rounded_inputs,
)


class LanguageModelHead:
    """A policy's own projection, `[..., D]` to `[..., V]`: a `ReversibleEmbedding` or a `Dense`.

    `image_states` is how many hidden states stand in front of those of the tokens.
    """

    def __init__(self, layer: keras.layers.Layer, image_states: int = 0):
        self.layer, self.image_states = layer, image_states
        self.tied, self.soft_cap, dtype = False, None, None
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            self.tied, self.soft_cap, dtype = reversible_settings(layer)
        self.quantized = quantization_mode(layer) is not None
        self.compute_dtype = layer.compute_dtype if self.quantized or dtype is None else dtype

    @staticmethod
    def supports(layer: object) -> bool:
        """Tell whether `layer` is one whose projection can be read off exactly."""
        if quantization_mode(layer) not in (None, "int8", "int4"):
            return False
        if quantization_mode(layer) is not None and getattr(layer, "lora_enabled", False):
            return False
        if isinstance(layer, keras.layers.Dense):
            linear: bool = layer.activation is keras.activations.linear
            return linear
        return isinstance(layer, keras.layers.ReversibleEmbedding)

    def _is_trainable(self) -> bool:
        if self.quantized:
            return False
        if isinstance(self.layer, keras.layers.Dense) or self.tied:
            return any(v.trainable for v in self.layer.variables if "bias" not in v.name)
        return bool(self.layer.reverse_embeddings.trainable)

    def kernel(self) -> Kernel:
        """Return the projection `[D, V]` in the dtype that the model multiplies in.

        Of a quantized layer, return a function that makes it: it then exists within a chunk only.
        """
        if self.quantized:
            dense = isinstance(self.layer, keras.layers.Dense)
            parts = kernel_parts(self.layer) if dense else head_parts(self.layer)
            dequantized = dequantized_kernel if dense else dequantized_head
            return lambda: ops.cast(dequantized(self.layer, parts), self.compute_dtype)
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
            self._inputs(hidden),
            self.kernel(),
            self.bias(),
            targets,
            count,
            soft_cap=self.soft_cap,
            statistics=statistics,
            chunk=chunk,
            kernel_trainable=self._is_trainable(),
        )

    def logits(self, hidden: Tensor, kernel: Tensor) -> Tensor:
        """Compute logits `[N, V]` in float32 from states `[N, D]` and a kernel made before."""
        return logits_of(self._inputs(hidden), kernel, self.bias(), self.soft_cap)

    def _inputs(self, hidden: Tensor) -> Tensor:
        hidden = ops.cast(hidden, self.compute_dtype)
        return rounded_inputs(self.layer, hidden) if self.quantized else hidden


def split_backbone_and_head(policy: object) -> tuple[keras.Model, LanguageModelHead] | None:
    """Take a policy apart where its logits are exactly head(backbone(inputs)); else return None.

    KerasHub's causal language models are functional models of two steps, backbone and reversed
    embedding; some also cut the states of an image off the front. A model with any other step (a
    scaling of the logits, a quantized head) stays whole.
    """
    backbone = getattr(policy, "backbone", None)
    operations = getattr(policy, "operations", None)
    if not isinstance(backbone, keras.Model) or operations is None:
        return None
    reversed_head = reversed_embedding(policy)
    if reversed_head is not None:
        head = LanguageModelHead(reversed_head.embedding)
        head.tied, head.soft_cap = True, reversed_head.soft_cap
        return backbone, head
    steps = [
        operation
        for operation in operations
        if operation is not backbone and not isinstance(operation, keras.layers.InputLayer)
    ]
    image_states = leading_image_states(backbone)
    if image_states is not None:
        steps = [step for step in steps if type(step).__name__ != "GetItem"]
    if len(steps) != 1 or not LanguageModelHead.supports(steps[0]):
        return None
    return backbone, LanguageModelHead(steps[0], image_states or 0)
