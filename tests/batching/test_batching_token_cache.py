"""Tokens on disk: the batches of memory, made once, gone on with, never all read."""

import json

import numpy as np
import pytest

from dpo_keras.batching import preference_dataset, token_cache, tokenization, tokenize_pairs
from dpo_keras.batching.ragged import StoredRagged, TokenFile
from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair, build_preferences


class Letters:
    """One token per letter; counts the texts it has seen, and may break down after some."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    def __init__(self, most=None, shift=0):
        self.seen, self.most, self.shift = 0, most, shift

    def tokenize(self, texts):
        self.seen += len(texts)
        if self.most is not None and self.seen > self.most:
            raise KeyboardInterrupt
        return [[ord(letter) + self.shift for letter in text] for text in texts]


def some_pairs(count=150):
    draw = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        prompt = f"{draw.integers(60)}" + "p" * int(draw.integers(0, 30))
        chosen = "".join(draw.choice(list("abc"), draw.integers(2, 14)))
        # Every 20th response is the end token alone, and is dropped.
        rejected = "\x02" if number % 20 == 7 else "n" * int(draw.integers(1, 14))
        pairs.append(
            PreferencePair(
                prompt, chosen, rejected, float(draw.choice([0.5, 0.8, 1.0])),
                weight=float(number % 3), group=[None, "g2", "g1"][number % 3],
                margin=0.5 if number % 10 == 0 else None, id=f"id{number}",
            )
        )  # fmt: skip
    return pairs


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "pairs"
    return build_preferences(some_pairs(), folder, shard_bytes=5000)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenization, "PAIRS_AT_ONCE", 16)
    monkeypatch.setattr(token_cache, "COMMIT", 2)


def same_tokens(one, other):
    for name in ("prompt", "chosen", "rejected"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    for name in ("preference", "weight", "group", "margin", "source", "prompt_hash"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("pad", "group_names", "max_length"):
        assert getattr(one, name) == getattr(other, name)
    assert one.report.as_dict() == other.report.as_dict()


def same_batches(one, other):
    count = 0
    for a, b in zip(one.as_numpy_iterator(), other.as_numpy_iterator(), strict=True):
        count += 1
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert count > 3


@pytest.mark.parametrize("overlength", ["truncate", "drop"])
def test_tokens_on_disk_are_those_in_memory(stored, tmp_path, overlength):
    options = {"max_length": 24, "overlength": overlength}
    memory = tokenize_pairs(some_pairs(), Letters(), **options)
    disk = tokenize_pairs(stored, Letters(), **options, cache=tmp_path)
    assert (
        memory.report.dropped
        and memory.report.truncated_responses == disk.report.truncated_responses
    )
    same_tokens(disk, memory)
    np.testing.assert_array_equal(disk.prompt[-1], memory.prompt[-1])
    np.testing.assert_array_equal(disk.chosen.flat_values, memory.chosen.flat_values)
    np.testing.assert_array_equal(disk.chosen.row_splits, memory.chosen.row_splits)


@pytest.mark.parametrize("options", [{"buckets": 3}, {"batching": "packed", "row_length": 96}])
def test_batches_from_disk_are_those_from_memory_from_any_step_on(stored, tmp_path, options):
    memory = tokenize_pairs(some_pairs(), Letters(), max_length=24)
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    for start in (0, 13):
        given = {"batch_size": 8, "seed": 5, "epochs": 2, "start_step": start, **options}
        same_batches(preference_dataset(disk, **given), preference_dataset(memory, **given))


def test_each_side_of_a_split_finds_its_own_tokens(stored, tmp_path):
    encoder = Letters()
    for side in stored.split(0.3, seed=1):
        disk = tokenize_pairs(side, encoder, max_length=24, cache=tmp_path)
        memory = tokenize_pairs(list(side), Letters(), max_length=24)
        same_tokens(disk, memory)
        assert [side[int(i)].id for i in disk.source] == [list(side)[i].id for i in memory.source]
    assert len(list(tmp_path.iterdir())) == 1


def test_tokens_are_made_once_for_each_tokenizer_length_and_data(stored, tmp_path):
    first = Letters()
    one = tokenize_pairs(stored, first, max_length=24, cache=tmp_path)
    again = Letters(most=64 * 3)  # the probe is all that it may see
    assert tokenize_pairs(stored, again, max_length=24, cache=tmp_path).fingerprint == (
        one.fingerprint
    )
    prints = {one.fingerprint}
    for encoder, length, pairs in (
        (Letters(), 25, stored),
        (Letters(shift=1), 24, stored),
        (Letters(), 24, stored.first(100)),
    ):
        prints.add(tokenize_pairs(pairs, encoder, max_length=length, cache=tmp_path).fingerprint)
    assert len(prints) == 4 and len(list(tmp_path.iterdir())) == 4


def test_sides_and_parts_have_fingerprints_of_their_own(stored, tmp_path):
    train, held_out = (
        tokenize_pairs(side, Letters(), max_length=24, cache=tmp_path) for side in stored.split(0.3)
    )
    whole = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    prints = [
        part.fingerprint for part in (train, held_out, whole, whole.take([1]), whole.take([2]))
    ]
    assert len(set(prints)) == 5
    assert whole.take([1]).fingerprint == prints[3]
    assert whole.take([5, 1]).chosen.tolist() == [
        whole.chosen[5].tolist(),
        whole.chosen[1].tolist(),
    ]


def test_a_killed_tokenization_goes_on_where_it_was(stored, tmp_path):
    probe, chunk = 64 * 3, 16 * 3
    breaking = Letters(most=probe + 5 * chunk)
    with pytest.raises(KeyboardInterrupt):
        tokenize_pairs(stored, breaking, max_length=24, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "progress.json").read_text())["report"]["pairs"] == 64
    for name in ("tokens.bin", "rows.bin"):  # what came after the last commit does not count
        with (folder / name).open("ab") as file:
            file.write(b"torn")
    rest = Letters()
    disk = tokenize_pairs(stored, rest, max_length=24, cache=tmp_path)
    assert rest.seen < probe + 3 * (150 - 64) + 1
    same_tokens(disk, tokenize_pairs(some_pairs(), Letters(), max_length=24))
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "lock", "rows.bin", "store.json", "tokens.bin"
    ]  # fmt: skip


def zero_some_bytes(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "rows.bin", "store.json"])
@pytest.mark.parametrize("damage", [zero_some_bytes, lambda path: path.write_bytes(b"")])
def test_damaged_tokens_are_made_again_and_the_report_says_so(stored, tmp_path, name, damage):
    tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    sound = tokenize_pairs(some_pairs(), Letters(), max_length=24)
    (folder,) = tmp_path.iterdir()
    before = {file: (folder / file).read_bytes() for file in ("tokens.bin", "rows.bin")}
    damage(folder / name)
    mended = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    assert mended.report.warnings.pop(0) == (
        f"The tokens in {folder} were damaged, and have been made again."
    )
    same_tokens(mended, sound)
    assert {file: (folder / file).read_bytes() for file in before} == before
    again = Letters(most=64 * 3)  # the probe is all that it may see
    same_tokens(tokenize_pairs(stored, again, max_length=24, cache=tmp_path), sound)


def test_tokenization_does_not_go_on_behind_damaged_tokens(stored, tmp_path):
    breaking = Letters(most=64 * 3 + 5 * 16 * 3)
    with pytest.raises(KeyboardInterrupt):
        tokenize_pairs(stored, breaking, max_length=24, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    zero_some_bytes(folder / "tokens.bin")
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    same_tokens(disk, tokenize_pairs(some_pairs(), Letters(), max_length=24))


def test_a_batch_reads_its_own_tokens_and_no_others(stored, tmp_path, monkeypatch):
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    read = []
    once = TokenFile.read
    monkeypatch.setattr(
        TokenFile, "read", lambda self, s, n: read.append(int(np.sum(n))) or once(self, s, n)
    )
    dataset = preference_dataset(disk, batch_size=4, drop_remainder=True)
    assert sum(read) <= 2 * 24 * 2  # one pair, for the shapes
    read.clear()
    next(dataset.as_numpy_iterator())
    assert 0 < max(read) <= 4 * 24


def test_what_cannot_be_is_one_message(stored, tmp_path):
    with pytest.raises(InputError, match="cache is for pairs of a built directory"):
        tokenize_pairs(some_pairs(), Letters(), cache=tmp_path)
    with pytest.raises(InputError, match="longer than max_length=4 tokens") as error:
        tokenize_pairs(stored, Letters(), max_length=4, overlength="error", cache=tmp_path)
    assert "pair 0 (id 'id0')" in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="tokens cannot be written") as error:
        tokenize_pairs(stored, Letters(), cache=tmp_path / "file" / "x")
    assert error.value.problems[0].argument == "cache"


def test_damaged_records_are_never_tokenized(stored, tmp_path):
    built = build_preferences(some_pairs(), tmp_path / "pairs", shard_bytes=5000)
    shard = built.path / built.shards[2].file
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="SHA-256"):
        tokenize_pairs(built, Letters(), max_length=24, cache=tmp_path / "tokens")


def test_nothing_left_is_told_with_the_dropped_pairs(tmp_path):
    pairs = [PreferencePair(f"p{n}", "\x02", "no") for n in range(40)]
    stored = build_preferences(pairs, tmp_path / "pairs")
    with pytest.raises(InputError, match="None of the 40 pairs is left") as error:
        tokenize_pairs(stored, Letters())
    assert len(error.value.problems) == 21


def test_the_disk_is_told_of_every_pair_before_it_is_read(stored, tmp_path, monkeypatch):
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    told, read = set(), []
    monkeypatch.setattr(TokenFile, "expect", lambda self, s, n: told.update(s.tolist()))
    once = TokenFile.read

    def noting(self, starts, lengths):
        read.append(told.issuperset(np.asarray(starts).tolist()))
        return once(self, starts, lengths)

    dataset = preference_dataset(disk, batch_size=2, seed=5)
    monkeypatch.setattr(TokenFile, "read", noting)
    assert len(list(dataset)) > 33 and all(read) and len(read) >= 3 * 33


@pytest.mark.parametrize(
    "options", [{"buckets": 3}, {"batching": "packed", "row_length": 96, "replicas": 2}]
)
def test_each_worker_makes_and_reads_only_its_own_rows(stored, tmp_path, monkeypatch, options):
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    options = {"batch_size": 8, "seed": 5, **options}
    whole = list(preference_dataset(disk, **options).as_numpy_iterator())
    # Packing reads every pair's tokens to find what they have in common, before the first batch.
    datasets = [preference_dataset(disk, **options, worker=(index, 2)) for index in range(2)]
    read = []
    once = TokenFile.read
    monkeypatch.setattr(
        TokenFile, "read", lambda self, s, n: read.append(len(n)) or once(self, s, n)
    )
    shares = [list(dataset.as_numpy_iterator()) for dataset in datasets]
    # Three reads per batch: prompts, chosen, rejected. Every pair once, but for the shapes'.
    assert sum(read) <= 3 * (len(disk) + 40)
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in batch:
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in parts]), batch[name]
            )


def test_workers_that_cannot_share_are_told(stored, tmp_path):
    disk = tokenize_pairs(stored, Letters(), max_length=24, cache=tmp_path)
    with pytest.raises(InputError, match="multiple of the 3 workers"):
        preference_dataset(disk, batch_size=8, worker=(0, 3))
    with pytest.raises(InputError, match="0 <= index < count"):
        preference_dataset(disk, batch_size=8, worker=(2, 2))
    with pytest.raises(InputError, match="pass replicas="):
        preference_dataset(disk, batch_size=8, batching="packed", rows=3, worker=(0, 2))


def test_rows_of_a_file_are_read_when_they_are_taken(tmp_path):
    np.array([5, 6, 7, 8], "<i4").tofile(tmp_path / "tokens")
    file = TokenFile(tmp_path / "tokens")
    rows = StoredRagged(file, np.array([0, 3]), np.array([3, 1], np.int32))
    assert rows.take([1, 0]).tolist() == [[8], [5, 6, 7]]
    assert rows.select([1]).tolist() == [[8]] and len(rows) == 2
    rows.expect([0, 1])
    with pytest.raises(InputError, match="is cut off"):
        StoredRagged(file, np.array([3]), np.array([2])).take([0])
