"""Test the installed package with the lowest, the tested and the newest releases that it allows.

    python scripts/version_matrix.py                        # all rows: minutes each
    python scripts/version_matrix.py --rows lowest-3.11     # these rows, or: lowest tested newest
    python scripts/version_matrix.py --keep                 # leave the environments for a look

Prints a table in Markdown, and exits with 1 where a row fails, with the end of the output that
tells why. Each row gets a virtual environment of its own, made by uv:

    lowest   `--resolution lowest-direct` of the bounds in pyproject.toml
    tested   constraints.txt
    newest   the highest releases that resolve, without constraints

A row installs a wheel of the checkout and checks it in a folder that has the tests and no package
beside them. In rows other than `tested`, warnings are no errors: a release that constraints.txt
does not name may have deprecations of its own. In `tested`, all but those in HARMLESS are errors.
Interpreters are found on PATH by their names, such as `python3.12`. A row takes about 3 GB of disk
while it runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = "uv==0.13.9"  # as in scripts/lock_requirements
EXTRAS = ("feedback", "judges", "jax", "legacy", "parquet", "plots", "tfds")
TOOLS = ("dill", "pytest", "pytest-xdist")  # of the tests, as in constraints.txt
CLIENT = "httpx"  # of starlette's test client, before the releases that take httpx2
SHOWN = ("tensorflow", "keras", "keras-hub", "jax")
TAIL = 40  # lines of a failing check that are shown
PIPELINE = [  # the quickstart in well under a minute, with its export
    "warmup.epochs=1", "training.epochs=1", "evaluation.prompts=8", "evaluation.samples_shown=2",
    "evaluation.max_new_tokens=8", "export.max_new_tokens=8", "output=run", "export.path=served/1",
]  # fmt: skip
QUICK = ["tests/losses", "tests/preferences", "tests/test_public_api.py"]
# Where other releases of Keras, KerasHub and TensorFlow give wrong numbers or none.
CORE = [
    "tests/app/test_app_cli.py",
    "tests/utils/test_utils_keras_internals.py",
    "tests/utils/test_utils_keras_hub_internals.py",
    "tests/utils/test_utils_keras_hub_tokenizers.py",
    "tests/scoring/test_scoring_scorer.py",
    "tests/scoring/test_scoring_adapter_targets.py",
    "tests/scoring/test_scoring_quantization.py",
    "tests/batching/test_batching_encoders.py",
    "tests/batching/test_batching_packed_rows.py",
    "tests/training/test_training_packed.py",
    "tests/training/test_training_generation.py",
    "tests/training/test_training_optimizers.py",
    "tests/training/test_training_saving.py",
    "tests/serving/test_serving_graph_tokenizers.py",
    "tests/serving/test_serving_pretrained.py",
    "tests/serving/test_serving_saved_model.py",
]
# Where other releases of what the extras require show.
FURTHER = [
    "tests/evaluation/test_evaluation_plots.py",
    "tests/evaluation/test_evaluation_statistics.py",
    "tests/feedback/test_feedback_annotation_api.py",
    "tests/feedback/test_feedback_annotation_server.py",
    "tests/feedback/test_feedback_annotator_quality.py",
    "tests/feedback/test_feedback_endpoint_judge.py",
    "tests/feedback/test_feedback_quality.py",
    "tests/feedback/test_feedback_request_guard.py",
    "tests/feedback/test_feedback_sequential_test.py",
    "tests/legacy/test_legacy_model.py",
]
# Warnings that are no faults of the package, where those of the row are errors.
HARMLESS = {
    "3.11": [],
    # Python 3.12.1 takes SQLite's numbered parameters (`?1`) for named ones; 3.13 does not.
    "3.12": ["default:Binding:DeprecationWarning"],
    # TensorFlow's autograph gives nodes of gast attributes of its own.
    "3.13": ["default::DeprecationWarning:gast.astn"],
}
_JAX_TRAINING = "tests/backends/test_backends_training.py::"
JAX = {  # run apart: losses are compared in double precision
    "losses": ["tests/losses/test_losses_values.py"],
    "training": [
        f"{_JAX_TRAINING}test_the_first_loss_is_that_of_the_reference",
        f"{_JAX_TRAINING}test_scores_packed_and_in_buckets_are_the_same",
        f"{_JAX_TRAINING}test_a_stopped_run_goes_on_where_its_checkpoint_is",
    ],
}
# These read the pages of the checkout.
LEFT_OUT = ["tests/losses/test_losses_page.py"]
SOURCE = ("dpo_keras", "pyproject.toml", "README.md", "LICENSE")  # of the wheel
ORIGIN = '''
"""The tests are those of an installed package."""

import pathlib
import sys

import dpo_keras


def test_the_package_is_that_of_the_environment():
    assert pathlib.Path(dpo_keras.__file__).is_relative_to(sys.prefix)
'''


@dataclass
class Row:
    """A set of releases on a version of Python, and what became of it."""

    kind: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    result: str = "not run"
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Return the name by which `--rows` takes the row."""
        return f"{self.kind}-{self.python}"

    @property
    def filters(self) -> list[str]:
        """Return the filters of warnings, beside those of pyproject.toml."""
        return HARMLESS[self.python] if self.kind == "tested" else ["default"]

    @property
    def resolution(self) -> list[str]:
        """Return the options of `uv pip compile` that choose the row's releases."""
        return {
            "lowest": ["--resolution", "lowest-direct"],
            "tested": ["--constraint", "constraints.txt"],
            "newest": [],
        }[self.kind]


ROWS = [
    Row(kind, python)
    for kind, pythons in {
        "lowest": ("3.11",),
        "tested": ("3.11", "3.12", "3.13"),
        "newest": ("3.11", "3.13"),
    }.items()
    for python in pythons
]


class StepError(Exception):
    """A step of a row that did not end well; says which and shows the end of its output."""


def run(step: str, command: list[str | Path], cwd: Path = ROOT, **environment: str) -> str:
    """Return the output of a command; raises StepError where it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-TAIL:])
        raise StepError(f"{step} (exit code {done.returncode})\n{tail}")
    return done.stdout


def build(uv: Path, work: Path) -> Path:
    """Return a wheel of a copy of the checkout: what a build leaves would get into the next."""
    source = work / "source"
    source.mkdir()
    for name in SOURCE:
        copy_into(source, name)
    run("wheel", [uv, "build", "--quiet", "--wheel", "--out-dir", work / "wheel", source])
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def copy_into(folder: Path, name: str) -> None:
    """Copy a file or folder of the checkout."""
    if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(ROOT / name, folder)


def install(row: Row, uv: Path, wheel: Path, folder: Path) -> Path:
    """Make the row's environment in a folder; returns its `bin`."""
    environment = folder / "env"
    run(
        "environment",
        [uv, "venv", "--quiet", "--no-managed-python", "--no-python-downloads",
         "--python", row.python, environment],
    )  # fmt: skip
    requirements = folder / "requirements.txt"
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    # From pyproject.toml: as requirements of a wheel they would not be direct.
    run(
        "resolution",
        [uv, "pip", "compile", "pyproject.toml", *extras, *row.resolution, "--python-version",
         row.python, "--no-annotate", "--no-header", "--quiet", "--output-file", requirements],
    )  # fmt: skip
    releases = requirements.read_text().splitlines()
    found = dict(line.split("==", 1) for line in releases if "==" in line)
    row.versions = {name: found.get(name, "") for name in SHOWN}
    python = ["--python", environment / "bin" / "python"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    tools = [line for line in pins if line.partition("==")[0] in TOOLS]
    run(
        "installation",
        [uv, "pip", "install", "--quiet", *python, "--requirement", requirements, *tools, CLIENT],
    )
    run("installation", [uv, "pip", "install", "--quiet", "--no-deps", *python, wheel])
    return environment / "bin"


def check(row: Row, binaries: Path, folder: Path) -> None:
    """Use the installed package from a folder without the checkout's own; raises StepError."""
    place = folder / "checks"
    place.mkdir()
    for name in ("tests", "scripts", "configs", "pyproject.toml"):
        copy_into(place, name)
    (place / "tests" / "test_origin.py").write_text(ORIGIN)
    # Nothing of this process's environment may lead back to the checkout.
    quiet = {"PYTHONPATH": "", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    program = binaries / "dpo-keras"
    run("--help", [program, "--help"], place, **quiet)
    run("--version", [program, "--version"], place, **quiet)
    run("quickstart", [program, "quickstart", *PIPELINE], place, **quiet)
    if not (place / "served" / "1" / "saved_model.pb").is_file():
        raise StepError("quickstart: it wrote no served/1/saved_model.pb")
    pytest = [binaries / "python", "-m", "pytest", "-c", "pyproject.toml", "-q", "-n", "2",
              "--dist", "loadfile", "-m", "not slow and not table",
              *itertools.chain.from_iterable(("-W", each) for each in row.filters),
              *(f"--ignore={path}" for path in LEFT_OUT)]  # fmt: skip
    run("tests", [*pytest, "tests/test_origin.py", *QUICK, *CORE, *FURTHER], place, **quiet)
    for name, tests in JAX.items():
        run(f"{name} on JAX", [*pytest, *tests], place, **quiet, KERAS_BACKEND="jax")


def try_row(row: Row, uv: Path, wheel: Path, folder: Path) -> str | None:
    """Fill in what became of a row; returns the message of the step that failed."""
    start = time.monotonic()
    message = None
    try:
        check(row, install(row, uv, wheel, folder), folder)
        row.result = "pass"
    except StepError as failure:
        message = str(failure)
        row.result = f"fail: {message.partition(' (')[0]}"
    row.seconds = time.monotonic() - start
    return message


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    head = ("Row", "Python", *SHOWN, "Result", "Seconds")
    lines = [
        (row.kind, row.python, *(row.versions.get(name, "") for name in SHOWN),
         row.result, f"{row.seconds:.0f}")
        for row in rows
    ]  # fmt: skip
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines)
    )


def main() -> int:
    """Run the chosen rows one after the other, and print what became of them."""
    known = list(itertools.chain.from_iterable((row.name, row.kind) for row in ROWS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=sorted(set(known)), metavar="ROW",
                        help=f"one or more of {', '.join(dict.fromkeys(known))}")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the rows' folders")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.rows or {row.name, row.kind} & {*arguments.rows}]
    work = Path(tempfile.mkdtemp(prefix="version-matrix-"))
    try:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", work / "uv", UV]
        run("uv", pip)
        uv = work / "uv" / "bin" / "uv"
        wheel = build(uv, work)
        for row in rows:
            folder = work / row.name
            folder.mkdir()
            message = try_row(row, uv, wheel, folder)
            print(f"{row.name}: {row.result}, {row.seconds:.0f} s", file=sys.stderr, flush=True)
            if message:
                print(f"\n{row.name}: {message}\n", file=sys.stderr, flush=True)
            if not arguments.keep:
                shutil.rmtree(folder)
    finally:
        if arguments.keep:
            print(f"The environments are in {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    print(table(rows))
    return int(any(row.result != "pass" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
