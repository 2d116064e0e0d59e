"""An export from Keras on JAX, by a process whose Keras runs on TensorFlow, as SavedModels need.

`python -m dpo_keras.serving.tensorflow_process FOLDER` is that process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.keras_internals import all_layers

_MODEL, _REQUEST, _RESULT = "model.keras", "request.pickle", "result.pickle"
_STAGE = "stage: "  # before each line that the process says to the one that started it


def export_on_tensorflow(
    model: keras.Model,
    path: str | Path,
    options: Mapping[str, Any],
    on_stage: Callable[[str], None] | None = None,
) -> Any:
    """Save a model and let a process on TensorFlow export it; see `saved_model.export`."""
    if not isinstance(model, keras.Model):
        rule = f"must be a DPOModel or a keras.Model, got {type(model).__name__}"
        raise InputError(InputProblem("model", rule))
    beside = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    policy = getattr(model, "policy", model)
    # What was trained here may be of classes of the user's, which loading has to know.
    kinds = [type(part) for part in (model, policy, *all_layers(policy))]
    modules = sorted({kind.__module__ for kind in kinds} - {"__main__"})
    with tempfile.TemporaryDirectory(prefix=".dpo-keras-export-", dir=beside) as folder:
        try:
            request = pickle.dumps({"path": path, "modules": modules, "options": options})
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            rule = f"cannot be handed to the process that exports on TensorFlow ({error})"
            hint = "Define its class in a module, or export with KERAS_BACKEND=tensorflow."
            raise InputError(InputProblem("preprocessor", rule, hint=hint)) from error
        Path(folder, _REQUEST).write_bytes(request)
        model.save(Path(folder, _MODEL))
        said = _run(folder, on_stage or (lambda name: None))
        result = Path(folder, _RESULT)
        found = pickle.loads(result.read_bytes()) if result.is_file() else RuntimeError(said)
    if isinstance(found, Exception):
        raise found
    return found


def _run(folder: str, on_stage: Callable[[str], None]) -> str:
    """Run the process; return the last that it said beside its stages."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # JAX holds the GPUs' memory
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "dpo_keras.serving.tensorflow_process", folder]
    last = "the process that exports on TensorFlow ended without a word"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_STAGE):
                on_stage(line.removeprefix(_STAGE).rstrip("\n"))
            elif line.strip():
                last = line.strip()
    return last


def main(folder: str) -> None:
    """Export the model in a folder as the request in it says, and leave the result there."""
    from dpo_keras.serving import export

    request = pickle.loads(Path(folder, _REQUEST).read_bytes())
    try:
        for module in request["modules"]:
            importlib.import_module(module)
        model = keras.saving.load_model(Path(folder, _MODEL))
        found: Any = export(
            model,
            request["path"],
            on_stage=lambda name: print(f"{_STAGE}{name}", flush=True),
            **request["options"],
        )
    except Exception as error:
        # Not every error of TensorFlow can be handed over.
        found = error if isinstance(error, InputError | OSError) else RuntimeError(str(error))
    Path(folder, _RESULT).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
