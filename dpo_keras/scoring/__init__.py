"""Log-probs of responses under a policy and under its reference."""

from dpo_keras.scoring.adapter_targets import enable_lora
from dpo_keras.scoring.chunked_log_probs import token_log_probs
from dpo_keras.scoring.dataset_scoring import cache_reference, response_log_probs, score_pairs
from dpo_keras.scoring.packing_check import check_packing, packing_obstacle
from dpo_keras.scoring.quantization import dequantized, quantize
from dpo_keras.scoring.references import Reference, check_same_vocabulary, make_reference
from dpo_keras.scoring.scorer import ResponseScorer

__all__ = [
    "Reference",
    "ResponseScorer",
    "cache_reference",
    "check_packing",
    "check_same_vocabulary",
    "dequantized",
    "enable_lora",
    "make_reference",
    "packing_obstacle",
    "quantize",
    "response_log_probs",
    "score_pairs",
    "token_log_probs",
]
