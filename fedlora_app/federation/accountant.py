"""What noise is worth: epsilon at a delta, and the noise that keeps a run within an epsilon.

Flower's own accountant (Renyi differential privacy, Mironov 2017, https://arxiv.org/abs/1702.07476,
converted by Google's dp-accounting) composes the Gaussian mechanism over what is released. Two
units, two plans:

*client*: one release for every round in which the client's update counts. Nothing is gained by
sampling, since who trains in a round follows from a seed that everybody knows.

*record*: one release for every optimizer step in which the global adapter learns at this client.
Each step takes every example with the same chance, those of a step over all of the client's
(Poisson sampling), in secret, so that sampling does count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.foundation.quiet import quieted
from fedlora_app.training.batches import examples_per_step
from fedlora_app.training.selection import count_phase_steps

LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
"""Multipliers between which the noise for an epsilon is looked for."""
PRECISION = 5e-3
"""By which a multiplier that is found may be larger than it must be, relatively."""


@dataclass(frozen=True)
class Sampling:
    """How many of so many records a step takes, each with the same chance."""

    per_step: int
    records: int

    @property
    def rate(self) -> float:
        """The chance of one record to be in a step."""
        return self.per_step / self.records


def compute_epsilon(
    delta: float, releases: Iterable[tuple[float, int]], sampling: Sampling | None = None
) -> float:
    """Return the epsilon that releases have spent, against one unit more or less.

    Args:
        releases: noise multipliers, each with the number of releases that had it.
        sampling: of every release; None: nobody is drawn in secret.
    """
    population = sampling.records if sampling is not None else 1
    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=delta,
            population_size=population,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=(
                SamplingMethod.NO_AMPLIFICATION if sampling is None else SamplingMethod.POISSON
            ),
        )
    )
    size = sampling.per_step if sampling is not None else 1
    # It says which orders it does without; those that are left give a bound too.
    with quieted("absl", logging.ERROR):
        for noise_multiplier, count in releases:
            if count > 0:
                event = GaussianPrivacyEvent(noise_multiplier, size, population)
                accountant.compose(event, count)
        return accountant.get_epsilon(delta) if accountant.num_releases else 0.0


@cache
def find_noise_multiplier(
    epsilon: float, delta: float, num_releases: int, sampling: Sampling | None = None
) -> float:
    """Return about the smallest noise multiplier that keeps so many releases within epsilon.

    Raises:
        ConfigError: no noise does.
    """

    def spends(multiplier: float) -> float:
        return compute_epsilon(delta, [(multiplier, num_releases)], sampling)

    high = 1.0
    while spends(high) > epsilon:
        high *= 2
        if high > MOST_NOISE:
            raise ConfigError(
                f"privacy.epsilon: no noise keeps {num_releases} releases within {epsilon:g} at "
                f"privacy.delta {delta:g}, as the accountant bounds it. Raise one of the two."
            )
    low = high / 2
    while spends(low) <= epsilon and low > LEAST_NOISE:
        low, high = low / 2, low
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spends(middle) <= epsilon else (middle, high)
    return high


def count_rounds(config: Config, client: str, until: int | None = None) -> int:
    """Return in how many rounds a client trains the global adapter, up to one or in all."""
    last = config.federated.num_rounds if until is None else until
    return sum(client in training_clients(config, number) for number in range(1, last + 1))


def most_rounds(config: Config, until: int | None = None) -> int:
    """Return likewise the rounds of the client that trains in most."""
    return max(count_rounds(config, client, until) for client in config.client_ids)


def count_private_steps(
    config: Config, client: str, counts: tuple[int, int], until: int | None = None
) -> int:
    """Return the optimizer steps in which a client trains the global adapter.

    Args:
        counts: its universal and its local examples.
        until: the last round that counts; None: the run's.
    """
    last = config.federated.num_rounds if until is None else until
    return sum(
        count_phase_steps(config, *counts, phase)
        for number in range(1, last + 1)
        if client in training_clients(config, number)
        and (phase := plan_round(config, number).train) is not None
    )


def sampling_of(config: Config, counts: tuple[int, int]) -> Sampling:
    """Return how the steps that train the global adapter draw from a client's examples.

    Args:
        counts: its universal and its local ones.
    """
    phase: Phase | None = plan_round(config, 1).train
    assert phase is not None, "this mode trains no global adapter of several clients"
    records = counts[0] if phase.data == "universal" else sum(counts)
    return Sampling(min(examples_per_step(config.training), records), records)


def noise_multiplier_for(
    config: Config, client: str = "", counts: tuple[int, int] | None = None
) -> float | None:
    """Return the noise multiplier of a run, given or found for its epsilon; None without noise.

    Args:
        client: with unit record, whose.
        counts: with unit record, the client's universal and local examples, of which it has its
            own noise for the same epsilon.

    Raises:
        ConfigError: no noise keeps the run within its epsilon.
    """
    privacy = config.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return privacy.noise_multiplier
    if privacy.unit == "client":
        return find_noise_multiplier(privacy.epsilon, privacy.delta, most_rounds(config))
    assert counts is not None, "a client's own noise follows from its number of examples"
    steps = count_private_steps(config, client, counts)
    if steps == 0:  # it trains in no round
        return find_noise_multiplier(privacy.epsilon, privacy.delta, 1)
    return find_noise_multiplier(privacy.epsilon, privacy.delta, steps, sampling_of(config, counts))


def record_epsilon(
    config: Config, client: str, counts: tuple[int, int], until: int | None = None
) -> float | None:
    """Return what a client's steps spend of a record's privacy; None where there is no noise.

    Args:
        until: the last round that counts; None: the run's.
    """
    multiplier = noise_multiplier_for(config, client, counts)
    if multiplier is None or config.privacy.delta is None:
        return None
    steps = count_private_steps(config, client, counts, until)
    return compute_epsilon(config.privacy.delta, [(multiplier, steps)], sampling_of(config, counts))
