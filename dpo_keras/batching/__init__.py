"""Preference pairs become batches: templates, tokens, truncation, length buckets, packed rows.

`tokenize_pairs` turns text into token ids, `preference_dataset` makes batches of them: of a few
static shapes, or of packed rows, all by one contract, `Batch`.
"""

from typing import TYPE_CHECKING

from dpo_keras.batching.bucketing import BucketPlan, EpochOrder, epoch_order, plan_buckets
from dpo_keras.batching.chat_templates import ChatTemplate, available_templates, get_template
from dpo_keras.batching.collate import Batch, collate, collate_single
from dpo_keras.batching.encoders import TextEncoder
from dpo_keras.batching.forests import collate_packed
from dpo_keras.batching.packing import PackedOrder, PackingPlan, packed_order, plan_packing
from dpo_keras.batching.ragged import Ragged
from dpo_keras.batching.tokenization import tokenize_pairs
from dpo_keras.batching.tokenized_pairs import (
    DroppedPair,
    TokenizationReport,
    TokenizedPairs,
    prompt_share,
)
from dpo_keras.utils.deferred_imports import deferred_names

if TYPE_CHECKING:
    from dpo_keras.batching.batch_stream import (
        Part,
        batch_from_strings,
        one_pass,
        pass_signature,
    )
    from dpo_keras.batching.dataset import (
        Batching,
        BatchingChoice,
        UndecidedLayout,
        preference_dataset,
        steps_per_epoch,
    )

__all__ = [
    "Batch",
    "Batching",
    "BatchingChoice",
    "BucketPlan",
    "ChatTemplate",
    "DroppedPair",
    "EpochOrder",
    "PackedOrder",
    "PackingPlan",
    "Part",
    "Ragged",
    "TextEncoder",
    "TokenizationReport",
    "TokenizedPairs",
    "UndecidedLayout",
    "available_templates",
    "batch_from_strings",
    "collate",
    "collate_packed",
    "collate_single",
    "epoch_order",
    "get_template",
    "one_pass",
    "packed_order",
    "pass_signature",
    "plan_buckets",
    "plan_packing",
    "preference_dataset",
    "prompt_share",
    "steps_per_epoch",
    "tokenize_pairs",
]

# Templates and tokens are known without TensorFlow, of which batches are made.
_OF_STREAMS = ("Part", "batch_from_strings", "one_pass", "pass_signature")
_OF_DATASETS = (
    "Batching",
    "BatchingChoice",
    "UndecidedLayout",
    "preference_dataset",
    "steps_per_epoch",
)
__getattr__ = deferred_names(
    __name__,
    {**dict.fromkeys(_OF_STREAMS, "batch_stream"), **dict.fromkeys(_OF_DATASETS, "dataset")},
)
