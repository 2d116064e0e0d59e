"""Preference pairs: read, validated, audited, split, written. Imports no TensorFlow by itself."""

from dpo_keras.preferences.audit import Audit, audit
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.file_formats import write_preferences
from dpo_keras.preferences.images import Image
from dpo_keras.preferences.pair import InvalidPair, Message, PreferencePair, Text, plain_text
from dpo_keras.preferences.quickstart_data import Verdict, judge, support_pairs
from dpo_keras.preferences.read_report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.reader import PreferenceStream, check_first_records, read_preferences
from dpo_keras.preferences.record_builder import build_preferences
from dpo_keras.preferences.stored_preferences import StoredPreferences, is_built

__all__ = [
    "Audit",
    "Image",
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
    "check_first_records",
    "is_built",
    "judge",
    "plain_text",
    "read_preferences",
    "support_pairs",
    "write_preferences",
]
