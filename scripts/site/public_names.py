"""Lists the package's public names and where each is defined, without importing the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
STAGES = ("preferences", "batching", "scoring", "losses", "training", "evaluation", "serving")
FURTHER = ("feedback", "legacy", "cluster", "errors")
CALLS = {"dpo_keras.app.config": ("load_config",), "dpo_keras.app.improve": ("improve",)}
CALLS |= {"dpo_keras.app.runs": ("train", "evaluate", "generate", "export_run")}


@cache
def public_names() -> dict[str, dict[str, griffe.Object]]:
    """Return the public names of each public module, with their definitions; stages come first."""
    package = griffe.load("dpo_keras", search_paths=[ROOT], resolve_aliases=True)
    listed = {f"dpo_keras.{name}": _exported(package[name]) for name in (*STAGES, *FURTHER)}
    listed["dpo_keras.callbacks"] = _exported(package["training.callbacks"])
    for name, calls in CALLS.items():
        module = package[name.partition(".")[2]]
        listed[name] = {call: module[call] for call in calls}
    listed["dpo_keras"] = _exported(package)
    return listed


def _exported(module: griffe.Module) -> dict[str, griffe.Object]:
    names = module.exports
    if names is None:
        names = [name for name, member in module.members.items() if _is_own(member)]
    found = {}
    for name in map(str, names):
        target = module[name].final_target if module[name].is_alias else module[name]
        if target.is_module and name in target.members:  # as `batching.collate.collate`
            target = target[name]
        if not target.is_module and name != "__version__":
            found[name] = target
    return found


def _is_own(member: griffe.Object | griffe.Alias) -> bool:
    return (
        not member.is_alias
        and not member.name.startswith("_")
        and (member.is_class or member.is_function)
    )


def undocumented() -> list[str]:
    """Return the paths of public names that have no docstring."""
    names = {each.path: each for module in public_names().values() for each in module.values()}
    return sorted(path for path, each in names.items() if not each.has_docstring)
