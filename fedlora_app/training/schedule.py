"""The learning rate over an adapter's whole run, not restarted in any round."""

from __future__ import annotations

import math

import numpy as np

from fedlora_app.config.schema import TrainingConfig

POINTS = 16
"""Steps of a round, in its mean learning rate."""


def schedule_factor(position: float, training: TrainingConfig) -> float:
    """Return the learning rate at ``position`` in [0, 1] of the run, relative to its peak."""
    if position < training.warmup_ratio:
        return min(1.0, max(position, 1e-3) / training.warmup_ratio)
    progress = (position - training.warmup_ratio) / (1 - training.warmup_ratio)
    floor = training.final_learning_rate_ratio
    if training.lr_scheduler == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if training.lr_scheduler == "linear":
        return 1 - (1 - floor) * progress
    return 1.0


def mean_factor(training: TrainingConfig, server_round: int, num_rounds: int) -> float:
    """Return the mean learning rate of a round, from 1, relative to its peak.

    For whoever does not know how many steps there are: a round is taken to have ``POINTS``.
    """
    steps = np.arange(POINTS) / POINTS
    return float(
        np.mean(
            [schedule_factor((server_round - 1 + step) / num_rounds, training) for step in steps]
        )
    )


def learning_rates(training: TrainingConfig, num_steps: int, num_rounds: int) -> np.ndarray:
    """Return the rate of every step of a run of equal phases, (num_rounds * num_steps,)."""
    total = num_rounds * num_steps
    factors = [schedule_factor(step / total, training) for step in range(total)]
    return training.learning_rate * np.array(factors)
