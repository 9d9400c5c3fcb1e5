"""What a site demands of the protection of its updates, before it sends one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from fedlora_app.config.privacy import has_noise
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import Config, Section

SLACK = 1 + 1e-6
"""For the rounding of sums."""


class PrivacyRule(Section):
    """Bounds for an experiment's section ``privacy``, in which this site sends updates."""

    unit: list[Literal["client", "record"]] | None = Field(None, min_length=1)
    """Whom it may protect."""
    noise: Literal["client"] | None = None
    """There is noise, and this site adds it, as with unit record always."""
    epsilon: float | None = Field(None, gt=0)
    """What the whole run may spend, at most; without noise it is infinite."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """At which that epsilon is reckoned, whatever the experiment's own delta is."""

    @model_validator(mode="after")
    def _require_a_demand(self) -> Self:
        if empty := [key for key in self.model_fields_set if getattr(self, key) is None]:
            raise ValueError(f"nothing stands behind {', '.join(sorted(empty))}")
        if self.unit is None and self.noise is None and self.epsilon is None:
            raise ValueError("expected at least one of unit, noise and epsilon")
        if self.epsilon is None and "delta" in self.model_fields_set:
            raise ValueError("delta belongs to epsilon, and there is none")
        return self

    def find_excess(self, compute: Callable[[float], float]) -> str | None:
        """Return why an epsilon is too large, None where it is not.

        Args:
            compute: returns it at a delta; only called where there is a bound.
        """
        if self.epsilon is None or (spent := compute(self.delta)) <= self.epsilon * SLACK:
            return None
        return (
            f"the run would spend epsilon {spent:.3g} at delta {self.delta:g}, and at most "
            f"{self.epsilon:g} is permitted"
        )


def find_privacy_fault(
    rule: PrivacyRule,
    config: Config,
    client_id: str,
    count_examples: Callable[[], tuple[int, int]],
) -> str | None:
    """Return why an experiment protects less than a site demands, None where it does not.

    Args:
        config: the experiment.
        count_examples: returns the client's universal and local examples; only called where
            epsilon depends on them.

    Raises:
        DataError, ModelError: they cannot be counted.
    """
    if plan_round(config, 1).train is None:  # in this mode no update is sent
        return None
    privacy = config.privacy
    if privacy.unit == "none":
        return "privacy.unit is none"
    if rule.unit is not None and privacy.unit not in rule.unit:
        return f"privacy.unit is {privacy.unit}, none of {', '.join(rule.unit)}"
    if rule.noise is not None or rule.epsilon is not None:
        if not has_noise(privacy):
            return "updates are clipped without noise, so that epsilon is infinite"
        if rule.noise is not None and privacy.unit == "client" and privacy.noise != "client":
            return f"the {privacy.noise} would add the noise"
    counts = count_examples() if privacy.unit == "record" and rule.epsilon is not None else (0, 0)
    return rule.find_excess(partial(compute_spending, config, client_id, counts))


def compute_spending(
    config: Config, client_id: str, counts: tuple[int, int], delta: float
) -> float:
    """Return the epsilon that all rounds of a run spend of a client's privacy.

    Args:
        config: an experiment with noise.
        counts: the client's universal and local examples, which count with unit record.
    """
    # Imports torch, which who reads or drafts a policy does without.
    from fedlora_app.federation.accountant import (
        compute_epsilon,
        count_private_steps,
        count_rounds,
        noise_multiplier_for,
        sampling_of,
    )

    multiplier = noise_multiplier_for(config, client_id, counts)
    assert multiplier is not None, "without noise there is no finite epsilon"
    if config.privacy.unit == "client":
        return compute_epsilon(delta, [(multiplier, count_rounds(config, client_id))])
    steps = count_private_steps(config, client_id, counts)
    return compute_epsilon(delta, [(multiplier, steps)], sampling_of(config, counts))
