"""Arguments of an export that cannot be are refused, and say what to do."""

import pytest
import serving_tiny

from dpo_keras.errors import InputError
from dpo_keras.serving import export


def test_all_faults_of_the_arguments_are_named_together(model, tmp_path):
    with pytest.raises(InputError) as caught:
        export(
            model,
            tmp_path / "x",
            max_length=65,  # the model has 64 positions
            max_new_tokens=0,
            temperature=-1.0,
            top_p=1.5,
            template="chatlm",
            signatures=["rank"],
        )
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    for part in ("64 positions", "got 65", "got 0", "got -1.0", "got 1.5", "chatlm", "rank"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"signatures": ("score", "rank")}, "must be some of score, prefer, generate"),
        ({"signatures": ()}, "must be some of"),
        ({"max_new_tokens": 63}, "leave room for a prompt"),
        ({"top_p": 0.5}, "no effect at temperature=0"),
        ({"template": "chatlm"}, "did you mean 'chatml'"),
    ],
)
def test_each_wrong_argument_says_what_to_do(model, tmp_path, arguments, says):
    with pytest.raises(InputError, match=says):
        export(model, tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_what_is_no_model_or_has_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="got str"):
        export("policy", tmp_path / "x")
    with pytest.raises(InputError, match="preprocessor is needed"):
        export(serving_tiny.plain(10), tmp_path / "x")
