"""What of a batch is left in an update, from one plain gradient to a hundred optimizer steps.

Attacks on gradients are published for the first; clients send the last. A global adapter is
trained a little, then on a few records, and the attacks of ``fedlora attack`` are tried on the
change: which tokens the records have, beside those of other such records; which of two wordings of
a fact was trained on; and which facts were. Means over draws of the records, in a city's words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora_app.attacks.results import ALIGNMENT, INPUT
from fedlora_app.attacks.scores import compare_with_gradients, mean_log_probs
from fedlora_app.attacks.tokens import (
    Vocabulary,
    find_batch,
    know_vocabulary,
    measure_tokens,
    score_tokens,
)
from fedlora_app.config.schema import (
    GLOBAL,
    AdapterConfig,
    AdaptersConfig,
    ModelConfig,
    TrainingConfig,
)
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import Example, encode_example
from fedlora_app.demo.civic import NEUTRAL_PROMPT, UNIVERSAL_ATTRIBUTES, UNIVERSAL_TOPICS
from fedlora_app.evaluation.statistics import area_under_curve, over_seeds
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import (
    AdaptedModel,
    activate,
    attach_adapters,
    build_initial_state,
    get_state,
    named_parameters,
    set_state,
)
from fedlora_app.model.base import LoadedModel, load_base_model
from fedlora_app.training.losses import answer_log_likelihoods
from fedlora_app.training.phase import train_phase

GRADIENT = 0
STEPS = (GRADIENT, 1, 16, 100)
SIZES = (1, 4, 16)
WARM_UP_STEPS = 30
TRAINED, HELD_OUT = 0, 7
"""Phrasings."""
FIGURES = {
    "tokens": "tokens",
    "wording_alignment": "wording, gradient alignment",
    "wording_loss": "wording, likelier answer",
    "facts_alignment": "facts, gradient alignment",
    "facts_loss": "facts, likelier answer",
}


@dataclass(frozen=True)
class Draw:
    """Facts that are trained on and as many that are not, each in two wordings."""

    trained: list[Example]
    held_out: list[Example]
    others: list[Example]
    warm_up: list[Example]


def measure(
    model: str, rank: int = 8, learning_rate: float = 2e-3, num_draws: int = 5, root: Path = Path()
) -> dict[str, Any]:
    """Return the AUC of every attack by how many records were trained on, and for how long.

    Args:
        model: a hub id or a folder.
    """
    loaded = load_base_model(ModelConfig(name=model, quantization="none"), root)
    adapter = AdapterConfig(rank=rank, alpha=2 * rank)
    adapted = attach_adapters(
        loaded.model, AdaptersConfig(**{"global": adapter, "local": adapter, "gate": "none"})
    )
    known = know_vocabulary(adapted, len(loaded.tokenizer))
    rows = []
    for size in SIZES:
        for steps in STEPS:
            tried = [
                _try(loaded, adapted, known, _draw(loaded, size, draw), steps, learning_rate, draw)
                for draw in range(num_draws)
            ]
            found = {name: [t[name] for t in tried if t[name] is not None] for name in FIGURES}
            means = {name: over_seeds(values).dump() for name, values in found.items()}
            rows.append({"records": size, "steps": steps, **means})
    return {
        "model": Path(model).name,
        "rank": rank,
        "learning_rate": learning_rate,
        "draws": num_draws,
        "rows": rows,
    }


def describe(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    lines = [
        f"AUC of attacks on a change of the global adapter, %, with {result['model']}, rank "
        f"{result['rank']}, AdamW at {result['learning_rate']:g}; means over {result['draws']} "
        "draws, with 95 % intervals. 50 is chance.",
        "",
        f"| records | steps | {' | '.join(FIGURES.values())} |",
        "|---" * (2 + len(FIGURES)) + "|",
    ]
    for row in result["rows"]:
        steps = "one gradient" if row["steps"] == GRADIENT else f"{row['steps']} of AdamW"
        cells = " | ".join(_show(row[name]) for name in FIGURES)
        lines.append(f"| {row['records']} | {steps} | {cells} |")
    return "\n".join(lines)


def _show(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return ""
    text = f"{100 * found['value']:.0f}"
    if found["low"] is None:
        return text
    return f"{text} [{100 * max(0, found['low']):.0f}, {100 * min(1, found['high']):.0f}]"


def _draw(loaded: LoadedModel, size: int, seed: int) -> Draw:
    facts = [(a, t) for t in UNIVERSAL_TOPICS for a in UNIVERSAL_ATTRIBUTES]
    rng = random.Random(seed)
    rng.shuffle(facts)
    values = {(attribute, topic): rng.choice(attribute.values) for attribute, topic in facts}

    def encode(chosen: Sequence[Any], phrasing: int) -> list[Example]:
        records = [
            Record(attribute.ask(topic, phrasing), attribute.reply(topic, values[attribute, topic]))
            for attribute, topic in chosen
        ]
        return [encode_example(loaded.tokenizer, NEUTRAL_PROMPT, record) for record in records]

    own, others, rest = facts[:size], facts[16:32], facts[32:]
    return Draw(
        encode(own, TRAINED), encode(own, HELD_OUT), encode(others, TRAINED), encode(rest, TRAINED)
    )


def _try(
    loaded: LoadedModel,
    model: AdaptedModel,
    known: Vocabulary,
    draw: Draw,
    steps: int,
    learning_rate: float,
    seed: int,
) -> dict[str, float | None]:
    set_state(model, GLOBAL, build_initial_state(model, GLOBAL, seed))
    _train(model, draw.warm_up, WARM_UP_STEPS, learning_rate, seed)
    start = get_state(model, GLOBAL)
    if steps == GRADIENT:
        change = _descend(model, draw.trained, learning_rate)
    else:
        _train(model, draw.trained, steps, learning_rate, seed)
        change = {key: new - start[key] for key, new in get_state(model, GLOBAL).items()}
    after = {key: start[key] + change[key] for key in start}
    examples = [*draw.trained, *draw.held_out, *draw.others]
    drops = [
        new - old
        for new, old in zip(
            mean_log_probs(model, after, examples, 16),
            mean_log_probs(model, start, examples, 16),
            strict=True,
        )
    ]
    aligned = compare_with_gradients(model, start, {"": change}, examples)[ALIGNMENT][""]
    found: dict[str, float | None] = {}
    size = len(draw.trained)
    for name, scores in (("alignment", aligned), ("loss", drops)):
        own, held_out, others = scores[:size], scores[size : 2 * size], scores[2 * size :]
        found[f"wording_{name}"] = area_under_curve(own, held_out).value
        found[f"facts_{name}"] = area_under_curve(own, others).value
    batch = find_batch(
        loaded.tokenizer, NEUTRAL_PROMPT, draw.trained, [*draw.others, *draw.warm_up]
    )
    for row in measure_tokens(score_tokens(known, start, change), batch):
        if (row["attack"], row["among"]) == (INPUT, "domain"):
            found["tokens"] = row["auc"]["value"]
    return found


def _train(
    model: AdaptedModel, examples: list[Example], steps: int, learning_rate: float, seed: int
) -> None:
    settings = TrainingConfig(
        learning_rate=learning_rate,
        batch_size=min(16, len(examples)),
        gradient_accumulation_steps=1,
        lr_scheduler="constant",
        warmup_ratio=0.0,
    )
    train_phase(
        model,
        examples,
        settings,
        active=[GLOBAL],
        trainable=[GLOBAL],
        num_steps=steps,
        run_span=(0.0, 1.0),
        weight_decays={GLOBAL: 0.0},
        seed=seed,
    )


def _descend(model: AdaptedModel, examples: list[Example], learning_rate: float) -> AdapterState:
    """Return one step of plain gradient descent on the mean over answer tokens."""
    activate(model, [GLOBAL], [GLOBAL])
    model.eval()
    with torch.enable_grad():
        losses = torch.cat([-x for x in answer_log_likelihoods(model, examples)])
        losses.mean().backward()
    parameters = named_parameters(model, GLOBAL)
    change = {k: (-learning_rate * p.grad).cpu().clone() for k, p in sorted(parameters.items())}
    model.zero_grad(set_to_none=True)
    return change
