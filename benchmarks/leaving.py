"""Greedy answers of one batch where those that have ended leave it, against where they stay.

A random model whose answers end at lengths like those of short answers: most after a few tokens,
some late. Which tokens end an answer is read off a first turn without an end. On a CPU the time is
the process's own, whatever else the machine does; and the answers are compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

from benchmarks.plain_trainer import set_threads
from benchmarks.toy_models import DEVICE, ROOT, build_adapted, small_config
from benchmarks.turns import compute_ratio, describe_ratio, take_turns
from fedlora_app.config.rounds import BOTH
from fedlora_app.evaluation import generation
from fedlora_app.model.adapters import activate

TOKENIZER = "data/demo/base_model"
PROMPT_LENGTH = 48
NEVER = 2.0
"""More than all rows, so that none leaves."""
SHARES = {"one has ended": 0.0, "an eighth": 1 / 8, "a half": 1 / 2}
STAY = "rows stay"


def measure(
    num_turns: int = 5, num_prompts: int = 32, max_new_tokens: int = 64, **sizes: Any
) -> dict[str, Any]:
    """Time all ways in turn on the same prompts."""
    threads = set_threads()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TOKENIZER)
    # Weights so large that answers differ.
    settings = {"vocab_size": len(tokenizer), "num_hidden_layers": 4, "initializer_range": 0.2}
    config = small_config(**(settings | sizes))
    model = build_adapted(config, rank=8)
    activate(model, BOTH)
    rng = random.Random(0)
    prompts = [
        [rng.randrange(3, len(tokenizer)) for _ in range(PROMPT_LENGTH)] for _ in range(num_prompts)
    ]
    ends, lengths = _find_ends(model, prompts, max_new_tokens, rng)
    answers: dict[str, list[str]] = {}

    def answer(name: str, share: float) -> Callable[[], float]:
        @torch.inference_mode()
        def run() -> float:
            clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
            started = clock()
            with mock.patch.object(generation, "LEAVING_SHARE", share):
                answers[name] = generation.generate(model, tokenizer, prompts, ends, max_new_tokens)
            return clock() - started

        return run

    shares = {STAY: NEVER, **SHARES}
    seconds = take_turns({name: answer(name, share) for name, share in shares.items()}, num_turns)
    return {
        "compared": "time of a batch's greedy answers, rows leaving when so many have ended",
        "threads": threads,
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "to_staying": {n: compute_ratio(seconds[n], seconds[STAY]) for n in SHARES},
        "answered_differently": {
            name: sum(a != b for a, b in zip(answers[name], answers[STAY], strict=True))
            for name in SHARES
        },
        "turns": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the ratios as a table."""
    rows = [
        f"| {name} | {describe_ratio(ratio)} | {figures['answered_differently'][name]} |"
        for name, ratio in figures["to_staying"].items()
    ]
    return "\n".join(
        [
            f"{figures['num_prompts']} prompts, answers of {figures['mean_length']:.0f} tokens on "
            f"average and {figures['longest']} at most; time, to rows that stay until all are done",
            "",
            "| rows leave once | time | answers that differ |",
            "|---|---|---|",
            *rows,
        ]
    )


@torch.inference_mode()
def _find_ends(
    model: Any, prompts: list[list[int]], max_new_tokens: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Return tokens that end the answers at lengths of which most are short, and those lengths."""
    ids = torch.tensor(prompts, device=DEVICE)
    output = model.get_base_model().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    answers = output[:, PROMPT_LENGTH:].tolist()
    wanted = [min(max_new_tokens - 1, int(rng.lognormvariate(2.5, 0.8))) for _ in answers]
    early = {
        token
        for answer, length in zip(answers, wanted, strict=True)
        for token in answer[:length]  # would end it too soon
    }
    ends: set[int] = set()
    for answer, length in zip(answers, wanted, strict=True):
        ends.update([token for token in answer[length:] if token not in early][:1])
    lengths = [
        next((n + 1 for n, token in enumerate(answer) if token in ends), max_new_tokens)
        for answer in answers
    ]
    return sorted(ends), lengths
