"""What scripts/ install is locked: one version of each release, and the hashes of its files."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = {path.stem: path for path in (ROOT / "scripts" / "requirements").glob("*.txt")}


def locked():
    """Returns the requirement and the hashes of each release, by name."""
    found = {}
    for path in FILES.values():
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if not line.startswith("#"):
                requirement = Requirement(line.partition("--hash")[0])
                assert canonicalize_name(requirement.name) not in found, "in one file only"
                hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?: |$)", line)
                found[canonicalize_name(requirement.name)] = requirement, hashes
    return found


def needed():
    """Returns the names of all that the environment of scripts/test needs on this machine."""
    optional = PROJECT["project"]["optional-dependencies"]
    # Trackers of experiments are heavy, and the tests stand in for them.
    extras = [line for extra in optional.keys() - {"mlflow", "wandb"} for line in optional[extra]]
    todo = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *extras]
    seen = {}
    requirements = [Requirement(line) for line in todo]
    while requirements:
        requirement = requirements.pop()
        name, wanted = canonicalize_name(requirement.name), {"", *requirement.extras}
        if name == "dpo-keras" or wanted <= seen.get(name, set()):
            continue
        seen[name] = wanted | seen.get(name, set())
        for line in importlib.metadata.requires(name) or ():
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in wanted):
                requirements.append(inner)
    return set(seen)


def test_the_lock_has_all_that_the_environment_needs():
    here = {
        name
        for name, (requirement, _) in locked().items()
        if requirement.marker is None or requirement.marker.evaluate()
    }
    assert needed() - here == set()


def test_every_release_has_the_version_of_the_constraints_and_hashes():
    lines = (ROOT / "constraints.txt").read_text().split()
    constraints = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    lock = locked()
    here = {
        name: f"=={constraints[name].partition('==')[2]}" if name in constraints else "missing"
        for name, (requirement, _) in lock.items()
        if requirement.marker is None or requirement.marker.evaluate()
    }
    assert {name: str(lock[name][0].specifier) for name in here} == here
    assert set(constraints) - set(lock) == set()
    assert [name for name, (_, hashes) in lock.items() if not hashes] == []


def test_the_lock_satisfies_what_pyproject_asks_for():
    lock = locked()
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for line in asked:
        requirement = Requirement(line)
        version = str(lock[canonicalize_name(requirement.name)][0].specifier)[2:]
        assert requirement.specifier.contains(version), line
    (backend,) = PROJECT["build-system"]["requires"]
    assert str(lock["setuptools"][0]) == backend, "pinned, in the version that is locked"


def test_templates_run_in_a_sandbox_without_known_holes():
    """CVE-2025-27516: |attr reached format outside of the sandbox before Jinja 3.1.6."""
    (jinja,) = (
        r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "jinja2"
    )
    assert not jinja.specifier.contains("3.1.5") and jinja.specifier.contains("3.1.6")


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_lock_names_no_server(name):
    assert "://" not in FILES[name].read_text() and "-url" not in FILES[name].read_text()


def test_the_scripts_install_from_the_lock_alone():
    text = (ROOT / "scripts" / "_environment").read_text()
    installs = re.findall(r'^ *"\$\{pip\[@\]\}" (.*)$', text, re.MULTILINE)
    assert len(installs) == 3 == text.count('"${pip[@]}"') and text.count("pip install") == 1
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
    assert sum("-e ." in line for line in installs) == 1
