"""Log-probs of responses under a policy, and under what it is compared with."""

from dpo_keras.scoring.chunked_log_probs import token_log_probs
from dpo_keras.scoring.head import LanguageModelHead
from dpo_keras.scoring.offline_scoring import response_log_probs, score_pairs
from dpo_keras.scoring.reference_cache import cache_key, cache_reference, weights_fingerprint
from dpo_keras.scoring.references import (
    REFERENCES,
    Reference,
    check_same_vocabulary,
    make_reference,
    vocabulary_size,
)
from dpo_keras.scoring.scorer import ResponseScorer, split_backbone_and_head

__all__ = [
    "REFERENCES",
    "LanguageModelHead",
    "Reference",
    "ResponseScorer",
    "cache_key",
    "cache_reference",
    "check_same_vocabulary",
    "make_reference",
    "response_log_probs",
    "score_pairs",
    "split_backbone_and_head",
    "token_log_probs",
    "vocabulary_size",
    "weights_fingerprint",
]
