"""What a run's differential privacy is worth, in words: for the block that opens it, and for plans.

A figure comes with what it assumes, and a protection that protects nothing is called that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fedlora_app.config.participation import training_clients
from fedlora_app.config.privacy import has_noise
from fedlora_app.config.schema import Config, PrivacyConfig
from fedlora_app.config.sharing import of_factors, travelling_factors
from fedlora_app.federation.accountant import (
    compute_epsilon,
    count_private_steps,
    most_rounds,
    noise_multiplier_for,
    record_epsilon,
    sampling_of,
)
from fedlora_app.federation.privacy import bound_cosine
from fedlora_app.model.ranks import resize_ranks

LARGEST_EPSILON = 10.0
"""Above it odds of e to the epsilon are no protection that anybody would notice."""
SMALLEST_COSINE = 0.1
TRUSTED = {
    "server": "the server is trusted, and nobody else has its secret.key",
    "client": "the server need not be trusted, and nobody has a client's secret.key",
}
NOT_COVERED = "Not covered: counts, scores and losses that clients report, local adapters"


def describe_privacy(
    config: Config, num_values: int, counts: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Yield what the settings protect, by how much, under which assumptions, and warnings.

    Args:
        num_values: numbers of the global adapter that travel in a round.
        counts: each client's universal and local examples, of those that are known.

    Raises:
        ConfigError: no noise keeps the run within its epsilon.
    """
    if config.privacy.unit == "client":
        yield from _describe_clients(config, num_values)
    elif config.privacy.unit == "record":
        yield from _describe_records(config, counts)


def describe_assumptions(privacy: PrivacyConfig) -> Iterator[str]:
    """Yield what an epsilon takes for granted, and what it says nothing of."""
    if privacy.unit == "client":
        yield (
            "Assumed: a client is compared with one whose updates are zero; who trains is known, "
            f"so nothing is gained by sampling; {TRUSTED[privacy.noise]}"
        )
        measured = ", what the history measures without noise"
        yield NOT_COVERED + measured * (privacy.noise == "server")
    elif privacy.unit == "record":
        yield (
            "Assumed: one record against an empty one in its place, of those that train the global "
            "adapter, whose number is known; each step draws every one with the same chance, in "
            "secret"
        )
        yield f"{NOT_COVERED}, several records about one person or fact"


def count_travelling(config: Config, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return how many numbers of the global adapter travel in a round, at most.

    Args:
        shapes: of all its tensors.
    """
    learning = resize_ranks(dict(shapes), config.adapters.global_.rank)
    rounds = range(1, min(2, config.federated.num_rounds) + 1)  # rules may alternate
    sent = (of_factors(learning, travelling_factors(config, number)) for number in rounds)
    return max(sum(map(math.prod, part.values())) for part in sent)


def _describe_clients(config: Config, num_values: int) -> Iterator[str]:
    privacy = config.privacy
    clip = f"unit client: each update as a whole is clipped to norm {privacy.clip_norm:g}"
    multiplier = noise_multiplier_for(config)
    if multiplier is None or privacy.delta is None or privacy.clip_norm is None:
        yield f"{clip}, without noise"
        yield _without_noise()
        return
    rounds, clients = most_rounds(config), _fewest_clients(config)
    deviation, share, whom = multiplier * privacy.clip_norm, "", "each update"
    if privacy.noise == "server":
        deviation, share, whom = deviation / clients, f" / {clients}", "the mean"
    epsilon = compute_epsilon(privacy.delta, [(multiplier, rounds)])
    cosine = bound_cosine(multiplier, num_values, clients, privacy.noise)
    yield (
        f"{clip}; noise by the {privacy.noise} on {num_values:,} numbers of {whom}: "
        f"{multiplier:.4g} x {privacy.clip_norm:g}{share} = {deviation:.3g}"
    )
    yield f"epsilon {epsilon:.3g} at delta {privacy.delta:g} after {_rounds(rounds)} of training"
    yield from describe_assumptions(privacy)
    yield f"Expected cosine of the mean with its noise and without it: at most {cosine:.2g}"
    if cosine < SMALLEST_COSINE:
        yield (
            f"Warning: what {clients} clients have in common is lost in this noise "
            f"({math.sqrt(num_values) * deviation / _spread(config, clients):.3g} long, where the "
            f"mean of their updates is at most {privacy.clip_norm:g}), so that little can be "
            "learnt. More clients, a smaller adapter, less noise, or privacy.unit: record."
        )
    yield from _warn_of_epsilon(epsilon, f"{clients} clients")
    yield from _warn_of_delta(privacy.delta, len(config.client_ids), "clients")


def _describe_records(config: Config, counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    privacy = config.privacy
    clip = f"unit record: each example's gradient is clipped to norm {privacy.clip_norm:g}"
    if not has_noise(privacy) or privacy.delta is None:
        yield f"{clip}, without noise"
        yield _without_noise()
        return
    yield f"{clip}; noise by the client on the sum of each step's gradients"
    largest = 0.0
    for client, own in sorted(counts.items()):
        epsilon, sampling = record_epsilon(config, client, own), sampling_of(config, own)
        multiplier = noise_multiplier_for(config, client, own)
        largest = max(largest, epsilon or 0.0)
        yield (
            f"{client}: epsilon {epsilon:.3g} at delta {privacy.delta:g} after "
            f"{count_private_steps(config, client, own):,} steps of {sampling.per_step} of "
            f"{sampling.records} records, with noise multiplier {multiplier:.4g}"
        )
        yield from _warn_of_delta(privacy.delta, sampling.records, f"records of {client}")
    yield from describe_assumptions(privacy)
    yield from _warn_of_epsilon(largest, "a record")


def _without_noise() -> str:
    return (
        "Warning: without noise epsilon is infinite. Clipping bounds what one can do to the rest, "
        "and hides nothing."
    )


def _warn_of_epsilon(epsilon: float, who: str) -> Iterator[str]:
    if epsilon > LARGEST_EPSILON:
        yield (
            f"Warning: an epsilon of {epsilon:.3g} protects next to nothing: {who} cannot be "
            f"hidden by this noise. To get below {LARGEST_EPSILON:g} it takes more noise, fewer "
            "rounds, or steps that draw from more records."
        )


def _warn_of_delta(delta: float, units: int, what: str) -> Iterator[str]:
    if delta * units >= 1:
        yield (
            f"Warning: privacy.delta {delta:g} is not below one over {units} {what}: it permits "
            "telling everything of one of them."
        )


def _fewest_clients(config: Config) -> int:
    """Return how many clients train in the round that has fewest of them."""
    rounds = range(1, config.federated.num_rounds + 1)
    return min(len(training_clients(config, number)) for number in rounds)


def _spread(config: Config, clients: int) -> float:
    """Return by how much averaging shrinks noise that is on every update already."""
    return math.sqrt(clients) if config.privacy.noise == "client" else 1.0


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"
