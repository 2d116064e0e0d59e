"""Judges of the tests of `dpo-keras improve`, in a module that a configuration can name."""

import os
import time

CALLS = []  # of `longer`, in this process
FAIL_AT = [None]  # the call at which `longer` raises


def longer(prompt, first, second):
    time.sleep(float(os.environ.get("SLOW_JUDGE", "0")))
    CALLS.append((prompt, frozenset([first, second])))
    if len(CALLS) == FAIL_AT[0]:
        raise RuntimeError("the judge is ill")
    return 0.5 + 0.5 * ((len(first) > len(second)) - (len(first) < len(second)))


def never(prompt, first, second):
    return 0.5
