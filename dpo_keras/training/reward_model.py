"""A reward model: preferences as differences of a learned scalar."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import keras
import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring.dataset_scoring import response_log_probs
from dpo_keras.scoring.language_model_head import split_backbone_and_head
from dpo_keras.scoring.reward_scorer import RewardScorer
from dpo_keras.training.dpo_model import DPOModel
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced


@keras.saving.register_keras_serializable("dpo_keras")
class RewardModel(DPOModel):
    """Train a reward r(x, y) on preference pairs by the Bradley-Terry likelihood.

        P(y_1 better than y_2) = sigmoid(r(x, y_1) - r(x, y_2))
        loss = -[p log P + (1 - p) log (1 - P)]

    It takes the batches of `DPOModel`, and logs the same figures but for those of log-probs. Only
    differences of rewards of one prompt mean anything.

    Args:
        policy: a KerasHub causal language model (with LoRA or without), which gets a linear head
            `reward_head`; or any Keras model from `{"token_ids", "padding_mask"}` of whole texts to
            one number for each, `[batch]` or `[batch, 1]`.
        dropout: whether the model's dropout is active in training. Off by default.
        remat: gradient checkpointing.
        auxiliary_loss: `"keep"` or `"drop"`, as `DPOModel` takes it.

    Raises:
        InputError: a model that cannot be used.

    Example:
        >>> import keras_hub, dpo_keras
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> model = RewardModel(keras_hub.models.GPT2CausalLM(backbone))
        >>> model.compile(optimizer="adam")  # the loss is DPOLoss("reward")
        >>> tuple(model.reward_head.kernel.shape)
        (8, 1)

    References:
        Ouyang et al., arXiv 2203.02155, equation 1.
    """

    scores_rewards = True

    def __init__(
        self,
        policy: keras.Model,
        dropout: bool = False,
        remat: bool = False,
        auxiliary_loss: str = "keep",
        **kwargs: object,
    ):
        super().__init__(policy, "none", dropout, remat, auxiliary_loss, **kwargs)
        self.reward_head: keras.layers.Dense | None = None
        if split_backbone_and_head(policy) is not None:
            width = policy.backbone.hidden_dim
            self.reward_head = keras.layers.Dense(
                1,
                use_bias=False,  # differences do not see it
                # Rewards of unit variance at most, as in arXiv 2009.01325.
                kernel_initializer=keras.initializers.RandomNormal(stddev=1 / math.sqrt(width + 1)),
                dtype="float32",
                name="reward_head",
            )
            self.reward_head.build((None, width))
        self.scorer = RewardScorer(policy, self.reward_head, remat)

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        loss: str | DPOLoss = "reward",
        **kwargs: JSON,
    ) -> None:
        """Configure training; the arguments are those of `DPOModel.compile`."""
        super().compile(optimizer, loss, **kwargs)

    def rewards(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        *,
        preprocessor: object = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> np.ndarray:
        """Compute the reward of each response.

        Args:
            prompts: N strings.
            responses: N strings.
            preprocessor: a KerasHub preprocessor or tokenizer; by default the policy's.
            batch_size: responses at a time.
            max_length: as `dpo_keras.response_log_probs` takes it.

        Returns:
            `[N]` float32.

        Raises:
            InputError: no preprocessor, or lists of different length.
        """
        found, _ = response_log_probs(
            self.policy,
            prompts,
            responses,
            preprocessor=preprocessor,
            batch_size=batch_size,
            max_length=max_length,
            scorer=self.scorer,
        )
        return found

    def save_head(self, path: str | os.PathLike[str]) -> None:
        """Write the head's kernel, which no preset has a place for; the file is whole or absent."""
        with replaced(path) as partial, partial.open("wb") as file:
            np.save(file, keras.ops.convert_to_numpy(self.head.kernel))

    def load_head(self, path: str | os.PathLike[str]) -> None:
        """Read what `save_head` wrote; raise InputError if it is missing or of another width."""
        try:
            kernel = np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(InputProblem("path", f"must be a reward head: {error}")) from error
        if kernel.shape != self.head.kernel.shape:
            rule = f"must be a head of shape {tuple(self.head.kernel.shape)}"
            raise InputError(InputProblem("path", rule, kernel.shape))
        self.head.kernel.assign(kernel)

    @property
    def head(self) -> keras.layers.Dense:
        """The linear head; an InputError where the model is its own."""
        if self.reward_head is None:
            raise InputError(InputProblem("policy", "returns rewards itself, and has no head"))
        return self.reward_head

    def get_config(self) -> dict[str, JSON]:
        """Return what the model is rebuilt from."""
        config = super().get_config()
        del config["reference"]
        return config
