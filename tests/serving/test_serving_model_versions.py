"""Warm-up requests are messages that TensorFlow Serving reads."""

from serving_messages import serving_messages, texts_of

from dpo_keras.serving.model_versions import prediction_log


def test_a_request_parses_as_a_prediction_log_of_tensorflow_serving():
    inputs = {"prompt": ["Hello", "naïve 🙂"], "response": ["a", ""]}
    log = serving_messages().FromString(prediction_log("support", "score", inputs))
    request = log.predict_log.request
    assert request.model_spec.name == "support"
    assert request.model_spec.signature_name == "score"
    assert {name: texts_of(value) for name, value in request.inputs.items()} == inputs
    assert not request.output_filter
