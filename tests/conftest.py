"""What tests of more than one stage share. TensorFlow is imported by fixtures, never here."""

import gc
import os
from collections import Counter

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# Graphs are many small objects. By Python's own thresholds a search for garbage begins every few
# traces, through all that is alive.
gc.set_threshold(100_000, 10, 10)
# Runs leave the collector alone where something is frozen already: the fixture below sees to it.
gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def garbage_is_of_one_file():
    """Puts what outlives a file out of the collector's sight.

    TensorFlow's registry of gradients keeps every graph in which a custom one was traced: millions
    of objects at the end, which take seconds to search, in the middle of whatever test.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Begins with the files that have most slow tests, so that parallel workers end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
