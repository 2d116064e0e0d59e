"""Preference pairs: read, validated, audited, split and written. Imports no TensorFlow."""

from dpo_keras.preferences.audit import Audit, audit
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.readers import read_preferences
from dpo_keras.preferences.report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.schema import (
    InvalidPair,
    Message,
    PreferencePair,
    Text,
    plain_text,
)
from dpo_keras.preferences.support import Verdict, judge, support_pairs
from dpo_keras.preferences.writers import write_preferences

__all__ = [
    "Audit",
    "InvalidPair",
    "InvalidPreferences",
    "Message",
    "PreferencePair",
    "Preferences",
    "Problem",
    "ReadReport",
    "Text",
    "Verdict",
    "audit",
    "judge",
    "plain_text",
    "read_preferences",
    "support_pairs",
    "write_preferences",
]
