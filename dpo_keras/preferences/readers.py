"""`read_preferences`: pairs out of files and Python records, with a report of what was wrong.

A record that breaks one of these rules is dropped; each broken rule is reported with its line:

- not JSON, not CSV, not UTF-8, broken file, wrong number of cells: it cannot be read;
- missing column, missing value, wrong type, unknown role, mixed forms: it is no comparison;
- not the assistant's turn, conversations differ: these are not two responses to one prompt;
- empty prompt, empty response, identical responses: there is nothing to learn from it;
- preference, weight or margin out of range: the number has no meaning.

These are warnings; the record is kept:

- duplicate: the same comparison with the same preference by the same annotator once more;
- contradiction: the same two responses with the opposite preference (a tie contradicts nothing);
- response repeats prompt: both responses begin with the whole prompt, which should stand once;
- unused: columns and message keys that nothing is done with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dpo_keras.preferences.audit import find_repeats
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.schema import PreferencePair, Text
from dpo_keras.preferences.sources import PathLike, Reading
from dpo_keras.preferences.streaming import RecordStream


def read_preferences(
    source: PathLike | Sequence[PathLike] | Iterable[Any],
    *,
    format: str = "auto",
    on_error: str = "report",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: PathLike | None = None,
) -> Preferences:
    """Reads preference pairs, keeps the good ones, and reports everything that is wrong.

    Records have the columns `prompt, chosen, rejected`, or `prompt, response_a, response_b,
    preference` (P(a is better); below 0.5 the responses are swapped and it becomes 1 - it).
    Optional: `preference` (default 1), `weight`, `annotator`, `group`, `id`, `margin`. Prompts and
    responses are text or lists of role/content messages (in CSV: as JSON). Where `prompt` is
    missing and both responses are whole conversations, all up to the last assistant turn is the
    prompt. Which rules there are is told at the top of this module.

    Args:
        source: a path (.jsonl, .json, .csv, their .gz, .parquet, or a directory that
            `build_preferences` made), several paths, "tfds:NAME/CONFIG:SPLIT" (TensorFlow
            Datasets), "builtin:support" (the bundled quickstart data), or an iterable of mappings,
            such as `tfds.as_numpy(dataset)` or a Hugging Face dataset.
        format: of the files: "auto" (by suffix), "jsonl", "json", "csv" or "parquet".
        on_error: "report" keeps the good records, with the bad in `.report`; "fail" raises if
            there is any bad one.
        limit: stop after this many good records; None reads all.
        columns: our name of a column to the one that the data have, for instance
            `{"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}`.
        data_dir: where TensorFlow Datasets keeps its data; None: where it does by itself.

    Returns:
        `Preferences`; its `.report` counts and names what was dropped.

    Raises:
        InputError: if an argument is wrong, a file cannot be read, no record is good, or
            `on_error` is "fail" and one is bad. Where records were read it is an
            `InvalidPreferences`, whose `.report` holds every problem.

    Example:
        >>> pairs = read_preferences([
        ...     {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        ...     {"prompt": "2 + 3 =", "chosen": "", "rejected": " 5", "weight": -1},
        ... ])
        >>> print(pairs.report.summary())
        records: 2 read, 1 kept, 1 dropped
          weight out of range: 1 (line 2)
          empty response: 1 (line 2)
    """
    stream = RecordStream(source, Reading(format, columns, data_dir), on_error, limit)
    pairs: list[PreferencePair] = []
    places: list[tuple[str, int | None, Text]] = []
    for name, line, pair in stream.good():
        pairs.append(pair)
        places.append((name, line, pair.chosen))
    stream.judge()
    repeats = find_repeats(pairs)
    stream.report.warnings += stream.warnings(repeats, lambda index: places[index])
    return Preferences(pairs, stream.report)
