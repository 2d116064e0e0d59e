"""A version on disk is whole or absent, and its warm-up requests are messages of the server."""

import pytest
from serving_messages import serving_messages, texts_of

from dpo_keras.serving.model_versions import prediction_log, staged


def test_a_request_parses_as_a_prediction_log_of_tensorflow_serving():
    inputs = {"prompt": ["Hello", "naïve 🙂" * 50], "response": ["a", ""]}
    log = serving_messages().FromString(prediction_log("support", "score", inputs))
    request = log.predict_log.request
    assert request.model_spec.name == "support"
    assert request.model_spec.signature_name == "score"
    assert {name: texts_of(value) for name, value in request.inputs.items()} == inputs
    assert not request.output_filter


def test_a_version_that_appears_during_an_export_is_not_overwritten(tmp_path):
    target = tmp_path / "support" / "1"
    with pytest.raises(OSError, match="could not be written"), staged(target) as partial:
        partial.mkdir()
        target.mkdir()
        (target / "theirs").write_text("")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in target.parent.iterdir()] == ["1"]
