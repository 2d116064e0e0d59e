"""Writes trained policies for `transformers` and `peft`, and compares them there.

    python scripts/bench/round_trip.py --rival PYTHON [--family gemma3 ...]

PYTHON is the interpreter of another environment with torch, transformers, peft and sentencepiece.
For each family a tiny random policy takes two DPO steps, with LoRA and without, is written with
`dpo_keras.save_pretrained`, loaded there, and compared: log-probs of 50 responses and greedy text.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from _common import ROOT, parser_of

FAMILIES = (
    *("gpt2", "llama", "llama3", "mistral", "gemma", "gemma2", "gemma3", "gemma4", "gemma4_moe"),
    *("qwen", "qwen3", "qwen3_5", "qwen3_moe", "mixtral", "phi3", "smollm3", "gpt_oss"),
)
# Settings without which `transformers` has no such model.
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3": {"use_post_ffw_norm": True, "use_post_attention_norm": True},
    "qwen3_5": {"sliding_window_size": None},
}
# Attention and MLP, in every family's words.
TARGETS = [
    *("query", "key", "value", "attention_output", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense"),
    *("gate_proj", "down_proj", "ffw_gating", "ffw_linear", "in_proj_qkv", "out_proj"),
]
RESPONSES = 50
NEW_TOKENS = 8
TOLERANCE = 1e-4


def write(names: list[str], folder: pathlib.Path) -> dict[str, Any]:
    """Train and write every family; return what its model answers here, by case."""
    sys.path.insert(0, str(ROOT / "tests" / "tiny_models"))
    import families

    cases: dict[str, Any] = {}
    for name in names:
        for adapters in (False, True):
            policy = families.ALL_FAMILIES[name](**SETTINGS.get(name, {}))
            label = f"{name} LoRA" if adapters else name
            try:
                cases |= write_one(label, policy, folder, adapters)
            except Exception as error:
                cases[label] = {"error": f"{type(error).__name__}: {error}"[:400]}
            print(label, *([cases[label]["error"]] if "error" in cases.get(label, {}) else []))
    return cases


def write_one(label: str, policy: Any, folder: pathlib.Path, adapters: bool) -> dict[str, Any]:
    """Train and write one policy: for `transformers`, and for `peft` where it has adapters."""
    import dpo_keras

    place = label.replace(" ", "_")
    if adapters:
        dpo_keras.save_pretrained(policy, folder / f"{place}_base", "transformers")
        policy.backbone.enable_lora(4, target_layer_names=TARGETS)
    train(policy)
    answers = answers_of(policy)
    cases = {label: {"format": "transformers", "directory": place, **answers}}
    dpo_keras.save_pretrained(policy, folder / place, "transformers")
    if adapters:
        peft = {"format": "peft", "directory": f"{place}_peft", "base": f"{place}_base"}
        cases[f"{label} peft"] = {**peft, **answers}
        base = str(folder / f"{place}_base")
        dpo_keras.save_pretrained(policy, folder / f"{place}_peft", "peft", source=base)
    return cases


def train(policy: Any) -> None:
    """Take two DPO steps, large enough that every trained weight moves."""
    import keras
    import tiny

    import dpo_keras

    pairs = [dpo_keras.PreferencePair(**pair) for pair in tiny.pairs(16)]
    dataset = dpo_keras.preference_dataset(pairs, tiny.Letters(), batch_size=8, max_length=24)
    model = dpo_keras.DPOModel(policy)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=dpo_keras.DPOLoss())
    model.fit(dataset, epochs=1, verbose=0)


def sentence_piece(family: str, **options: Any) -> Any:
    """Train a vocabulary that leaves white space as it is, as those of the checkpoints do."""
    import keras_hub
    import serving_tiny
    from assembling import sentence_pieces

    same = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    proto = sentence_pieces(serving_tiny.CORPUS, 340, **options, **same)
    tokenizer = getattr(keras_hub.models, f"{family}Tokenizer")(proto)
    return getattr(keras_hub.models, f"{family}CausalLMPreprocessor")(tokenizer)


def write_tokens(folder: pathlib.Path) -> dict[str, Any]:
    """Write policies with real tokenizers; return the ids of texts and chats in training."""
    import families
    import serving_tiny
    from assembling import GEMMA_PIECES

    import dpo_keras
    from dpo_keras.batching import TextEncoder
    from dpo_keras.preferences import Message

    preprocessors = {
        "gpt2": (serving_tiny.gpt2().preprocessor, "human_assistant"),
        "qwen": (serving_tiny.qwen(), "chatml"),
        "llama": (sentence_piece("Llama", pad_id=-1, unk_id=0, bos_id=1, eos_id=2), "llama2"),
        "gemma3": (
            sentence_piece(
                "Gemma",
                **GEMMA_PIECES,
                user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
                add_dummy_prefix=False,
            ),
            "gemma",
        ),
    }
    talk = [{"role": "user", "content": "Hello, how are you?"}]
    cases: dict[str, Any] = {}
    for name, (preprocessor, template) in preprocessors.items():
        settings = {"vocabulary_size": preprocessor.tokenizer.vocabulary_size()}
        policy = families.ALL_FAMILIES[name](**SETTINGS.get(name, {}), **settings)
        written = dpo_keras.save_pretrained(
            policy, folder / f"{name}_tokens", preprocessor=preprocessor, template=template
        )
        texts = [*serving_tiny.CORPUS[:4], "Hello\n"]
        ids = TextEncoder(preprocessor).prompts(texts).tolist()
        good, bad = ((Message("assistant", text),) for text in ("Fine.", "No."))
        pair = dpo_keras.PreferencePair((Message("user", talk[0]["content"]),), good, bad)
        tokenized = dpo_keras.tokenize_pairs([pair], preprocessor, template=template)
        cases[f"{name} tokens"] = {
            "directory": written.name,
            "texts": list(zip(texts, ids, strict=True)),
            "chats": [[talk, tokenized.prompt.tolist()[0]]],
        }
    return cases


def answers_of(policy: Any) -> dict[str, Any]:
    """Return log-probs of responses and greedy continuations, with their ids."""
    import tiny

    import dpo_keras
    from dpo_keras.batching import TextEncoder

    pairs = tiny.pairs(RESPONSES, seed=1)
    prompts, responses = ([pair[side] for pair in pairs] for side in ("prompt", "chosen"))
    letters = tiny.Letters()
    encoder = TextEncoder(letters)
    log_probs, _ = dpo_keras.response_log_probs(policy, prompts, responses, preprocessor=letters)
    prompt_ids = encoder.prompts(prompts).tolist()
    return {
        "prompts": prompt_ids,
        "responses": encoder.responses(responses).tolist(),
        "log_probs": [float(value) for value in log_probs],
        "greedy": greedy(policy, prompt_ids, encoder.ends),
        "ends": sorted(encoder.ends),
        "new_tokens": NEW_TOKENS,
    }


def greedy(policy: Any, prompts: list[list[int]], ends: frozenset[int]) -> list[list[int]]:
    """Return the likeliest continuations, from forward passes without a cache."""
    import numpy as np

    rows = [list(prompt) for prompt in prompts]
    length = max(map(len, rows)) + NEW_TOKENS
    for _ in range(NEW_TOKENS):
        ids = np.zeros((len(rows), length), "int32")
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        if "position_ids" in policy.backbone.input:
            inputs["position_ids"] = np.tile(np.arange(length, dtype="int32"), (len(rows), 1))
        logits = np.asarray(policy(inputs))
        for place, row in enumerate(rows):
            if row[-1] not in ends or len(row) == len(prompts[place]):
                row.append(int(logits[place, len(row) - 1].argmax()))
    new = (row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True))
    return [row[:-1] if row[-1] in ends else row for row in new]


def main() -> int:
    """Print a table; return how many cases differ."""
    parser = parser_of(__doc__)
    parser.add_argument("--rival", required=True, help="Python with torch, transformers and peft")
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--keep", type=pathlib.Path, help="write here, and leave it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases = write(given.family, folder) | write_tokens(folder)
        written = {name: case for name, case in cases.items() if "error" not in case}
        (folder / "cases.json").write_text(json.dumps(written))
        script = pathlib.Path(__file__).with_name("_round_trip_rival.py")
        command = [given.rival, str(script), str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = {**cases, **json.loads(done.stdout.splitlines()[-1])}
    found = {name: found[name] for name in cases}
    wrong = [name for name, row in found.items() if not is_equal(row)]
    print("\n| model | largest difference of log-probs | same greedy text | problems |")
    print("|---|---|---|---|")
    for name, row in found.items():
        if "error" in row:
            print(f"| {name} | | | {row['error']} |")
        elif "tokens" in row:
            print(f"| {name} | | | other ids: {row['tokens']} |")
        else:
            shown = json.dumps(row["problems"]) if row["problems"] else ""
            print(f"| {name} | {row['difference']:.1e} | {row['same']} of {row['of']} | {shown} |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))
    return len(wrong)


def is_equal(row: dict[str, Any]) -> bool:
    """Tell whether a case answers there as here."""
    if "tokens" in row:
        return not any(row["tokens"].values())
    whole = not row.get("error") and not row["problems"] and row["same"] == row["of"]
    return bool(whole and row["difference"] <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
