"""tf-keras comes in when its users ask for it, and never before."""

import json
import os
import subprocess
import sys

import pytest


def run(code, **environment):
    environment = {**os.environ, **environment}
    environment.pop("TF_USE_LEGACY_KERAS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_package_never_imports_tf_keras_nor_makes_it_tensorflows_keras():
    code = """
import json, os, sys
import dpo_keras, dpo_keras.app.runs, dpo_keras.legacy
for name in dpo_keras.__all__:
    getattr(dpo_keras, name)
before = "tf_keras" in sys.modules
dpo_keras.legacy.DPOModel
import tensorflow as tf
print(json.dumps([before, "tf_keras" in sys.modules, os.environ.get("TF_USE_LEGACY_KERAS"),
                  tf.keras.Model.__module__.partition(".")[0]]))
"""
    assert run(code) == [False, True, None, "keras"]


@pytest.mark.parametrize("name", ["DPOModel", "SupervisedModel", "worker_batches"])
def test_without_tf_keras_the_message_says_what_to_install(name, monkeypatch):
    from dpo_keras import legacy
    from dpo_keras.errors import InputError

    loaded = [m for m in sys.modules if m.partition(".")[0] == "tf_keras"]
    for module in [*loaded, *(m for m in sys.modules if m.startswith("dpo_keras.legacy."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(InputError, match=r'pip install "dpo-keras\[legacy\]"'):
        getattr(legacy, name)
