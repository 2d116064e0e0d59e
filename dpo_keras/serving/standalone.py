"""Loads a SavedModel as a server would: with TensorFlow and the ops of tensorflow_text, no more.

Run as a script (`python -I standalone.py < request.json`) in a process of its own, in which Keras,
KerasHub and this package cannot be imported. It reads `{"path", "calls": [{"signature", "inputs"}],
"operations"}` and writes `{"outputs", "signatures", "custom_operations"}` as its last line.
"""

import json
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FORBIDDEN = ("keras", "keras_hub", "tf_keras", "dpo_keras")


class Hidden(PathFinder):
    """Finds installed packages, but none that a server lacks."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """As ever, and nothing for forbidden packages."""
        if name.partition(".")[0] in FORBIDDEN:
            return None
        return super().find_spec(name, path, target)


def _shapes(specifications: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"shape": spec.shape.as_list(), "dtype": spec.dtype.name}
        for name, spec in specifications.items()
    }


def _plain(tensor: Any) -> list[Any]:
    values = tensor.numpy().tolist()
    return [v.decode("utf-8") if isinstance(v, bytes) else v for v in values]


def main() -> None:
    """Answers the request on standard input."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # TensorFlow imports Keras by itself where Keras is installed.
    sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
    request = json.load(sys.stdin)

    import tensorflow as tf

    # The ops of tensorflow_text, as they are linked into a server; its Python package wants Keras.
    text = find_spec("tensorflow_text")
    assert text is not None and text.origin is not None
    for library in sorted(Path(text.origin).parent.glob("python/ops/_*.so")):
        tf.load_op_library(str(library))

    loaded = tf.saved_model.load(request["path"])
    outputs = []
    for call in request["calls"]:
        inputs = {name: tf.constant(texts) for name, texts in call["inputs"].items()}
        found = loaded.signatures[call["signature"]](**inputs)
        outputs.append({name: _plain(tensor) for name, tensor in found.items()})
    found = {
        "outputs": outputs,
        "signatures": {
            name: {
                "inputs": _shapes(function.structured_input_signature[1]),
                "outputs": _shapes(function.structured_outputs),
            }
            for name, function in loaded.signatures.items()
        },
        "custom_operations": [
            name for name in request["operations"] if not hasattr(tf.raw_ops, name)
        ],
    }
    imported = sorted(name for name in FORBIDDEN if name in sys.modules)
    if imported:
        raise SystemExit(f"{', '.join(imported)} came in while the model was loaded")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
