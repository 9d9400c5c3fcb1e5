"""A two-adapter step against transformers' Trainer with PEFT and one adapter.

Both get the same examples, packed into one row: the Trainer through transformers' own
``DataCollatorWithFlattening``. As it does by default, it takes the logits of every position, of
which a third are answers here. Beside that: one adapter in our loop, which shows what the second
one costs, and two without ``training.fused_adapters``, as PEFT computes them.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from benchmarks.plain_trainer import PlainTrainer, build_phase, constant_rate, set_threads
from benchmarks.toy_models import (
    DTYPE,
    build_adapted,
    build_examples,
    name_dtype,
    small_config,
)
from benchmarks.turns import compute_ratio, describe_ratio, take_turns
from fedlora_app.config.schema import GLOBAL, LOCAL

BOTH = (GLOBAL, LOCAL)
TRAINER = "Trainer, one adapter"
WAYS = {
    "one adapter": ((GLOBAL,), (GLOBAL,), True),
    "two, local learns": (BOTH, (LOCAL,), True),
    "two, both learn": (BOTH, BOTH, True),
    "two, local learns, not fused": (BOTH, (LOCAL,), False),
    "two, both learn, not fused": (BOTH, BOTH, False),
}
LOSS_TOLERANCE = 1e-4 if torch.float32 == DTYPE else 1e-2


def measure(
    num_turns: int = 5,
    num_examples: int = 4,
    length: int = 200,
    rank: int = 16,
    num_steps: int = 2,
    **sizes: int,
) -> dict[str, Any]:
    """Time every way in turn; ``sizes`` change the model."""
    threads = set_threads()
    config = small_config(**sizes)
    examples = build_examples([length] * num_examples, config.vocab_size)
    model = build_adapted(config, rank)
    losses: list[float] = []
    settings = {"batch_size": num_examples, "max_seq_length": length}
    with tempfile.TemporaryDirectory() as folder:
        trainer = PlainTrainer(
            *(config, rank, examples, DataCollatorWithFlattening()),
            batch_size=num_examples,
            num_steps=num_steps,
            output_dir=folder,
        )
        works = {TRAINER: trainer.run}
        for name, (active, trainable, fused) in WAYS.items():
            training = constant_rate(fused_adapters=fused, **settings)
            kept = losses if name == "one adapter" else None
            works[name] = build_phase(model, examples, training, active, trainable, num_steps, kept)
        seconds = take_turns(works, num_turns)
    # B is zero at the start of the first turn in both, so the same batch must cost the same.
    difference = abs(losses[0] - trainer.losses[0])
    if difference > LOSS_TOLERANCE * losses[0]:
        raise RuntimeError(f"The losses differ by {difference}: {losses[0]}, {trainer.losses[0]}.")
    return {
        "compared": f"seconds of a step, the same packed row of tokens, {name_dtype()}",
        "dtype": name_dtype(),
        "model": {key: getattr(config, key) for key in ("hidden_size", "num_hidden_layers")}
        | {"vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size},
        "rank_of_each_adapter": rank,
        "tokens_per_step": num_examples * length,
        "threads": threads,
        "loss_difference": difference,
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "ratio_to_trainer": {name: compute_ratio(seconds[name], seconds[TRAINER]) for name in WAYS},
        "second_adapter": {
            name: compute_ratio(seconds[name], seconds["one adapter"])
            for name in ("two, local learns", "two, both learn")
        },
        "not_fused_to_fused": {
            name: compute_ratio(seconds[f"{name}, not fused"], seconds[name])
            for name in ("two, local learns", "two, both learn")
        },
        "turns": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the ratios as a table."""
    model = figures["model"]
    lines = [
        f"{figures['tokens_per_step']} tokens a step, hidden size {model['hidden_size']}, "
        f"{model['num_hidden_layers']} layers, vocabulary {model['vocab_size']:,}, "
        f"{figures['dtype']}, "
        f"{figures['threads']} threads; ratios of neighbouring turns: median [least, greatest]",
        "",
        "| step | seconds | to Trainer with one adapter | to one adapter here "
        "| not fused to fused |",
        "|---|---|---|---|---|",
        f"| {TRAINER} | {figures['seconds'][TRAINER]:.3f} | 1 | | |",
    ]
    for name, ratio in figures["ratio_to_trainer"].items():
        others = (figures[key].get(name) for key in ("second_adapter", "not_fused_to_fused"))
        cells = [describe_ratio(other) if other else "" for other in others]
        lines.append(
            f"| {name} | {figures['seconds'][name]:.3f} | {describe_ratio(ratio)} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)
