"""An improvement: its configuration, its rounds, and where each round keeps its files."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_keras.app.config import Config
from dpo_keras.app.config_dependencies import reads_reference
from dpo_keras.app.config_improve import Improve
from dpo_keras.app.config_sections import Data
from dpo_keras.app.console import Progress
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.cluster import StopRequest
from dpo_keras.feedback.judges import Judge
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

STORE = "feedback.sqlite"  # of all rounds


@dataclass(frozen=True)
class Round:
    """The files of a round; round 0 holds what belongs to the policy that is improved."""

    improvement: Path
    number: int

    @property
    def path(self) -> Path:
        """The folder of the round."""
        return self.improvement / f"round-{self.number}"

    @property
    def run(self) -> RunDirectory:
        """The run that trained the round's policy."""
        return RunDirectory(self.path / "run")

    def file(self, name: str) -> Path:
        """Return the path of a file of the round."""
        return self.path / name


@dataclass(frozen=True)
class Improvement:
    """What every stage needs."""

    config: Config  # of round 0: its model is the policy to improve
    settings: Improve
    judge: Judge | None  # None: people judge
    progress: Progress
    stop: StopRequest

    @property
    def path(self) -> Path:
        """The directory of the improvement."""
        return Path(str(self.config.output))

    def round(self, number: int) -> Round:
        """Return a round by its number."""
        return Round(self.path, number)

    def policy(self, number: int) -> str:
        """Return the path, or the preset's name, of a round's policy."""
        if number == 0 and self.config.warmup is None:
            return str(self.config.model.path)
        return str(self.round(number).run.policy)

    def config_of(self, number: int) -> Config:
        """Return the configuration with which a round trains its run."""
        model = self.config.model.model_copy(
            update={"path": self.policy(number - 1), "scratch": None}
        )
        this = self.round(number)
        evaluation = self.config.evaluation.model_copy(update={"prompts": 0})
        pairs = Data(
            path=[str(this.file("pairs.jsonl"))],
            held_out=0.0,  # the rounds are compared on the held-out pairs of `data`
            **self.config.data.model_dump(
                include={"template", "max_length", "overlength", "min_prompt_tokens"}
            ),
        )
        return self._alone(
            name=f"{self.config.name}-round-{number}",
            output=str(this.run.path),
            seed=self.config.seed + number,
            model=model,
            data=pairs,
            warmup=None,
            reference=self._reference(),
            evaluation=evaluation,
        )

    def config_of_warm_up(self) -> Config:
        """Return the configuration of the run that makes the policy of round 0."""
        return self._alone(name=f"{self.config.name}-round-0", output=str(self.round(0).run.path))

    def _alone(self, **changes: JSON) -> Config:
        nothing = {"improve": None, "judge": None, "export": None}
        return self.config.model_copy(update={**nothing, **changes})

    def _reference(self) -> str:
        first = self.settings.reference == "first" and reads_reference(self.config.loss)
        return self.policy(0) if first else self.config.reference


def forget_models() -> None:
    """Free the models of the last stage, and count layers from one again.

    The names of layers are then those of a process that begins with this stage.
    """
    import keras

    keras.backend.clear_session()
    gc.unfreeze()
    gc.collect()


def read_lines(path: Path) -> list[dict[str, JSON]]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(path: Path, records: Sequence[dict[str, JSON]]) -> None:
    """Write JSON lines, all or none."""
    write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
