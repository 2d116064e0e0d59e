"""TensorFlow Datasets: the builder, and reading any preference set by its columns."""

from pathlib import Path

import numpy as np
import pytest
from hh_sample import write_hh_sample
from preferences_samples import every_kind, hh_lines, random_pairs, write_jsonl

from dpo_keras.errors import InputError
from dpo_keras.preferences import build_preferences, read_preferences, write_preferences
from dpo_keras.preferences.tfds_source import TfdsName, parse_name

tfds = pytest.importorskip("tensorflow_datasets")
from dpo_keras.preferences.tfds_builder import (  # noqa: E402
    PreferencePairs,
    PreferencePairsConfig,
)

FILES = {
    "jsonl": "a.jsonl",
    "jsonl_gz": "a.jsonl.gz",
    "csv": "a.csv",
    "parquet": "a.parquet",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same pairs in every format, and HH-style conversations."""
    path = tmp_path_factory.mktemp("manual")
    for name in FILES.values():
        write_preferences(random_pairs(12) if name.endswith("parquet") else every_kind(),
                          path / name)  # fmt: skip
    write_jsonl(path / "test.jsonl.gz", hh_lines(4))
    return path


class TestPreferencePairs(tfds.testing.DatasetBuilderTestCase):
    """What TensorFlow Datasets asks of every builder."""

    DATASET_CLASS = PreferencePairs
    BUILDER_CONFIG_NAMES_TO_TEST = ["jsonl", "csv"]
    SPLITS = {"train": 6}
    SKIP_CHECKSUMS = True

    @classmethod
    def setUpClass(cls):
        import tempfile

        cls.manual = tempfile.TemporaryDirectory()
        cls.EXAMPLE_DIR = cls.manual.name
        cls.dummy_data = Path(cls.manual.name)
        for name in ("a.jsonl", "a.csv"):
            write_preferences(every_kind(), cls.dummy_data / name)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.manual.cleanup()


def prepare(name, folder, data_dir):
    builder = tfds.builder(f"preference_pairs/{name}", data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config)


@pytest.mark.parametrize("name, split", [("jsonl_gz", "dev"), ("parquet", "train")])
def test_the_builder_gives_the_pairs_of_the_file_in_its_order(name, split, folder, tmp_path):
    source = folder
    if split == "dev":  # a folder is a split
        source = tmp_path / "manual"
        (source / split).mkdir(parents=True)
        (source / split / FILES[name]).write_bytes((folder / FILES[name]).read_bytes())
    prepare(name, source, tmp_path)
    pairs = read_preferences(f"tfds:preference_pairs/{name}:{split}", data_dir=tmp_path)
    assert list(pairs) == list(read_preferences(folder / FILES[name]))
    part = read_preferences(f"tfds:preference_pairs/{name}:{split}[:3]", data_dir=tmp_path)
    assert list(part) == list(pairs)[:3]


def test_conversations_with_implicit_prompts_are_those_of_the_file_reader(folder, tmp_path):
    prepare("hh", folder, tmp_path)
    pairs = read_preferences("tfds:preference_pairs/hh:test", data_dir=tmp_path)
    assert list(pairs) == list(read_preferences(folder / "test.jsonl.gz"))
    assert len(pairs) == 3 and pairs[0].prompt.endswith("Human: That.\n\nAssistant:")


def test_the_hh_sample_is_the_same_through_tfds_and_through_the_file_reader(tmp_path):
    sample = write_hh_sample(tmp_path / "sample.jsonl.gz", 700)
    config = PreferencePairsConfig(name="sample", files={"test": [str(sample)]})
    builder = tfds.builder("preference_pairs", config=config, data_dir=tmp_path)
    builder.download_and_prepare()
    pairs = read_preferences("tfds:preference_pairs/sample:test", data_dir=tmp_path)
    assert len(pairs) == 700 - 5  # broken lines
    assert list(pairs) == list(read_preferences(sample))


class QuestionAnswers(tfds.core.GeneratorBasedBuilder):
    """Somebody else's set: other names, messages, NumPy numbers."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("text", "chat")]

    def _info(self):
        features = tfds.features
        text = features.Text()
        if self.builder_config.name == "chat":
            text = features.Sequence({"role": features.Text(), "content": features.Text()})
        kinds = {
            "question": text,
            "good": text,
            "bad": text,
            "prompt": np.int64,
            "votes": np.float32,
        }
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(4):
            texts = {"question": f"q{number}", "good": "yes", "bad": "no"}
            if self.builder_config.name == "chat":
                roles = {"question": "user", "good": "assistant", "bad": "assistant"}
                texts = {k: [{"role": roles[k], "content": t}] for k, t in texts.items()}
            yield number, {**texts, "prompt": 7, "votes": 0.75}


COLUMNS = {"prompt": "question", "chosen": "good", "rejected": "bad", "preference": "votes"}


@pytest.mark.parametrize("name", ["text", "chat"])
def test_any_set_is_read_by_a_mapping_of_columns(name, tmp_path):
    pairs = read_preferences(f"tfds:question_answers/{name}", columns=COLUMNS, data_dir=tmp_path)
    assert len(pairs) == 4 and {pair.preference for pair in pairs} == {0.75}
    prompts = {pair.prompt if name == "text" else pair.prompt[0].content for pair in pairs}
    assert prompts == {f"q{n}" for n in range(4)}
    if name == "text":
        stored = build_preferences(
            "tfds:question_answers/text", tmp_path / "out", columns=COLUMNS, data_dir=tmp_path
        )
        assert list(stored) == list(pairs)


@pytest.mark.parametrize(
    "path",
    [
        "tfds:no_such_set_at_all:train",
        "tfds:preference_pairs/no_such_config",
        "tfds:question_answers/text:no_such_split",
        "tfds:preference_pairs/csv",
        "tfds:",
    ],
)
def test_a_name_that_leads_nowhere_is_one_message(path, tmp_path):
    with pytest.raises(InputError) as error:
        read_preferences(path, columns=COLUMNS, data_dir=tmp_path)
    (problem,) = error.value.problems
    assert path in problem


def test_a_folder_without_such_files_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no file for preference_pairs/csv"):
        PreferencePairs.builder_configs["csv"].splits(tmp_path)


def test_names_have_configuration_version_and_split():
    assert parse_name("tfds:a/b:1.0.0:test[:10%]") == TfdsName("a/b:1.0.0", "test[:10%]")
    assert parse_name("tfds:a") == TfdsName("a", "train")
