"""Feedback of people: they compare responses, and their judgements become preference pairs.

    read_candidates   JSONL -> prompts with two or more responses, and who made each
    open_store        one SQLite file: pairs, presentations, a log of judgements
    annotation_server the page, on the loopback: `make_app`, `bind`, `run`
    assess            agreement, annotators, policies -> Quality
    to_pairs          judgements -> preference pairs for training

Nothing here imports TensorFlow. The server and the statistics need `dpo-keras[feedback]`; they are
imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

from dpo_keras.feedback.assignment import Settings
from dpo_keras.feedback.candidates import Candidates, Imported, Response, read_candidates
from dpo_keras.feedback.database import StoreError
from dpo_keras.feedback.judgements import Conflict, Receipt
from dpo_keras.feedback.store import Store, open_store

if TYPE_CHECKING:
    from dpo_keras.feedback.pair_export import Exported, to_pairs, to_rankings
    from dpo_keras.feedback.quality import Quality, assess

_HOME = {
    "Exported": "dpo_keras.feedback.pair_export",
    "Quality": "dpo_keras.feedback.quality",
    "assess": "dpo_keras.feedback.quality",
    "to_pairs": "dpo_keras.feedback.pair_export",
    "to_rankings": "dpo_keras.feedback.pair_export",
}

__all__ = [
    "Candidates",
    "Conflict",
    "Exported",
    "Imported",
    "Quality",
    "Receipt",
    "Response",
    "Settings",
    "Store",
    "StoreError",
    "assess",
    "open_store",
    "read_candidates",
    "to_pairs",
    "to_rankings",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dpo_keras.feedback' has no attribute {name!r}")
