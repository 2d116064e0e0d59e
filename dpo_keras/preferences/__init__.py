"""Preference pairs: read, validated, audited, split, written. Imports no TensorFlow by itself."""

from dpo_keras.preferences.audit import Audit, audit
from dpo_keras.preferences.building import build_preferences
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.manifest import is_built
from dpo_keras.preferences.readers import read_preferences
from dpo_keras.preferences.report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.schema import (
    InvalidPair,
    Message,
    PreferencePair,
    Text,
    plain_text,
)
from dpo_keras.preferences.stored import StoredPreferences
from dpo_keras.preferences.streaming import PreferenceStream
from dpo_keras.preferences.support import Verdict, judge, support_pairs
from dpo_keras.preferences.writers import write_preferences

__all__ = [
    "Audit",
    "InvalidPair",
    "InvalidPreferences",
    "Message",
    "PreferencePair",
    "PreferenceStream",
    "Preferences",
    "Problem",
    "ReadReport",
    "StoredPreferences",
    "Text",
    "Verdict",
    "audit",
    "build_preferences",
    "is_built",
    "judge",
    "plain_text",
    "read_preferences",
    "support_pairs",
    "write_preferences",
]
