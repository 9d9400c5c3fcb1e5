"""Which settings make a run fit, the ones that cost least first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedlora_app.config.loading import parse_config, set_dotted
from fedlora_app.config.schema import Config

SHORTEST = 64
LOWEST_RANK = 4

Change = dict[str, Any]
"""Settings by dotted key."""


def find_changes(
    config: Config, is_tied: bool, fits: Callable[[Config], bool], on_cpu: bool = False
) -> tuple[Change, Config] | tuple[None, None]:
    """Return the first settings that fit.

    What changes no result comes first: one such change alone, then the first ones together. Only
    then shorter examples and smaller ranks, on top of all of those.
    """
    harmless, costly = _harmless_changes(config, is_tied, on_cpu), _costly_changes(config)
    for steps in harmless:
        for change in steps:
            changed = apply_change(config, change)
            if fits(changed):
                return change, changed
    gathered: Change = {}
    for steps in harmless + costly:
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


def _harmless_changes(config: Config, is_tied: bool, on_cpu: bool) -> list[list[Change]]:
    """Return each kind of change that costs time or little else, with its steps."""
    training, model = config.training, config.model
    per_step = training.batch_size * training.gradient_accumulation_steps
    smaller = [size for size in range(training.batch_size - 1, 0, -1) if per_step % size == 0]
    kinds: list[list[Change]] = []
    if training.gradient_checkpointing is False:  # "auto" turns it on by itself
        kinds.append([{"training.gradient_checkpointing": True}])
    kinds.append(
        [
            {
                "training.batch_size": size,
                "training.gradient_accumulation_steps": per_step // size,
            }
            for size in smaller
        ]
    )
    if training.optimizer == "adamw" and not on_cpu:
        kinds.append([{"training.optimizer": "paged_adamw_8bit"}])
    if model.quantization == "none" or (on_cpu and model.quantization == "auto"):
        kinds.append([{"model.quantization": "4bit"}])
    if not (is_tied or on_cpu or model.embedding_device == "cpu"):
        kinds.append([{"model.embedding_device": "cpu"}])
    return kinds


def _costly_changes(config: Config) -> list[list[Change]]:
    """Return shorter examples and smaller ranks, step by step."""
    first, second = config.adapters.global_.rank, config.adapters.local.rank
    lengths = _halves(config.training.max_seq_length, SHORTEST)
    ranks = _halves(max(first, second), LOWEST_RANK)
    return [
        [{"training.max_seq_length": length} for length in lengths],
        [
            {"adapters.global.rank": min(first, rank), "adapters.local.rank": min(second, rank)}
            for rank in ranks
        ],
    ]


def _halves(value: int, least: int) -> list[int]:
    halves = []
    while value // 2 >= least:
        value //= 2
        halves.append(value)
    return halves
