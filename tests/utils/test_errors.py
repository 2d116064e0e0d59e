"""Errors as data: the message, the parts that it carries, and their copies."""

import copy
import pickle

import pytest

from dpo_keras.errors import InputError, InputProblem


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (InputProblem("beta", "must be > 0", -1.0), "beta must be > 0, got -1.0."),
        (InputProblem("beta", "must be > 0"), "beta must be > 0."),
        (InputProblem("beta", "must be > 0", None), "beta must be > 0, got None."),
        (InputProblem("path", "is missing", hint="Give a file."), "path is missing. Give a file."),
        (InputProblem("", "The file is cut off."), "The file is cut off."),
    ],
)
def test_a_message_is_composed_of_its_parts_and_survives_copies(problem, message):
    for one in (problem, copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert one == message
        assert (one.argument, one.rule, one.hint) == (problem.argument, problem.rule, problem.hint)
        assert one.renamed("x").startswith("x ")


def test_an_error_holds_all_problems_plain_strings_included():
    error = InputError([InputProblem("beta", "must be > 0", 0), "The file is empty."])
    assert str(error) == "beta must be > 0, got 0.\nThe file is empty."
    assert [problem.argument for problem in error.problems] == ["beta", ""]
    assert pickle.loads(pickle.dumps(error)).problems[0].rule == "must be > 0"
