#!/usr/bin/env python
"""What it costs to hear of every token: `stream_responses` against `generate_responses`.

    python scripts/bench/token_streaming.py [--rounds 7]

A policy of random weights answers 8 prompts, 128 tokens each, as the arena lets it. Both take turns
in one process, after a warm-up; figures are medians, and the ratio is the median of the rounds'.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import keras
import keras_hub
import numpy as np

from dpo_keras.training import generate_responses, stream_responses

PROMPTS, TOKENS = 8, 128
SIZES = {
    "small": {"num_layers": 4, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512},
    "medium": {"num_layers": 6, "num_heads": 8, "hidden_dim": 512, "intermediate_dim": 2048},
}


class Numbers:
    """A tokenizer of one word a token."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return a token a word."""
        return [[3 + len(word) for word in text.split()] for text in texts]

    def detokenize(self, rows: list[list[int]]) -> list[str]:
        """Return numbers as words."""
        return [" ".join(map(str, row)) for row in rows]


def seconds(work: Callable[[], None]) -> float:
    """Time some work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(sizes: dict[str, int], rounds: int) -> dict[str, float]:
    """Let both take turns with a policy of these sizes."""
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(vocabulary_size=8192, max_sequence_length=512, **sizes)
    policy = keras_hub.models.GPT2CausalLM(backbone)
    prompts = [" ".join(["word"] * (20 + 5 * n)) for n in range(PROMPTS)]
    options = {"max_new_tokens": TOKENS, "preprocessor": Numbers()}
    count: list[int] = []

    def stream() -> None:
        count.append(sum(1 for _ in stream_responses(policy, prompts, seeds=[0] * 8, **options)))

    def whole() -> None:
        generate_responses(policy, prompts, batch_size=PROMPTS, **options)

    whole(), stream()
    times = np.array([(seconds(whole), seconds(stream)) for _ in range(rounds)])
    return {
        "parameters": policy.count_params(),
        "whole_ms_per_token": 1e3 * statistics.median(times[:, 0]) / TOKENS,
        "streamed_ms_per_token": 1e3 * statistics.median(times[:, 1]) / TOKENS,
        "ratio": statistics.median(times[:, 1] / times[:, 0]),
        "texts_heard": statistics.median(count[1:]),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(json.dumps({name: measure(sizes, rounds) for name, sizes in SIZES.items()}, indent=2))


if __name__ == "__main__":
    main()
