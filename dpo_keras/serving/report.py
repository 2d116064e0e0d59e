"""What an export wrote, and how it compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: the SavedModel, `<name>/<version>`.
        signatures: names of inputs and outputs of each signature.
        max_length: most tokens of prompt and response together.
        answers: what the exported model answered to the examples, by signature and output; empty
            where verification was skipped.
        differences: largest difference of each output to the model in Python (relative above 1),
            computed in a process without Keras; None where that was skipped.
        custom_operations: ops that the server needs beyond TensorFlow's own (tensorflow_text's,
            which TensorFlow Serving's binaries hold); None where verification was skipped.
        size_bytes: of all files.
        seconds: that the export took.
        notes: what was left out, and why.
    """

    path: Path
    signatures: Mapping[str, Mapping[str, list[str]]]
    max_length: int
    answers: Mapping[str, Mapping[str, list[Any]]]
    differences: Mapping[str, float] | None
    custom_operations: tuple[str, ...] | None
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """The name that it is served under."""
        return self.path.parent.name

    @property
    def version(self) -> int:
        """The version that a server shows it as."""
        return int(self.path.name)

    @property
    def verified(self) -> bool:
        """Whether it was run in a process without Keras and compared."""
        return self.differences is not None

    def summary(self) -> str:
        """Describes the export in a few lines.

        Returns:
            Text for a terminal.
        """
        lines = [
            f"{self.path}: {self.size_bytes / 2**20:.1f} MiB, {self.seconds:.0f} s, sequences of "
            f"at most {self.max_length} tokens."
        ]
        lines += [
            f"  {name}({', '.join(signature['inputs'])}) -> {', '.join(signature['outputs'])}"
            for name, signature in self.signatures.items()
        ]
        if self.differences is None:
            lines.append("Not verified.")
        else:
            worst = max(self.differences.values(), default=0.0)
            lines.append(
                "Verified in a process without Keras; largest difference to the model in Python "
                f"{worst:.1e}."
            )
        if self.custom_operations:
            lines.append(f"Needs tensorflow_text's {', '.join(self.custom_operations)}.")
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values.

        Returns:
            Every field, and `model_name`, `version`, `verified`.
        """
        return {
            "path": str(self.path),
            "model_name": self.model_name,
            "version": self.version,
            "signatures": {name: dict(value) for name, value in self.signatures.items()},
            "max_length": self.max_length,
            "answers": {name: dict(value) for name, value in self.answers.items()},
            "verified": self.verified,
            "differences": None if self.differences is None else dict(self.differences),
            "custom_operations": None
            if self.custom_operations is None
            else list(self.custom_operations),
            "size_bytes": self.size_bytes,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
