"""A trained policy as a SavedModel: strings in, log-probs, preferences and text out.

`export` writes and verifies it. Inside: the tokenizer as TensorFlow ops (`graph_tokenizers`,
`byte_pair`, `turns`), strings to batches (`graph_encoder`), generation (`decoding`), the
signatures, the check in a process without Keras (`verification`, `standalone`, `comparison`), and
warm-up requests.
"""

from dpo_keras.serving.answer_comparison import EXAMPLES
from dpo_keras.serving.model_versions import next_version, version_path
from dpo_keras.serving.saved_model import SIGNATURES, ExportReport, export
from dpo_keras.serving.verification import GraphFindings, inspect_graph, run_standalone

__all__ = [
    "EXAMPLES",
    "SIGNATURES",
    "ExportReport",
    "GraphFindings",
    "export",
    "inspect_graph",
    "next_version",
    "run_standalone",
    "version_path",
]
