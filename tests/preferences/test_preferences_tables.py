"""Tables in memory: data frames, mappings of columns, and data sets, read as they are."""

import math

import numpy as np
import pytest
from preferences_samples import GOOD, USER, reply

from dpo_keras.errors import InputError
from dpo_keras.preferences import InvalidPreferences, Message, PreferencePair, read_preferences

ROWS = [
    {**GOOD, "weight": 2.0, "annotator": "ann", "extra": 1},
    {**GOOD, "prompt": "2 + 3 =", "weight": None, "annotator": None, "extra": 2},
    {**GOOD, "prompt": None, "weight": None, "annotator": None, "extra": 3},
]
MESSAGES = [{"prompt": USER, "chosen": reply(f"{n}"), "rejected": reply("no")} for n in range(2)]


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


class PolarsFrame:
    """The methods of polars 2.1's DataFrame that are used."""

    def __init__(self, rows):
        self._rows, self.columns = rows, list(rows[0])

    def iter_rows(self):
        return (tuple(row.values()) for row in self._rows)


class HuggingFaceDataset:
    """The methods of `datasets` 5.2's Dataset that are used: rows are tensors until formatted."""

    def __init__(self, rows, column_names, plain=False):
        self._rows, self.column_names, self._plain = rows, column_names, plain

    def with_format(self, kind):
        assert kind is None
        return HuggingFaceDataset(self._rows, self.column_names, plain=True)

    def __iter__(self):
        return iter(self._rows if self._plain else [object()])


def pandas_frame(rows):
    return pytest.importorskip("pandas").DataFrame(rows)


def pandas_nullable(rows):
    return pandas_frame(rows).convert_dtypes()


def pyarrow_table(rows):
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


TABLES = {
    "mapping of columns": columns_of,
    "pandas": pandas_frame,
    "pandas, nullable": pandas_nullable,
    "polars": PolarsFrame,
    "pyarrow": pyarrow_table,
    "dataset": lambda rows: HuggingFaceDataset(rows, list(rows[0])),
    "iterable dataset": lambda rows: HuggingFaceDataset(rows, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_it_is_and_missing_cells_are_missing_values(name):
    pairs = read_preferences(TABLES[name](ROWS))
    assert list(pairs) == [
        PreferencePair(**GOOD, weight=2.0, annotator="ann"),
        PreferencePair("2 + 3 =", " 4", " 5"),
    ]
    (problem,) = pairs.report.problems
    assert str(problem).startswith("record 3: ") and problem.field == "prompt"
    assert "column 'extra'" in pairs.report.warnings[-1].message
    messages = read_preferences(TABLES[name](MESSAGES))
    assert [pair.chosen for pair in messages] == [(Message("assistant", f"{n}"),) for n in range(2)]


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_a_table_can_have_other_names(name):
    rows = [{"question": "p", "best": "a", "worst": "b", "prompt": "other"}]
    names = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    (pair,) = read_preferences(TABLES[name](rows), columns=names)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "a", "b")


def test_a_column_that_a_table_lacks_is_told_once():
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences({"prompt": ["p"] * 9, "best": ["a"] * 9, "rejected": ["b"] * 9})
    (problem,) = caught.value.report.problems
    assert problem.line is None and "columns={'chosen': '...'}" in problem.message


def test_a_data_frame_with_a_column_twice_is_refused():
    frame = pandas_frame(ROWS)
    frame.columns = ["prompt", "chosen", "rejected", "weight", "chosen", "x"]
    with pytest.raises(InputError, match="column 'chosen' occurs more than once"):
        read_preferences(frame)


def test_arrays_of_numpy_are_columns_and_nan_is_a_missing_value():
    table = {
        "prompt": np.array(["a", "b"]),
        "chosen": np.array(["c", "d"]),
        "rejected": ["e", math.nan],
        "weight": np.array([math.nan, 1], np.float32),
        "swapped": np.array([True, False]),
    }
    pairs = read_preferences(table)
    assert list(pairs) == [PreferencePair("a", "c", "e", swapped=True)]
    assert [(p.line, p.rule, p.field) for p in pairs.report.problems] == [
        (2, "missing value", "rejected")
    ]


def test_sequences_of_messages_as_columns_are_messages():
    rows = [{"prompt": {"role": ["user"], "content": ["Hi"]}, "chosen": "a", "rejected": "b"}]
    (pair,) = read_preferences(HuggingFaceDataset(rows, list(rows[0])))
    assert pair.prompt == (Message("user", "Hi"),)


def test_several_splits_single_records_and_uneven_columns_are_refused_with_what_to_do():
    dataset = HuggingFaceDataset(ROWS, list(ROWS[0]))
    with pytest.raises(InputError, match=r"several \(train, test\)\. Choose one.*\['train'\]"):
        read_preferences({"train": dataset, "test": dataset})
    for record in (GOOD, MESSAGES[0]):
        with pytest.raises(InputError, match="Put a single record into a list"):
            read_preferences(record)
    uneven = {"prompt": ["p"], "chosen": ["a", "b"], "rejected": ["c"]}
    with pytest.raises(InputError, match="of one length, got prompt 1, chosen 2, rejected 1"):
        read_preferences(uneven)
