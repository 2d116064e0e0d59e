"""`fit` from Python: raw pairs are answered with how to make batches, and figures fit a line."""

import re

import numpy as np
import pytest
from tiny import pairs

from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair, read_preferences
from dpo_keras.training import DPOModel
from dpo_keras.training.fit_interface import ShortProgress, check_batches


@pytest.fixture(scope="module")
def model(dataset):
    from tiny import gpt2

    model = DPOModel(gpt2(num_layers=1))
    model.compile("sgd")
    return model


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
def test_raw_pairs_are_answered_with_the_call_that_makes_batches(model, tokenized, call):
    raw = read_preferences(pairs(3))
    for given in (raw, pairs(3), [PreferencePair(**pairs(1)[0])], tokenized, "pairs.jsonl"):
        with pytest.raises(InputError, match=r"x must be batches, got .*preference_dataset\(pairs"):
            getattr(model, call)(given)


def test_raw_validation_pairs_are_named_as_such(model, dataset):
    with pytest.raises(InputError, match="validation_data must be batches, got Preferences"):
        model.fit(dataset, validation_data=read_preferences(pairs(3)))


def test_a_dataset_of_other_tensors_is_refused(dataset):
    check_batches(dataset)
    with pytest.raises(InputError, match="must be batches of tokens, got a dataset of prompt"):
        check_batches(dataset.map(lambda batch: {"prompt": batch["token_ids"]}))


@pytest.mark.parametrize("verbose", [1, 2])
@pytest.mark.parametrize("columns", [80, 200])
def test_the_figures_of_an_epoch_fit_a_line(model, dataset, capsys, monkeypatch, verbose, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    history = model.fit(dataset, validation_data=dataset, epochs=1, verbose=verbose).history
    printed = capsys.readouterr().out
    plain = re.sub("\x1b\\[[0-9;]*m|\b", "", printed)  # without colours and steps back
    lines = [line for line in re.split("[\r\n]+", plain) if line.strip()]
    assert lines and max(map(len, lines)) <= columns
    assert "loss" in lines[-1] and {"chosen_logps", "val_loss", "kl"} <= history.keys()
    if verbose == 2:
        assert len(lines) == 1 and "accuracy" in lines[0] and "val_accuracy" in lines[0]
        assert ("kl" in lines[0]) == (columns == 200)


def test_evaluate_shows_its_figures_in_a_line_too(model, dataset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = model.evaluate(dataset, verbose=2, return_dict=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 80 and f"loss {found['loss']:.3g}" in line and "chosen_logps" in found


def test_a_progress_bar_of_the_users_own_stands_alone(model, dataset, capsys):
    class Own(ShortProgress):
        pass

    model.fit(dataset, verbose=2, callbacks=[Own()])
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert np.isfinite(model.evaluate(dataset, verbose=0)[0])
