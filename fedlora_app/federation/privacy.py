"""Differential privacy of whole clients: updates of bounded norm, and Gaussian noise.

With updates d_k of norm at most C, the mean over n clients changes by at most C / n where one of
them is taken for zero. *server* (McMahan et al. 2018, https://arxiv.org/abs/1710.06963, with the
number of clients public): mean_k d_k + N(0, (z C / n)^2) on every number that travels. *client*:
each sends d_k + N(0, (z C)^2), and nobody sees it without.

The noise is of a secret key (``foundation.secret_noise``), of the round, and *of what it hides*: a
hash of the clipped updates. Where a round is computed again from the same updates, as after a stop,
it is the same noise, and nothing new is told. Where it is computed from others, as when a client
failed the first time, or when ``fedlora forget`` leaves one out, it is other noise: the difference
of two results with one and the same noise would be that client's update, bare.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from fedlora_app.config.privacy import protects_at
from fedlora_app.config.schema import Config
from fedlora_app.federation.accountant import noise_multiplier_for
from fedlora_app.foundation.secret_noise import gaussian
from fedlora_app.model.adapter_state import AdapterState, compute_norm

ROUNDING = 2.0**-22
"""How far below the bound an update is clipped, relatively, so that fp32 keeps it below."""


@dataclass(frozen=True)
class Release:
    """A mean with noise: who is in it, and what tells it from others."""

    server_round: int
    clients: tuple[str, ...]
    noise_multiplier: float
    sha256: str
    """Of the updates that it was made of."""


def clip_update(update: AdapterState, clip_norm: float) -> AdapterState:
    """Return an update of at most that L2 norm, over all tensors together.

    One that is no longer is returned as it is.
    """
    norm = compute_norm(update)
    if norm <= clip_norm:
        return update
    factor = clip_norm * (1 - ROUNDING) / norm
    return {key: (tensor.double() * factor).float() for key, tensor in update.items()}


def protect_update(
    update: AdapterState, config: Config, server_round: int, read_key: Callable[[], bytes]
) -> AdapterState:
    """Return an update as it may leave its client: clipped, and with noise where there is any.

    Args:
        read_key: returns the client's secret key.
    """
    privacy = config.privacy
    clipped = clip_update(update, privacy.clip_norm or math.inf)
    multiplier = noise_multiplier_for(config)
    if multiplier is None:
        return clipped
    deviation = multiplier * (privacy.clip_norm or math.inf)
    purpose = ("client", server_round, hash_state(clipped))
    return _add_noise(clipped, deviation, read_key(), purpose)


class MeanProtection:
    """Clips every update at the server, and adds noise to their mean.

    After ``add_noise``, ``figures`` are the round's, and ``release`` says what there is noise in.

    Args:
        key: the server's secret one; it must be there where noise is to be added.
    """

    def __init__(self, config: Config, key: bytes | None) -> None:
        self._clip_norm = config.privacy.clip_norm or math.inf
        self._multiplier = noise_multiplier_for(config)
        self._key = key
        self.begin(0)

    def begin(self, server_round: int) -> None:
        """Start a round."""
        self._round = server_round
        self._hashes: dict[str, str] = {}
        self._num_clipped = 0
        self.figures: dict[str, float] = {}
        self.release: Release | None = None

    def clip(self, update: AdapterState) -> AdapterState:
        """Return an update that is not longer than the bound."""
        return clip_update(update, self._clip_norm)

    def note(self, client: str, update: AdapterState, clipped: AdapterState) -> None:
        """See an update that has been folded in, as it came and as it was clipped."""
        self._num_clipped += clipped is not update
        self._hashes[client] = hash_state(clipped)

    def add_noise(self, received: AdapterState, mean: AdapterState) -> AdapterState:
        """Return the new adapter with noise on every number that has travelled.

        Args:
            received: the adapter that the clients started from.
            mean: with the mean of their updates; tensors that are those of ``received``
                themselves have not travelled, and stay.
        """
        count = len(self._hashes)
        self.figures = {"clipped_share": self._num_clipped / count}
        if self._multiplier is None:
            return mean
        if self._key is None:
            raise ValueError("The server's noise needs the run's secret key, and there is none.")
        moved = {key: tensor for key, tensor in mean.items() if tensor is not received[key]}
        deviation = self._multiplier * self._clip_norm / count
        hashes = json.dumps(sorted(self._hashes.items()))
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        noisy = _add_noise(moved, deviation, self._key, ("server", self._round, sha256))
        self.figures["noised_cosine"] = _compare_steps(received, moved, noisy)
        clients = tuple(sorted(self._hashes))
        self.release = Release(self._round, clients, self._multiplier, sha256)
        return mean | noisy


def build_protection(config: Config, key: bytes | None) -> MeanProtection | None:
    """Return what a server does with updates, None where it takes them as they come."""
    return MeanProtection(config, key) if protects_at(config.privacy, "server") else None


def bound_cosine(noise_multiplier: float, num_values: int, num_clients: int, noise: str) -> float:
    """Return the cosine between a mean with noise and without that is to be expected at best.

    It is that of the longest mean there can be, of ``num_clients`` equal updates of norm C.

    Args:
        num_values: numbers of the adapter that travel.
        noise: who adds it, "server" or "client"; the sum of the clients' own is larger.
    """
    spread = num_clients if noise == "server" else math.sqrt(num_clients)
    return 1 / math.hypot(1, noise_multiplier * math.sqrt(num_values) / spread)


def _add_noise(
    state: AdapterState, deviation: float, key: bytes, purpose: tuple[str | int, ...]
) -> AdapterState:
    """Return a state with Gaussian noise of that standard deviation on each of its numbers."""
    # With the deviation among what decides the numbers, the same ones never come in two sizes, of
    # which the difference of two results would take them away.
    what = (*purpose, deviation.hex())
    return {
        name: (
            tensor.double() + deviation * gaussian(key, *what, name, shape=tuple(tensor.shape))
        ).float()
        for name, tensor in state.items()
    }


def hash_state(state: AdapterState) -> str:
    """Return the sha256 of a state's names, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        total.update(json.dumps([name, list(tensor.shape)]).encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def _compare_steps(received: AdapterState, one: AdapterState, other: AdapterState) -> float:
    """Return the cosine between two steps from the same adapter, 0 where one stands still."""
    product, squares, other_squares = 0.0, 0.0, 0.0
    for key in one:
        before = received[key].double()
        step, other_step = (one[key].double() - before, other[key].double() - before)
        product += (step * other_step).sum().item()
        squares += step.square().sum().item()
        other_squares += other_step.square().sum().item()
    lengths = math.sqrt(squares * other_squares)
    return product / lengths if lengths else 0.0
