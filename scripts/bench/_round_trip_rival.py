"""Loads what `round_trip.py` wrote with `transformers` and `peft`, and compares. No dpo_keras here.

    python _round_trip_rival.py FOLDER

Prints one JSON object: for each case the largest difference of the log-probs of its responses, and
how many greedy continuations are the same.
"""

import json
import pathlib
import sys
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

warnings.filterwarnings("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(2)


def load(case, folder):
    """Load a model, and report weights that were missing or not expected."""
    if case["format"] == "transformers":
        model, said = AutoModelForCausalLM.from_pretrained(
            folder / case["directory"], output_loading_info=True, dtype="auto"
        )
        problems = {key: sorted(map(str, said[key])) for key in said if said[key]}
        return model.eval(), problems
    from peft import PeftModel
    from safetensors import safe_open

    base = AutoModelForCausalLM.from_pretrained(folder / case["base"], dtype="auto")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder / case["directory"])
    problems = {"peft": [str(w.message) for w in heard if "adapter keys" in str(w.message)]}
    with safe_open(folder / case["directory"] / "adapter_model.safetensors", "pt") as written:
        count = sum(key.endswith("lora_A.weight") for key in written.keys())  # noqa: SIM118
    loaded = sum("lora_A" in name for name, _ in model.named_parameters())
    if loaded != count:
        problems["adapters"] = [f"{count} written, {loaded} loaded"]
    return model.eval(), {key: value for key, value in problems.items() if value}


def log_probs(model, case):
    """Return the log-probability of each response's ids after its prompt's."""
    pairs = list(zip(case["prompts"], case["responses"], strict=True))
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    # What stands behind a text changes nothing before it.
    ids = torch.tensor([(p + r + [0] * length)[:length] for p, r in pairs])
    with torch.no_grad():
        steps = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
    return [
        steps[row, torch.arange(len(r)) + len(p) - 1, torch.tensor(r)].sum().item()
        for row, (p, r) in enumerate(pairs)
    ]


def greedy(model, case):
    """Return the ids of the likeliest continuation of each prompt, without the end."""
    by_length = {}
    for place, prompt in enumerate(case["prompts"]):
        by_length.setdefault(len(prompt), []).append(place)
    rows = {}
    for length, places in by_length.items():  # so that nothing is padded
        ids = torch.tensor([case["prompts"][place] for place in places])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=case["new_tokens"],
            eos_token_id=case["ends"],
            pad_token_id=0,
        )[:, length:].tolist()
        rows |= dict(zip(places, found, strict=True))
    ends = set(case["ends"])
    stops = {
        place: next((i for i, token in enumerate(row) if token in ends), len(row))
        for place, row in rows.items()
    }
    return [rows[place][: stops[place]] for place in sorted(rows)]


def tokens(case, folder):
    """Return how many texts get other ids than in training, and how many renderings do."""
    tokenizer = AutoTokenizer.from_pretrained(folder / case["directory"])
    texts = [tokenizer(text)["input_ids"] != ids for text, ids in case["texts"]]
    chats = [
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        != ids
        for messages, ids in case["chats"]
    ]
    return {"texts": sum(texts), "chats": sum(chats)}


def compare(case, folder):
    """Return how a case's model compares."""
    try:
        if "texts" in case:
            return {"tokens": tokens(case, folder)}
        model, problems = load(case, folder)
        found = log_probs(model, case)
        differences = [abs(a - b) for a, b in zip(found, case["log_probs"], strict=True)]
        texts = greedy(model, case)
        same = sum(one == other for one, other in zip(texts, case["greedy"], strict=True))
        result = {"difference": max(differences), "same": same, "of": len(texts)}
        return {**result, "problems": problems}
    except Exception as error:
        if "--raise" in sys.argv:
            raise
        return {"error": f"{type(error).__name__}: {error}"[:400]}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    only = [a for a in sys.argv[2:] if not a.startswith("--")]
    chosen = {name: case for name, case in cases.items() if not only or name in only}
    print(json.dumps({name: compare(case, folder) for name, case in chosen.items()}))
