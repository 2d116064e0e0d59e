"""The README.md of a written model, with the front matter that Hugging Face's hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import keras
import yaml

from dpo_keras.utils import JSON
from dpo_keras.version import __version__

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_LIBRARIES = {"keras_hub": "keras-hub", "transformers": "transformers", "peft": "peft"}
_WHAT = {
    "keras_hub": "A KerasHub preset",
    "transformers": "A language model for `transformers`",
    "peft": "LoRA adapters for `peft`",
}
_LOADING = {
    "keras_hub": """import keras_hub

policy = keras_hub.models.CausalLM.from_preset("{directory}")""",
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{directory}")
tokenizer = AutoTokenizer.from_pretrained("{directory}")""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{directory}")""",
}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of how a model came to be. Everything may be left out.

    Args:
        data: what it was trained on: names, counts, hashes.
        objective: the loss and its settings.
        figures: held-out figures before and after training, as text.
        method: tag of the method.
        versions: versions of the packages that trained it; by default those installed.
    """

    data: Mapping[str, str] = field(default_factory=dict)
    objective: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    method: str = "dpo"
    versions: Mapping[str, str] = field(default_factory=dict)


def facts_of(model: keras.Model) -> ModelFacts:
    """Return what a model itself tells: the loss that it was compiled with."""
    loss = getattr(model, "loss", None)
    supervised = type(model).__name__ == "SupervisedModel"
    if (
        supervised
        or not hasattr(model, "policy")
        or loss is None
        or not hasattr(loss, "get_config")
    ):
        return ModelFacts(method="sft" if supervised else "dpo")
    settings = {key: value for key, value in loss.get_config().items() if _is_set(value)}
    settings.pop("name", None)
    settings.pop("reduction", None)
    reference = getattr(getattr(model, "reference", None), "mode", None)
    if reference is not None:
        settings["reference"] = reference
    return ModelFacts(objective={key: plain(value) for key, value in settings.items()})


def _is_set(value: JSON) -> bool:
    return value is not None and value not in ({}, [])


def plain(value: JSON) -> str:
    """Return a setting as a table's cell shows it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def write_model_card(
    partial: Path,
    directory: Path,
    format: str,
    base: str | None,
    facts: ModelFacts,
    notes: Sequence[str] = (),
) -> None:
    """Write README.md into `partial`, which is to become `directory`."""
    method = ["dpo", "preference-optimization"] if facts.method == "dpo" else [facts.method]
    front: dict[str, JSON] = {
        "library_name": _LIBRARIES[format],
        "pipeline_tag": "text-generation",
        "tags": [*method, "dpo_keras", *(["lora"] if format == "peft" else [])],
    }
    if base:
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if format == "peft" else "finetune"
    environment = jinja2.Environment(keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=yaml.safe_dump(front, sort_keys=False).rstrip(),
        name=directory.name,
        what=_WHAT[format],
        base=base,
        data=facts.data,
        objective=facts.objective,
        figures=facts.figures,
        loading=_LOADING[format].format(directory=directory.name, base=base or "BASE MODEL"),
        notes=notes,
        versions=facts.versions or _versions(),
    )
    (partial / "README.md").write_text(text, encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"dpo-keras": __version__, "keras": keras.__version__}
    for package in ("keras-hub", "tensorflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
