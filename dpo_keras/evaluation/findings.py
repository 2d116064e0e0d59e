"""What a reader of the figures should not miss.

Each check is a function from a `Measured` to a sentence or None (`checks.py`, `sample_checks.py`),
and a line in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpo_keras.evaluation import checks, sample_checks
from dpo_keras.evaluation.checks import Measured


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know before trusting the result.

    Attributes:
        code: a stable name, for programs.
        severity: "warning", or "note" for what need not be wrong.
        text: what was seen, what it means and what to do.
    """

    code: str
    severity: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """The finding, ready for JSON."""
        return {"code": self.code, "severity": self.severity, "text": self.text}


def findings(measured: Measured) -> list[Finding]:
    """Runs every check.

    Args:
        measured: figures, samples and log.

    Returns:
        What was found, warnings first.
    """
    found = [
        Finding(code, severity, text)
        for code, (severity, check) in CHECKS.items()
        if (text := check(measured)) is not None
    ]
    return sorted(found, key=lambda finding: finding.severity != "warning")


Check = Callable[[Measured], str | None]
CHECKS: dict[str, tuple[str, Check]] = {
    "training_broke": ("warning", checks.training_broke),
    "accuracy_at_chance": ("warning", checks.accuracy_at_chance),
    "accuracy_fell": ("warning", checks.accuracy_fell),
    "preferred_fell": ("warning", sample_checks.preferred_fell),
    "chosen_logps_fell": ("warning", checks.chosen_logps_fell),
    "overfitting": ("warning", checks.overfitting),
    "responses_collapsed": ("warning", sample_checks.responses_collapsed),
    "responses_cut": ("warning", sample_checks.responses_cut),
    "responses_grew": ("warning", sample_checks.responses_grew),
    "length_bias": ("warning", checks.length_bias),
    "weak_groups": ("warning", checks.weak_groups),
    "overconfident": ("warning", checks.overconfident),
    "underconfident": ("note", checks.underconfident),
}
