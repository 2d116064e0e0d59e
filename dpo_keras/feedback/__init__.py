"""People compare responses: candidates, the store, the page, how good the answers are, pairs.

    read_candidates   JSONL -> prompts with two or more responses, and who made each
    open_store        one SQLite file: pairs, presentations, an append-only log of judgements
    serve             the page, on the loopback
    assess            agreement, annotators, policies -> Quality
    to_pairs          judgements -> preference pairs for training

Nothing here imports TensorFlow.
"""

from dpo_keras.feedback.candidates import Candidates, Response, read_candidates
from dpo_keras.feedback.database import StoreError
from dpo_keras.feedback.judging import Conflict, Receipt
from dpo_keras.feedback.settings import Settings
from dpo_keras.feedback.store import Imported, Store, open_store

__all__ = [
    "Candidates",
    "Conflict",
    "Imported",
    "Receipt",
    "Response",
    "Settings",
    "Store",
    "StoreError",
    "open_store",
    "read_candidates",
]
