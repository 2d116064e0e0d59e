"""Why a model family cannot do what others can, and the table that says so in the guide."""

from pathlib import Path
from typing import NamedTuple

from families import ALL_FAMILIES
from model_matrix import CELLS

README = Path(__file__).parents[2] / "dpo_keras" / "scoring" / "README.md"
BEGIN = "<!-- table: made by `python scripts/model_table.py` -->\n"
END = "<!-- end of table -->"


class Reason(NamedTuple):
    """Why a cell is not 'yes'."""

    shown: str  # in the table
    error: str  # a pattern of the error's message


DRAFTS = Reason("drafts for another model", "must have log-probs of its own")
RECURRENT = Reason("recurrent: buckets", "is recurrent")
NO_IMAGES = Reason("text only", "images need a preset with a vision encoder")
NO_EXPERTS = Reason("no experts", "no layer adds a loss")
NO_EXPORTER = Reason("no exporter", "has no Hugging Face exporter")
DENSE = (
    "gpt2 opt llama llama3 mistral gemma gemma2 gemma3 qwen qwen3 phi3 gpt_neo_x bloom falcon "
    "smollm3 gemma3n gemma4"
)
MIXTURES = "mixtral qwen_moe qwen3_moe gpt_oss gemma4_moe"
VISION = "gemma3_vision gemma4_vision qwen3_5_vision pali_gemma blip2 blip2_vision"
# In which cells which families give a reason.
GROUPS = {
    "images": {
        f"{DENSE} {MIXTURES} qwen3_5 qwen3_5_moe rwkv7 blip2 gemma4_assistant": NO_IMAGES,
        "blip2_vision": Reason("preprocessor not read", "are read for Gemma3"),
    },
    "packed": {
        "qwen3_5 qwen3_5_moe qwen3_5_vision rwkv7": RECURRENT,
        "gemma3n": Reason("buckets: not proven", "attends through Gemma3nTextAttention"),
        "pali_gemma": Reason("prompts see ahead: buckets", "PaliGemma"),
        "blip2 blip2_vision": Reason("buckets: not proven", "BLIP2Backbone"),
    },
    "int8": {
        "smollm3": Reason("KerasHub cannot save it", "layers of SmolLM3Backbone one path"),
        "blip2 blip2_vision": Reason(
            "KerasHub cannot save it", "dtypes of its layers out of BLIP2"
        ),
    },
    "MoE loss": {
        f"{DENSE} {VISION} qwen3_5 rwkv7": NO_EXPERTS,
        "gpt_oss gemma4_moe": Reason("KerasHub has none for it", "no layer adds a loss"),
    },
    "HF out": {
        "opt gpt_neo_x bloom falcon gemma3n qwen_moe qwen3_5_moe rwkv7 pali_gemma blip2 "
        "blip2_vision gemma4_assistant": NO_EXPORTER
    },
}
GROUPS["int4"] = GROUPS["int8"]
REASONS = {
    (family, cell): reason
    for cell, groups in GROUPS.items()
    for families, reason in groups.items()
    for family in families.split()
}
REASONS |= {
    ("gemma4_assistant", cell): DRAFTS for cell in CELLS if cell not in ("images", "HF out")
}
TITLES = {
    "gpt2": "GPT-2",
    "opt": "OPT",
    "llama": "Llama 2",
    "llama3": "Llama 3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "qwen": "Qwen 2.5",
    "qwen3": "Qwen 3",
    "phi3": "Phi-3",
    "gpt_neo_x": "GPT-NeoX",
    "bloom": "Bloom",
    "falcon": "Falcon",
    "smollm3": "SmolLM3",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "mixtral": "Mixtral",
    "qwen_moe": "Qwen-MoE",
    "qwen3_moe": "Qwen 3-MoE",
    "gpt_oss": "GPT-OSS",
    "gemma4_moe": "Gemma 4, mixture of experts",
    "qwen3_5": "Qwen 3.5",
    "qwen3_5_moe": "Qwen 3.5-MoE",
    "rwkv7": "RWKV-7",
    "gemma3_vision": "Gemma 3 with images",
    "gemma4_vision": "Gemma 4 with images",
    "qwen3_5_vision": "Qwen 3.5 with images",
    "pali_gemma": "PaliGemma",
    "blip2": "BLIP-2, text only",
    "blip2_vision": "BLIP-2",
    "gemma4_assistant": "Gemma 4 Assistant",
}


def table():
    """The table as it stands in the README."""
    lines = [f"| model | {' | '.join(CELLS)} |", "|---" * (1 + len(CELLS)) + "|"]
    for family in ALL_FAMILIES:
        reasons = [REASONS.get((family, cell)) for cell in CELLS]
        shown = ["yes" if reason is None else reason.shown for reason in reasons]
        lines.append(f"| {TITLES[family]} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def write_table():
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest[rest.index(END) :]
    README.write_text(before + BEGIN + table() + after, encoding="utf-8")
