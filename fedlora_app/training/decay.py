"""The local adapter's weight decay, in units of what it does: the share that a phase leaves.

AdamW multiplies every weight by ``1 - learning rate * decay`` in each step (Loshchilov and Hutter
2019, https://arxiv.org/abs/1711.05101), so what a decay does depends on the learning rate and on
the number of steps. The *kept share* is the product of these factors over one local phase: what
decay alone, without gradients, would leave of the adapter. The decay is one number for the whole
run, so that phases at a high learning rate keep less than those at its end; the kept share is
their geometric mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
from scipy.optimize import brentq

from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, Config, TrainingConfig
from fedlora_app.foundation.percent import format_percent
from fedlora_app.training.schedule import learning_rates
from fedlora_app.training.selection import count_phase_steps

ERASES_BELOW, SPARES_ABOVE = 0.1, 0.95
"""Kept shares of a phase outside of which a decay erases the local adapter, or protects nothing."""


def compute_kept_share(
    decay: float, training: TrainingConfig, num_steps: int, num_rounds: int
) -> float:
    """Return the share of an adapter that a weight decay leaves over one phase, 0 to 1.

    Args:
        num_steps: of one phase.
        num_rounds: how many such phases the run has.
    """
    shrinkage = decay * learning_rates(training, num_steps, num_rounds)
    if shrinkage.max() >= 1:  # a single step takes all of it, or more
        return 0.0
    return float(np.exp(np.log1p(-shrinkage).sum() / num_rounds))


def solve_decay(share: float, training: TrainingConfig, num_steps: int, num_rounds: int) -> float:
    """Return the weight decay that leaves this share of an adapter over one phase.

    Exactly: by the product of AdamW's factors, and not by exp(-decay * sum of the learning rates).
    """
    if share == 1:
        return 0.0
    rates = learning_rates(training, num_steps, num_rounds)
    target = num_rounds * np.log(share)
    # No step can lose more than all, nor needs to lose more than the whole run is to lose.
    highest = -np.expm1(max(target, -30.0)) / rates.max()

    def excess(decay: float) -> float:
        return float(np.log1p(-decay * rates).sum() - target)

    # A share that small, in that few steps, is out of reach: this is as good as nothing kept.
    return float(brentq(excess, 0.0, highest, xtol=1e-15) if excess(highest) < 0 else highest)


def choose_decays(
    config: Config, phase: Phase, num_steps: int, num_rounds: int | None = None
) -> dict[str, float]:
    """Return the weight decay of each adapter in a phase of so many steps.

    A local adapter on its own has no global one to spoil, and gets the global one's decay.

    Args:
        num_rounds: that have such a phase; None: all of the run.
    """
    training, num_rounds = config.training, num_rounds or config.federated.num_rounds
    local = training.global_weight_decay
    if GLOBAL in phase.active:
        local = training.local_weight_decay or 0.0
        if training.local_kept_share is not None:
            local = solve_decay(training.local_kept_share, training, num_steps, num_rounds)
    return {GLOBAL: training.global_weight_decay, LOCAL: local}


def describe_decay(config: Config, examples: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield what the local adapter's decay does at the clients, and a warning if that is extreme.

    Args:
        examples: how many universal and local ones each client has.
    """
    training, num_rounds = config.training, config.federated.num_rounds
    phase = _local_phase(config)
    if phase is None or not examples:
        return
    if not (training.local_kept_share or training.local_weight_decay):
        return
    steps = {count_phase_steps(config, *counts, phase) for counts in examples.values()}
    decays = {n: choose_decays(config, phase, n)[LOCAL] for n in sorted(steps)}
    shares = [compute_kept_share(decay, training, n, num_rounds) for n, decay in decays.items()]
    yield (
        f"Of the local adapter, weight decay {_span(decays.values(), '{:.3g}'.format)} alone "
        f"leaves {_span(shares, _percent)} over a phase of {_span(decays, '{:,}'.format)} steps, "
        f"and {_span([share**num_rounds for share in shares], _percent)} over the run's "
        f"{num_rounds}."
    )
    effect = "erases the local adapter" if min(shares) < ERASES_BELOW else ""
    effect = effect or ("protects next to nothing" if max(shares) > SPARES_ABOVE else "")
    if training.local_weight_decay and effect:
        yield (
            f"Warning: training.local_weight_decay {training.local_weight_decay:g} {effect}. Say "
            "what is to be left of it instead, with training.local_kept_share (0.5, for instance)."
        )


def _local_phase(config: Config) -> Phase | None:
    """Return the phase in which the local adapter learns beside the global one, if any."""
    plan = plan_round(config, 1)
    for phase in (plan.train, plan.personalise):
        if phase is not None and LOCAL in phase.trainable and GLOBAL in phase.active:
            return phase
    return None


def _percent(share: float) -> str:
    return format_percent(share, unit=" %", digits=0 if share >= 0.1 else 2)


def _span(values: Collection[float], form: Callable[[float], str]) -> str:
    """Return "20" or "20 to 35"."""
    ends = dict.fromkeys(form(value) for value in (min(values), max(values)))
    return " to ".join(ends)
