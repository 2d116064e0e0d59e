"""The content of a report."""

import numpy as np
import pytest
from evaluation_columns import held_out

from dpo_keras.evaluation import most_wrong
from dpo_keras.preferences import PreferencePair


def test_the_most_wrong_pairs_are_found_through_their_source():
    pairs = [PreferencePair("p", "c", f"r{i}", id=str(i)) for i in range(6)]
    found = held_out(
        [-1.0, 2.0, -3.0, -9.0, -9.0],
        source=[5, 4, 3, 2, 1],
        weight=[1, 1, 1, 0, 1],
        preference=[1.0, 1.0, 1.0, 1.0, 0.5],
    )
    assert [row["id"] for row in most_wrong(found, pairs)] == ["3", "5"]
    assert [row["id"] for row in most_wrong(found, pairs, count=1)] == ["3"]
    assert most_wrong(found, pairs)[0]["probability"] == pytest.approx(1 / (1 + np.exp(3)))
