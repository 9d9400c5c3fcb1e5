"""What a client's own noise has spent in a run, which it counts for itself in its own folder.

Epsilon holds for the rounds that were planned. A server that asks for one of them again, with
another adapter or other settings, gets another answer with other noise, and each of them tells
something. The same bytes once more tell nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedlora_app.config.privacy import has_noise, protects_at
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import Config, PrivacyConfig
from fedlora_app.federation.accountant import (
    Sampling,
    compute_epsilon,
    noise_multiplier_for,
    sampling_of,
)
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.privacy import hash_state
from fedlora_app.foundation.files import extend_atomically
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.spending import BUDGET_SLACK
from fedlora_app.training.selection import count_phase_steps


@dataclass(frozen=True)
class OwnRelease:
    """An update with its client's own noise in it."""

    server_round: int
    unit: str
    noise_multiplier: float
    steps: int
    """In which there was noise; with unit client 1."""
    per_step: int
    """Records that a step takes of so many; with unit client 1 of 1."""
    records: int
    sha256: str
    """Of the update."""


def describe_release(
    config: Config,
    client: str,
    server_round: int,
    update: AdapterState,
    count_examples: Callable[[], tuple[int, int]],
) -> OwnRelease | None:
    """Return what a round's update spends; None where the client adds no noise.

    Args:
        count_examples: returns the client's universal and local examples; called with unit record.

    Raises:
        DataError, ModelError: they cannot be counted.
    """
    unit, sha256 = config.privacy.unit, hash_state(update)
    if not has_noise(config.privacy):
        return None
    if protects_at(config.privacy, "client"):
        multiplier = noise_multiplier_for(config)
        return OwnRelease(server_round, unit, multiplier, 1, 1, 1, sha256)
    phase = plan_round(config, server_round).train
    if unit != "record" or phase is None:
        return None
    counts = count_examples()
    multiplier, sampling = noise_multiplier_for(config, client, counts), sampling_of(config, counts)
    steps, drawn = count_phase_steps(config, *counts, phase), (sampling.per_step, sampling.records)
    return OwnRelease(server_round, unit, multiplier, steps, *drawn, sha256)


@dataclass(frozen=True)
class OwnSpending:
    """The list of a client's releases in a run."""

    path: Path

    def compute(self, release: OwnRelease, delta: float) -> float:
        """Return the epsilon that is spent once a release has left, with all before it.

        Raises:
            RunDirectoryError: the list is damaged.
        """
        releases = {*self._read(), release}
        if len({one.unit for one in releases}) > 1:
            return math.inf  # an epsilon of clients and one of records have no sum
        counts: Counter[float] = Counter()
        for one in releases:
            counts[one.noise_multiplier] += one.steps
        drawn = [Sampling(one.per_step, one.records) for one in releases]
        # A higher chance spends more, so that the highest one bounds all.
        sampling = None if release.unit == "client" else max(drawn, key=lambda of: of.rate)
        return compute_epsilon(delta, sorted(counts.items()), sampling)

    def require_within(self, release: OwnRelease, privacy: PrivacyConfig) -> None:
        """Raise ``MessageError`` where more than the experiment's own epsilon would be spent."""
        if privacy.epsilon is None or privacy.delta is None:
            return
        spent = self.compute(release, privacy.delta)
        if spent > privacy.epsilon * (1 + BUDGET_SLACK):
            raise MessageError(
                f"Round {release.server_round}: with this update epsilon {spent:.3g} would have "
                f"been spent, and privacy.epsilon is {privacy.epsilon:g}. The server has asked for "
                "a round more than once, with other adapters or settings. The update was not sent. "
                "Use the last complete round, or start a new run."
            )

    def note(self, release: OwnRelease) -> None:
        """Enter what is about to leave, unless the same has left before."""
        if release not in self._read():
            extend_atomically(self.path, json.dumps(vars(release)) + "\n")

    def _read(self) -> list[OwnRelease]:
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            return [OwnRelease(**json.loads(line)) for line in text.splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise RunDirectoryError(
                f"{self.path} cannot be read ({type(error).__name__}). Expected what this client's "
                "updates have spent of its privacy. Restore it, or start a new run."
            ) from None
