"""The public names are there, and reading preferences never waits for TensorFlow."""

import subprocess
import sys

import pytest

import dpo_keras

HEAVY = ("tensorflow", "keras", "keras_hub", "tf_keras", "matplotlib", "pyarrow")


@pytest.mark.parametrize("name", dpo_keras.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(dpo_keras, name)
    assert (value.__doc__ or "").strip()


def test_names_that_do_not_exist_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainer'"):
        _ = dpo_keras.DPOTrainer


def test_dir_lists_names_and_stages():
    assert {*dpo_keras.__all__, "losses", "serving"} <= set(dir(dpo_keras))


@pytest.mark.parametrize("module", ["dpo_keras", "dpo_keras.preferences", "dpo_keras.app.config"])
def test_light_imports_stay_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.slow
def test_losses_run_without_tensorflow_in_sight():
    code = (
        "import sys; import dpo_keras.losses; "
        "print([m for m in ('keras_hub', 'tf_keras') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
