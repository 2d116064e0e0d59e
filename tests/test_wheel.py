"""The wheel, made of the sdist: it holds what the package reads beside its modules."""

import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = directory.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def files_of_the_package():
    """Returns what the package needs at run time: all that is no cache and no link to elsewhere."""
    package = ROOT / "dpo_keras"
    found = {path.relative_to(ROOT) for path in package.rglob("*") if path.is_file()}
    found |= {Path("dpo_keras/configs") / path.name for path in (ROOT / "configs").glob("*.yaml")}
    return {str(path) for path in found if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    packed = {name for name in wheel.namelist() if not name.startswith("dpo_keras-")}
    assert packed == files_of_the_package()
    assert "dpo_keras/configs/quickstart.yaml" in packed


@pytest.mark.slow
def test_its_metadata_name_the_command_the_license_and_the_extras(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "dpo-keras = dpo_keras.app.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = HeaderParser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"plots", "feedback", "jax", "legacy"} <= set(metadata.get_all("Provides-Extra"))
    assert any(line.startswith("keras>=") for line in metadata.get_all("Requires-Dist"))
