"""Loads a SavedModel as a server would: with TensorFlow and the ops of tensorflow_text, no more.

Run it as a script (`python -I standalone.py < request.json`) in a process of its own, in which
Keras, KerasHub and this package cannot be imported. After its own imports it reads
`{"path", "calls": [{"signature", "inputs"}], "operations"}` and prints
`{"outputs", "signatures", "custom_operations"}` as its last line.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

FORBIDDEN = ("keras", "keras_hub", "tf_keras", "dpo_keras", "jax")


class Hidden(PathFinder):
    """Finds installed packages, except those that a server lacks."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module as usual, and none of the forbidden packages."""
        if name.partition(".")[0] in FORBIDDEN:
            return None
        return super().find_spec(name, path, target)


def main() -> None:
    """Answer the request on standard input."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # TensorFlow imports Keras and JAX by itself where they are installed.
    sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]

    import tensorflow as tf

    # A server links the ops of tensorflow_text; the Python package around them imports Keras.
    text = find_spec("tensorflow_text")
    assert text is not None and text.origin is not None
    for library in sorted(Path(text.origin).parent.glob("python/ops/_*.so")):
        tf.load_op_library(str(library))

    request = json.load(sys.stdin)

    def values(tensor: tf.Tensor) -> list[str | int | float | bool]:
        return [v.decode("utf-8") if isinstance(v, bytes) else v for v in tensor.numpy().tolist()]

    def shapes(specifications: Mapping[str, tf.TensorSpec]) -> dict[str, dict[str, object]]:
        return {
            name: {"shape": spec.shape.as_list(), "dtype": spec.dtype.name}
            for name, spec in specifications.items()
        }

    loaded = tf.saved_model.load(request["path"])
    outputs: list[dict[str, object]] = [{} for _ in request["calls"]]

    def ask(signature: str) -> None:
        for number, call in enumerate(request["calls"]):
            if call["signature"] == signature:
                inputs = {name: tf.constant(texts) for name, texts in call["inputs"].items()}
                found = loaded.signatures[signature](**inputs)
                outputs[number] = {name: values(tensor) for name, tensor in found.items()}

    # The first call of a signature takes long: TensorFlow optimizes its graph.
    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, {call["signature"]: None for call in request["calls"]}))
    answer = {
        "outputs": outputs,
        "signatures": {
            name: {
                "inputs": shapes(function.structured_input_signature[1]),
                "outputs": shapes(function.structured_outputs),
            }
            for name, function in loaded.signatures.items()
        },
        "custom_operations": [op for op in request["operations"] if not hasattr(tf.raw_ops, op)],
    }
    imported = sorted(name for name in FORBIDDEN if name in sys.modules)
    if imported:
        raise SystemExit(f"{', '.join(imported)} came in while the model was loaded")
    print(json.dumps(answer), flush=True)
    os._exit(0)  # TensorFlow takes a second to clear its memory away


if __name__ == "__main__":
    main()
