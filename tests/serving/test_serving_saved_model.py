"""Exports as a server and its client meet them."""

import json
import shutil
from concurrent.futures import Future

import numpy as np
import pytest
import serving_tiny
import tensorflow as tf
from serving_messages import serving_messages, texts_of
from tensorflow.core.protobuf import saved_model_pb2

from dpo_keras.batching import batch_from_strings
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring import response_log_probs
from dpo_keras.serving import (
    export,
    inspect_graph,
    next_version,
    run_standalone,
    version_path,
)
from dpo_keras.serving.model_versions import WARMUP_REQUESTS
from dpo_keras.serving.standalone_process import StandaloneProcess
from dpo_keras.training import DPOModel

PROMPTS = ["Hello, how are you?", "a", "12345 " * 40]
FIRST = ["I am fine, thanks.", "The quick brown fox", "x " * 40]
SECOND = ["No.", "lazy dog", "naïve café 🙂"]


def ask(signature, **texts):
    found = signature(**{name: tf.constant(values) for name, values in texts.items()})
    return {name: value.numpy() for name, value in found.items()}


def test_the_export_was_verified_without_keras_to_a_ten_thousandth(report):
    assert report.verified
    assert set(report.differences) >= {
        "score.log_prob",
        "score.tokens",
        "score.reward",
        "prefer.probability_a",
        "prefer.probability_b",
        "prefer.llr",
        "generate.text",
    }
    assert max(report.differences.values()) < 1e-4
    assert len(report.answers["generate"]["text"]) == 3
    assert report.model_name == "support" and report.version == 3
    assert "Verified" in report.summary()
    assert json.loads(json.dumps(report.as_dict()))["version"] == 3


def test_every_input_and_output_has_its_name_and_the_batch_first(signatures):
    shapes = {
        name: (
            {key: spec.shape.as_list() for key, spec in f.structured_input_signature[1].items()},
            {key: (s.shape.as_list(), s.dtype.name) for key, s in f.structured_outputs.items()},
        )
        for name, f in signatures.items()
    }
    score = (
        {"prompt": [None], "response": [None]},
        {
            "log_prob": ([None], "float32"),
            "reward": ([None], "float32"),
            "tokens": ([None], "int32"),
        },
    )
    assert shapes == {
        "score": score,
        "serving_default": score,
        "prefer": (
            {"prompt": [None], "response_a": [None], "response_b": [None]},
            {key: ([None], "float32") for key in ("probability_a", "probability_b", "llr")},
        ),
        "generate": (
            {"prompt": [None]},
            {
                "text": ([None], "string"),
                "tokens": ([None], "int32"),
                "finished": ([None], "bool"),
            },
        ),
    }


@pytest.mark.slow
def test_score_is_the_log_prob_and_beta_times_the_log_ratio(signatures, model, gpt2):
    found = ask(signatures["score"], prompt=PROMPTS, response=FIRST)
    log_probs, lengths = response_log_probs(gpt2, PROMPTS, FIRST, max_length=48)
    np.testing.assert_allclose(found["log_prob"], log_probs, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found["tokens"], lengths)
    batch = batch_from_strings(gpt2.preprocessor, PROMPTS, FIRST, max_length=48)
    ratio = (model.policy_logps(batch) - model.reference_logps(batch))[:, 0]
    np.testing.assert_allclose(found["reward"], 0.3 * ratio, rtol=1e-4, atol=1e-4)
    assert np.abs(found["reward"]).min() > 1e-3


def test_prefer_is_the_softmax_of_the_rewards(signatures):
    found = ask(signatures["prefer"], prompt=PROMPTS, response_a=FIRST, response_b=SECOND)
    np.testing.assert_allclose(found["probability_a"], 1 / (1 + np.exp(-found["llr"])), rtol=1e-5)
    np.testing.assert_allclose(found["probability_a"] + found["probability_b"], 1, rtol=1e-6)
    turned = ask(signatures["prefer"], prompt=PROMPTS, response_a=SECOND, response_b=FIRST)
    np.testing.assert_allclose(turned["llr"], -found["llr"], rtol=1e-4, atol=1e-5)
    # Nothing is truncated in these two, so the responses can be scored one by one.
    rewards = [
        ask(signatures["score"], prompt=PROMPTS[:2], response=texts[:2])["reward"]
        for texts in (FIRST, SECOND)
    ]
    np.testing.assert_allclose(found["llr"][:2], rewards[0] - rewards[1], rtol=1e-4, atol=1e-5)


def test_empty_texts_get_finite_answers(signatures):
    found = ask(signatures["score"], prompt=["", "a", ""], response=["", "", "b"])
    assert np.isfinite(found["log_prob"]).all() and np.isfinite(found["reward"]).all()
    # The end token of an empty response is still a prediction.
    assert found["tokens"].tolist()[:2] == [1, 1]
    same = ask(signatures["prefer"], prompt=[""], response_a=[""], response_b=[""])
    np.testing.assert_allclose(same["probability_a"], 0.5)
    assert len(ask(signatures["generate"], prompt=["", "a"])["text"]) == 2


def test_a_row_does_not_depend_on_the_others_of_its_batch(signatures):
    together = ask(signatures["score"], prompt=PROMPTS, response=FIRST)
    for row in range(3):
        alone = ask(signatures["score"], prompt=PROMPTS[row : row + 1], response=[FIRST[row]])
        np.testing.assert_allclose(alone["reward"], together["reward"][row], rtol=1e-4, atol=1e-5)


def test_unequal_numbers_of_texts_are_an_error_of_the_request(signatures):
    with pytest.raises(tf.errors.InvalidArgumentError, match="as many"):
        ask(signatures["score"], prompt=["a", "b"], response=["c"])


def test_words_served_leave_nothing_behind(report):
    operations = inspect_graph(report.path).operations
    assert not [op for op in operations if "Insert" in op or "MutableHashTable" in op]
    assert not [op for op in operations if op.startswith("Xla") or "PyFunc" in op]


def test_the_tokenizer_is_in_the_graph_once(report):
    saved = saved_model_pb2.SavedModel.FromString((report.path / "saved_model.pb").read_bytes())
    functions = saved.meta_graphs[0].graph_def.library.function
    tokenizers = [f for f in functions if "_tokenize_" in f.signature.name]
    assert len(tokenizers) == 1
    # It was 1,723 operations; the shapes of ragged tensors took most of them.
    assert len(tokenizers[0].node_def) < 600


@pytest.mark.slow
def test_it_runs_on_another_machine(report, tmp_path):
    """Nothing outside the directory is needed: no asset, no path of the exporting machine."""
    moved = tmp_path / "elsewhere" / "7"
    shutil.copytree(report.path, moved)
    calls = [("generate", {"prompt": ["Hello, how are you?"]})]
    found = run_standalone(
        moved, [*calls, ("serving_default", {"prompt": ["a"], "response": ["b"]})]
    )
    assert found["outputs"][0]["text"] == report.answers["generate"]["text"][:1]
    assert set(found["outputs"][1]) == {"log_prob", "reward", "tokens"}
    assert found["custom_operations"] == []


def test_what_was_fixed_at_export_is_written_down(report):
    settings = json.loads((report.path / "assets.extra" / "dpo_keras.json").read_text())
    assert settings["max_length"] == 48 and settings["max_new_tokens"] == 8
    assert settings["temperature"] == 0.0 and settings["template"] is None
    assert settings["versions"]["tensorflow"] == tf.__version__


def test_an_export_holds_a_request_for_each_of_its_signatures(report, signatures):
    records = list(tf.data.TFRecordDataset(str(report.path / WARMUP_REQUESTS)).as_numpy_iterator())
    logs = [serving_messages().FromString(record) for record in records]
    specifications = [log.predict_log.request.model_spec for log in logs]
    assert [spec.signature_name for spec in specifications] == ["score", "prefer", "generate"]
    assert {spec.name for spec in specifications} == {"support"}
    for log in logs:
        request = log.predict_log.request
        given = {name: tf.constant(texts_of(value)) for name, value in request.inputs.items()}
        assert signatures[request.model_spec.signature_name](**given)


@pytest.mark.slow
def test_adapters_and_a_template_are_served(tmp_path):
    policy = serving_tiny.gemma3()
    policy.backbone.enable_lora(4)
    model = DPOModel(policy, reference="adapters_off")
    model.compile(optimizer="sgd", loss=DPOLoss("sigmoid", beta=0.5))
    for variable in policy.trainable_variables:
        variable.assign_add(tf.random.stateless_normal(variable.shape, [0, 1], stddev=0.1))
    report = export(model, tmp_path / "adapted", max_new_tokens=6, template="gemma")
    assert report.path == tmp_path / "adapted" / "1"
    assert report.verified and max(report.differences.values()) < 1e-4
    assert report.custom_operations == (
        "SentencepieceDetokenizeOp",
        "SentencepieceOp",
        "SentencepieceTokenizeOp",
    )
    assert min(map(abs, report.answers["score"]["reward"])) > 1e-3


@pytest.mark.slow
def test_a_policy_alone_has_no_reward_and_says_so(llama, tmp_path):
    path = tmp_path / "alone" / "1"
    report = export(llama, path, max_new_tokens=4, temperature=0.8, top_p=0.9)
    assert set(report.signatures) == {"score", "generate"}
    assert report.signatures["score"]["outputs"] == ["log_prob", "tokens"]
    assert "DPOModel" in report.notes[0] and report.notes[0] in report.summary()
    # What is drawn afresh cannot be compared.
    assert set(report.differences) == {"score.log_prob", "score.tokens"}
    assert len(report.answers["generate"]["text"]) == 3
    loaded = tf.saved_model.load(str(report.path)).signatures
    found = ask(loaded["score"], prompt=["Hello"], response=["I am fine"])
    expected, _ = response_log_probs(llama, ["Hello"], ["I am fine"])
    np.testing.assert_allclose(found["log_prob"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("reference", "loss", "rewards"),
    [("cached", "sigmoid", False), ("none", "simpo", True), ("cached", "ipo", False)],
)
def test_rewards_are_served_where_they_can_be_computed_from_new_texts(
    llama, reference, loss, rewards, tmp_path
):
    model = DPOModel(llama, reference=reference)
    model.compile(optimizer="sgd", loss=DPOLoss(loss))
    report = export(model, tmp_path / "some", signatures=("score", "prefer"), verify=False)
    assert ("prefer" in report.signatures) is rewards
    assert ("reward" in report.signatures["score"]["outputs"]) is rewards
    assert bool(report.notes) is not rewards
    if not rewards:
        with pytest.raises(InputError, match="leave nothing"):
            export(model, tmp_path / "none", signatures=("prefer",), verify=False)


@pytest.mark.slow
def test_a_model_of_the_users_own_is_served(llama, tmp_path):
    preprocessor = llama.preprocessor
    policy = serving_tiny.plain(preprocessor.tokenizer.vocabulary_size())
    model = DPOModel(policy)
    model.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    report = export(
        model, tmp_path / "own", preprocessor=preprocessor, max_new_tokens=4, verify=False
    )
    found = tf.saved_model.load(str(report.path)).signatures["prefer"]
    # Its reference is what it is now.
    answer = ask(found, prompt=["a"], response_a=["b c"], response_b=["d"])
    np.testing.assert_allclose(answer["llr"], 0, atol=1e-6)


# -- arguments -----------------------------------------------------------------------------------


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


# -- where it is written -------------------------------------------------------------------------


def test_versions_are_counted_and_never_overwritten(report, model, tmp_path):
    folder = report.path.parent
    assert next_version(folder) == 4
    assert version_path(folder) == folder / "4"
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=f"next free one is {folder / '4'}"):
        export(model, report.path)
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "10").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    assert next_version(tmp_path) == 11
    assert version_path(tmp_path / "new" / "0012").name == "0012"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(InputError, match="is a file"):
        version_path(tmp_path / "model" / "1")


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (OSError(28, "No space left on device"), OSError, "No space left.*nothing was left"),
        (
            tf.errors.ResourceExhaustedError(None, None, "disk full"),
            OSError,
            "disk full.*nothing was left",
        ),
        (RuntimeError("wrong"), RuntimeError, "wrong"),
    ],
)
def test_a_failed_export_leaves_nothing(llama, tmp_path, monkeypatch, fault, error, says):
    def half(module, path, signatures):
        tf.io.gfile.makedirs(path)
        tf.io.gfile.GFile(f"{path}/saved_model.pb", "w").write("half of it")
        raise fault

    monkeypatch.setattr(tf.saved_model, "save", half)
    with pytest.raises(error, match=says):
        export(llama, tmp_path / "full" / "1", signatures=("score",))
    assert list((tmp_path / "full").iterdir()) == []


def test_an_export_that_answers_wrongly_is_not_kept(llama, tmp_path, monkeypatch):
    def altered(process, path, calls):
        rows = len(calls[0][1]["prompt"])
        blank = len(calls[1][1]["prompt"])
        score = {"log_prob": [-1.0] * rows, "tokens": [1] * rows}
        answer = Future()
        outputs = [score, {"log_prob": [0.0] * blank}]
        answer.set_result({"outputs": outputs, "custom_operations": []})
        return answer

    monkeypatch.setattr(StandaloneProcess, "ask", altered)
    with pytest.raises(RuntimeError, match="answers otherwise than the model in Python: score"):
        export(llama, tmp_path / "wrong" / "1", signatures=("score",))
    assert not (tmp_path / "wrong" / "1").exists()
