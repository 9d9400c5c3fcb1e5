"""How much of planted secrets an adapter remembers: the exposure of canaries.

A canary's secret was drawn from a space of numbers that are all alike. The model is asked for the
log-likelihood of the answer with the secret, and of the same answer with other numbers of the
space; where the secret stands among them is its rank, and log2(how many) - log2(rank) its exposure
in bits (Carlini et al. 2019, section 4, https://arxiv.org/abs/1802.08232). To a model that was not
trained on the record every rank is as likely as any other, whatever else it has learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats
from transformers import PreTrainedTokenizerBase

from fedlora_app.data.canaries import Canary, draw_alternatives, say
from fedlora_app.data.records import DataError
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation.scoring import Prompt
from fedlora_app.evaluation.statistics import proportion

NUM_ALTERNATIVES = 999


@dataclass(frozen=True)
class Lineup:
    """A canary among others: its question, and as candidates its own answer first."""

    canary: Canary
    prompt: Prompt


@dataclass(frozen=True)
class Exposure:
    """Where a canary stands among its alternatives."""

    rank: float
    """1: its answer is the likeliest of all. Of equal ones each has the middle rank."""
    bits: float


def build_lineups(
    tokenizer: PreTrainedTokenizerBase,
    canaries: Sequence[Canary],
    system_prompt: str,
    *,
    max_seq_length: int,
    seed: int,
    num_alternatives: int = NUM_ALTERNATIVES,
) -> list[Lineup]:
    """Return what to score for a client's canaries, as ``score_prompts`` takes it.

    Args:
        system_prompt: the client's, as in training.
        max_seq_length: at which training has cut examples.
        seed: of the alternatives.

    Raises:
        DataError: training has cut a secret off, so that its rank would tell nothing.
    """
    for canary in canaries:
        length = len(encode_example(tokenizer, system_prompt, canary.record).input_ids)
        if length > max_seq_length:
            raise DataError(
                f"The canary of {canary.client} about case {canary.case} has {length} tokens, and "
                f"training cut it at training.max_seq_length: {max_seq_length}. Raise that, and "
                "train again."
            )
    return [
        Lineup(
            canary,
            Prompt(
                system_prompt,
                canary.record.instruction,
                tuple(
                    say(secret)
                    for secret in (
                        canary.secret,
                        *draw_alternatives(canary, num_alternatives, seed),
                    )
                ),
                generates=False,
            ),
        )
        for canary in canaries
    ]


def compute_exposure(log_likelihoods: Sequence[float]) -> Exposure:
    """Return a canary's exposure.

    Args:
        log_likelihoods: of its own answer, and then of the alternatives'.

    Raises:
        ValueError: one is not a number, or there is no alternative.
    """
    own, *others = log_likelihoods
    if not others or any(map(math.isnan, log_likelihoods)):
        raise ValueError("Exposure needs the log-likelihoods of a canary and of alternatives.")
    rank = 1 + sum(other > own for other in others) + sum(other == own for other in others) / 2
    return Exposure(rank, math.log2(len(log_likelihoods)) - math.log2(rank))


def chance_exposure(num_candidates: int) -> float:
    """Return the mean exposure where every rank is as likely as any other, in bits.

    log2(N) - log2(N!) / N, which is just below log2(e) = 1.44 where N is large.
    """
    return math.log2(num_candidates) - math.lgamma(num_candidates + 1) / (
        num_candidates * math.log(2)
    )


def measure_exposure(log_likelihoods: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean exposure of canaries, with chance beside it.

    The interval counts canaries, each of which is a fact of its own: that of a share, Wilson's,
    since an exposure is between 0 and its maximum. ``p_value`` is one-sided, that ranks are
    random: an exposure of a random rank in nats is never above a standard exponential variable
    (rank = the next whole number above N times a uniform one), so that of n of them the sum is
    held against a gamma distribution. ``mean``, ``p_value`` and ``ranked_first`` are None or
    empty without any canary.

    Args:
        log_likelihoods: per canary, as for ``compute_exposure``; all of one length.
    """
    found = [compute_exposure(values) for values in log_likelihoods]
    lengths = {len(values) for values in log_likelihoods}
    if len(lengths) > 1:
        raise ValueError(f"Canaries have {min(lengths)} to {max(lengths)} candidates, not equal.")
    num_candidates = lengths.pop() if lengths else 0
    most = math.log2(num_candidates) if found else 0.0
    mean = proportion([exposure.bits / most for exposure in found])
    total = sum(exposure.bits for exposure in found) * math.log(2)
    if mean.value is not None:
        mean = replace(mean, value=mean.value * most, low=mean.low * most, high=mean.high * most)
    return {
        "mean": mean.dump(),
        "chance": chance_exposure(num_candidates) if found else None,
        "maximum": most if found else None,
        "p_value": float(stats.gamma.sf(total, len(found))) if found else None,
        "ranked_first": proportion([float(exposure.rank == 1) for exposure in found]).dump(),
        "n_candidates": num_candidates,
        "ranks": [exposure.rank for exposure in found],
    }
