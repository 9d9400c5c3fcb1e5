"""What epsilon allows an attack, and whether one reached more: then the noise is not what it says.

An (epsilon, delta) guarantee holds a test that tells a unit's presence to TPR <= e^eps FPR + delta
(Kairouz et al. 2015, https://arxiv.org/abs/1311.0776, theorem 2.1), and so its AUC. Members and
non-members here were not assigned by lot, so that a set may be easier or harder than that; the
others' updates show by how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlora_app.attacks.results import AVERAGE, FACTS, UPDATE
from fedlora_app.config.privacy import has_noise
from fedlora_app.config.schema import Config
from fedlora_app.data.questions import UNIVERSAL
from fedlora_app.federation.accountant import (
    compute_epsilon,
    most_rounds,
    noise_multiplier_for,
    record_epsilon,
)


def find_limit(config: Config, counts: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    """Return what a run's settings allow, None without noise.

    A client's data against other data of it, and not against none, are two units apart.

    Args:
        counts: every client's universal and local examples.

    Returns:
        epsilon and delta of the whole run; the ``set`` and the ``source`` that they bound, and
        ``auc``, the largest that is allowed there.
    """
    privacy = config.privacy
    if privacy.unit == "none" or not has_noise(privacy) or privacy.delta is None:
        return None
    if privacy.unit == "record":
        found = [record_epsilon(config, client, counts[client]) for client in counts]
        epsilon = max(value for value in found if value is not None)
        where, units = {"set": UNIVERSAL, "source": UPDATE}, 1
    else:
        releases = [(noise_multiplier_for(config), most_rounds(config))]
        epsilon = compute_epsilon(privacy.delta, releases)
        where, units = {"set": FACTS, "source": UPDATE}, 2
        if privacy.noise == "server":
            where["source"] = AVERAGE
    about = {"unit": privacy.unit, "epsilon": epsilon, "delta": privacy.delta}
    return about | where | {"auc": largest_auc(epsilon, privacy.delta, units)}


def largest_auc(epsilon: float, delta: float, units: int = 1) -> float:
    """Return the largest AUC of a test that tells neighbours apart, so many units away.

    The area below TPR = min(e^eps FPR + delta, 1 - e^-eps (1 - delta - FPR), 1), with epsilon and
    delta of a group of that size (Dwork and Roth 2014, theorem 2.2 and its proof).
    """
    total_delta = min(1.0, sum(math.exp(min(k * epsilon, 700.0)) for k in range(units)) * delta)
    ratio = math.exp(-min(units * epsilon, 700.0))
    # The two lines meet where FPR = 1 - TPR, and the upper one reaches 1 at FPR = 1 - delta.
    corner = (1 - total_delta) * ratio / (1 + ratio)
    rising = corner * (total_delta + 1 - corner) / 2
    flat = (1 - total_delta - corner) * (1 - corner + 1) / 2
    return rising + flat + total_delta
