"""A trained policy as a SavedModel: strings in, log-probs, preferences and text out.

`export` writes and verifies it. Read `signatures` first: what a served model answers. The tokenizer
runs in the graph (`graph_encoder`, `graph_tokenizers`, `word_patterns`, `graph_templates`), and
`verification` checks an export, in a process without Keras (`standalone_process`, `standalone`).
"""

from dpo_keras.serving.model_card import ModelFacts
from dpo_keras.serving.model_versions import next_version, version_path
from dpo_keras.serving.pretrained import FORMATS, save_pretrained
from dpo_keras.serving.saved_model import ExportReport, export
from dpo_keras.serving.signatures import SIGNATURES
from dpo_keras.serving.standalone_process import run_standalone
from dpo_keras.serving.verification import EXAMPLES, GraphFindings, inspect_graph

__all__ = [
    "EXAMPLES",
    "FORMATS",
    "SIGNATURES",
    "ExportReport",
    "GraphFindings",
    "ModelFacts",
    "export",
    "inspect_graph",
    "next_version",
    "run_standalone",
    "save_pretrained",
    "version_path",
]
