"""Which settings make a run fit, the ones that cost least first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fedlora_app.config import Config
from fedlora_app.config_file import parse_config, set_dotted

SHORTEST = 64
LOWEST_RANK = 4

Change = dict[str, Any]
"""Settings by dotted key."""


def find_changes(
    config: Config, is_tied: bool, fits: Callable[[Config], bool]
) -> tuple[Change, Config] | tuple[None, None]:
    """Return the first settings that fit: one change alone, or else the first ones together."""
    for steps in _changes(config, is_tied):
        for change in steps:
            changed = apply_change(config, change)
            if fits(changed):
                return change, changed
    gathered: Change = {}
    for steps in _changes(config, is_tied):
        together = gathered
        for change in steps:
            together = gathered | change
            changed = apply_change(config, together)
            if fits(changed):
                return together, changed
        gathered = together
    return None, None


def apply_change(config: Config, change: Change) -> Config:
    """Return the configuration with these settings."""
    raw = config.dump()
    for key, value in change.items():
        set_dotted(raw, key, value)
    return parse_config(raw)


def _changes(config: Config, is_tied: bool) -> Iterator[list[Change]]:
    """Yield each kind of change with its steps, the gentlest first."""
    training, model, adapters = config.training, config.model, config.adapters
    if training.gradient_checkpointing is False:  # "auto" turns it on by itself
        yield [{"training.gradient_checkpointing": True}]
    per_step = training.batch_size * training.gradient_accumulation_steps
    yield [
        {
            "training.batch_size": size,
            "training.gradient_accumulation_steps": per_step // size,
        }
        for size in range(training.batch_size - 1, 0, -1)
        if per_step % size == 0
    ]
    if training.optimizer == "adamw":
        yield [{"training.optimizer": "paged_adamw_8bit"}]
    if model.quantization == "none":
        yield [{"model.quantization": "4bit"}]
    if not is_tied and getattr(model, "embedding_device", "cpu") != "cpu":
        yield [{"model.embedding_device": "cpu"}]
    yield [
        {"training.max_seq_length": length} for length in _halves(training.max_seq_length, SHORTEST)
    ]
    ranks = zip(
        *(
            [*_halves(adapter.rank, LOWEST_RANK), *[min(adapter.rank, LOWEST_RANK)] * 10]
            for adapter in (adapters.global_, adapters.local)
        ),
        strict=False,
    )
    steps = [
        {"adapters.global.rank": first, "adapters.local.rank": second} for first, second in ranks
    ]
    yield [step for number, step in enumerate(steps) if step not in steps[:number]]


def _halves(value: int, least: int) -> list[int]:
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves
