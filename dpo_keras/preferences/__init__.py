"""Preference pairs: read, validated, audited, split, written. Imports no TensorFlow by itself."""

from dpo_keras.preferences.audit import Audit, RatedAudit, audit, audit_rated
from dpo_keras.preferences.collection import Preferences, RatedResponses
from dpo_keras.preferences.feedback_log import FeedbackLog, LogRecord
from dpo_keras.preferences.file_formats import write_preferences
from dpo_keras.preferences.images import Image
from dpo_keras.preferences.pair import InvalidPair, Message, PreferencePair, Text, plain_text
from dpo_keras.preferences.quickstart_data import Verdict, judge, support_pairs
from dpo_keras.preferences.quickstart_thumbs import support_thumbs
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.read_report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.reader import PreferenceStream, check_first_records, read_preferences
from dpo_keras.preferences.record_builder import build_preferences
from dpo_keras.preferences.record_kinds import Record
from dpo_keras.preferences.stored_preferences import StoredPreferences, is_built

__all__ = [
    "Audit",
    "FeedbackLog",
    "Image",
    "InvalidPair",
    "InvalidPreferences",
    "LogRecord",
    "Message",
    "PreferencePair",
    "PreferenceStream",
    "Preferences",
    "Problem",
    "RatedResponse",
    "RatedResponses",
    "RatedAudit",
    "ReadReport",
    "Record",
    "StoredPreferences",
    "Text",
    "Verdict",
    "audit",
    "audit_rated",
    "build_preferences",
    "check_first_records",
    "is_built",
    "judge",
    "plain_text",
    "read_preferences",
    "support_pairs",
    "support_thumbs",
    "write_preferences",
]
