"""Adapters on the upper layers only, and what a step then saves, on one thread of a CPU.

A phase makes several passes over the same examples. Where no layer below the first one that learns
can change, its states are kept from the first pass on. ``process_time`` is counted, which a busy
machine disturbs less than the clock. The model has the shape of SmolLM2-135M and random weights.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plain_trainer import PHASE_SEED, constant_rate, deterministic
from benchmarks.toy_models import build_examples
from benchmarks.turns import Work, compute_ratio, describe_ratio, take_turns
from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig
from fedlora_app.model.adapters import attach_adapters
from fedlora_app.training.phase import train_phase

SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Of SmolLM2-135M."""
SHORTEST, LONGEST = 40, 70
LOSS_TOLERANCE = 1e-2  # bf16 rounds anew where examples are packed in another order
ALL = "all layers, float32"
KEPT, ANEW = "kept", "computed anew"


def measure(
    num_turns: int = 3,
    num_passes: int = 5,
    num_examples: int = 16,
    rank: int = 8,
    first_layers: tuple[int, ...] = (15, 20),
    **sizes: int,
) -> dict[str, Any]:
    """Time a phase of ``num_passes`` steps, all examples in each, in every way in turn."""
    torch.set_num_threads(1)
    step = (LONGEST - SHORTEST) / max(1, num_examples - 1)
    lengths = [round(SHORTEST + step * index) for index in range(num_examples)]
    shape = SHAPE | sizes
    examples = build_examples(lengths, shape["vocab_size"])
    training = constant_rate(batch_size=num_examples, max_seq_length=LONGEST)
    losses: dict[str, float] = {}
    bases = {dtype: _build_base(shape, dtype) for dtype in (torch.float32, torch.bfloat16)}

    def phase(name: str, dtype: torch.dtype, first_layer: int, keeps_states: bool) -> Work:
        one = {"rank": rank, "alpha": 2 * rank, "first_layer": first_layer}
        adapters = AdaptersConfig.model_validate({"global": one, "local": one})

        def run() -> float:
            torch.manual_seed(0)  # of the adapters' first weights
            model = attach_adapters(bases[dtype], adapters)
            with deterministic():
                started = time.process_time()
                result = train_phase(
                    model,
                    examples,
                    training,
                    active=(GLOBAL, LOCAL),
                    trainable=(LOCAL,),
                    num_steps=num_passes,
                    run_span=(0.0, 1.0),
                    weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
                    seed=PHASE_SEED,
                    keeps_states=keeps_states,
                )
            losses[name] = result.final_train_loss
            return (time.process_time() - started) / num_passes

        return run

    works = {}
    for dtype in bases:
        dtype_name = str(dtype).removeprefix("torch.")
        whole = f"all layers, {dtype_name}"
        works[whole] = phase(whole, dtype, 0, True)
        for first in first_layers:
            for keeps_states in (False, True):
                lower = KEPT if keeps_states else ANEW
                name = f"from layer {first}, {dtype_name}, {lower}"
                works[name] = phase(name, dtype, first, keeps_states)
    seconds = take_turns(works, num_turns)
    _require_equal(losses)
    return {
        "compared": "CPU seconds of a step, local learns beside global, mean over a phase",
        "model": shape,
        "rank_of_each_adapter": rank,
        "examples_per_step": num_examples,
        "tokens_per_step": sum(lengths),
        "passes": num_passes,
        "threads": 1,
        "losses": losses,
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "to_all_layers": {name: compute_ratio(seconds[name], seconds[ALL]) for name in works},
        "turns": {name: [round(s, 4) for s in values] for name, values in seconds.items()},
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the ratios as a table."""
    lines = [
        f"{figures['examples_per_step']} examples of {figures['tokens_per_step']} tokens a step, "
        f"{figures['passes']} passes, rank {figures['rank_of_each_adapter']}, one thread; ratios "
        "of neighbouring turns: median [least, greatest]",
        "",
        f"| adapters | CPU seconds a step | to {ALL} |",
        "|---|---|---|",
    ]
    for name, ratio in figures["to_all_layers"].items():
        lines.append(f"| {name} | {figures['seconds'][name]:.2f} | {describe_ratio(ratio)} |")
    return "\n".join(lines)


def _build_base(shape: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).requires_grad_(False).eval()


def _require_equal(losses: dict[str, float]) -> None:
    for name, loss in losses.items():
        anew = losses.get(name.replace(KEPT, ANEW), loss)
        if abs(loss - anew) > LOSS_TOLERANCE * anew:
            raise RuntimeError(f"{name}: the loss is {loss}, without kept states {anew}.")
