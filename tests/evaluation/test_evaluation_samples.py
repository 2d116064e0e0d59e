"""What a policy writes, judged and counted."""

import dataclasses

import keras
import pytest
from tiny import VOCABULARY, Letters

from dpo_keras.errors import InputError
from dpo_keras.evaluation import Samples, sample_and_judge, side_by_side
from dpo_keras.preferences import judge, support_pairs

B = Letters().tokenize(["b"])[0][0]


@pytest.fixture(scope="session")
def writer():
    """Writes "b" after "a", the end after "b", and "a" after anything else."""
    ids = {name: keras.Input((None,), dtype="int32", name=name) for name in _INPUTS}
    after = [B - 1] * VOCABULARY
    after[B - 1], after[B] = B, Letters.end_token_id
    table = keras.layers.Embedding(VOCABULARY, VOCABULARY, trainable=False)
    model = keras.Model(ids, table(ids["token_ids"]))
    table.set_weights([99.0 * keras.ops.convert_to_numpy(keras.ops.one_hot(after, VOCABULARY))])
    return model


_INPUTS = ("token_ids", "padding_mask")


@dataclasses.dataclass(frozen=True)
class Verdict:
    short: bool
    score: float = 0.0

    @property
    def preferred(self):
        return self.short


def draw(writer, prompts, judge=None, **options):
    options = {"max_new_tokens": 4, "temperature": 0, "preprocessor": Letters(), **options}
    return sample_and_judge(writer, prompts, judge, **options)


def test_responses_are_counted_by_hand(writer):
    found = draw(writer, ["x", "a", "x", "b"])
    assert [record["response"] for record in found.records] == ["ab", "b", "ab", ""]
    assert [record["tokens"] for record in found.records] == [2, 1, 2, 0]
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values == {
        "tokens": 1.25,
        "distinct_1": 2 / 5,
        "distinct_2": 1 / 2,
        "distinct_responses": 3 / 4,
        "empty": 1 / 4,
        "ended": 1.0,
    }


def test_responses_that_reach_the_limit_did_not_end(writer):
    found = draw(writer, ["x", "a"], max_new_tokens=1)
    assert [record["ended"] for record in found.records] == [False, False]
    assert found.figures["ended"].value == 0.0
    assert found.figures["distinct_2"].reason == "no response has 2 tokens"


def test_a_judges_verdict_and_its_parts_become_shares(writer):
    found = draw(writer, ["x", "a"], lambda prompt, response: Verdict(len(response) == 1))
    assert found.records[1]["verdict"] == {"preferred": True, "short": True}
    assert found.figures["preferred"].value == found.figures["short"].value == 0.5
    assert "score" not in found.figures


def test_the_judge_sees_questions_and_the_policy_prompts(writer):
    seen = []
    found = draw(
        writer,
        ["<x>", "<a"],
        lambda *texts: seen.append(texts) or True,
        questions=["x?", "a?"],
    )
    assert seen == [("x?", "ab"), ("a?", "b")]
    assert found.prompts == ["x?", "a?"]


def test_the_bundled_judge_serves(writer):
    found = draw(writer, [pair.prompt for pair in support_pairs(2)], judge)
    shares = {"preferred", "courteous", "answers", "invents_nothing", "parses"}
    assert shares <= set(found.figures)
    assert found.figures["preferred"].value == 0.0


def test_no_prompts_give_no_responses(writer):
    found = draw(writer, [])
    assert len(found) == 0
    assert found.figures["tokens"].reason == "there is no response"


def test_wrong_judges_and_questions_are_refused(writer):
    with pytest.raises(InputError, match="judge must return a bool"):
        draw(writer, ["a"], lambda prompt, response: "yes")
    with pytest.raises(InputError, match="got 1 for 2 prompts"):
        draw(writer, ["a", "b"], questions=["a"])
    with pytest.raises(InputError, match="Where prompts are token ids, give both"):
        draw(writer, [[1, 5]])


def test_saving_and_loading_gives_the_same(writer, tmp_path):
    given = draw(writer, ["x", "é\u2028"], lambda prompt, response: True)
    given.save(tmp_path / "samples.json")
    assert Samples.load(tmp_path / "samples.json").as_dict() == given.as_dict()
    with pytest.raises(InputError, match="There is no file"):
        Samples.load(tmp_path / "nothing.json")
    for text in ("{", "[]", "{}"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(InputError, match="does not hold samples"):
            Samples.load(tmp_path / "other.json")


def test_side_by_side_shows_the_first_responses_to_the_same_prompts(writer):
    before = draw(writer, ["x", "a"], max_new_tokens=1)
    after = draw(writer, ["x", "a"], lambda prompt, response: response == "b")
    rows = side_by_side(before, after, count=1)
    assert rows == [
        {
            "prompt": "x",
            "before": "a",
            "before_preferred": None,
            "after": "ab",
            "after_preferred": False,
        }
    ]
    assert "before" not in side_by_side(draw(writer, ["a", "x"]), after)[0]
