"""What several senders and rounds say together: sums over rounds, means over senders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fedlora_app.attacks.results import AVERAGE, OTHERS, UPDATE
from fedlora_app.evaluation.membership import Candidate

Scored = dict[str, dict[str, dict[Candidate, float]]]
"""By attack and sender, every candidate's score."""
TokenScores = dict[str, dict[str, np.ndarray]]
"""By sender and attack, every token's score."""


def by_source(
    by_sender: Mapping[str, Any], client: str, mean: Callable
) -> Iterator[tuple[str, Any]]:
    """Yield what each source says of a client: its own update, the others' and the average."""
    if client in by_sender:
        yield UPDATE, by_sender[client]
    others = [found for sender, found in by_sender.items() if sender not in (client, AVERAGE)]
    if others:
        yield OTHERS, mean(others)
    if AVERAGE in by_sender:
        yield AVERAGE, by_sender[AVERAGE]


def mean_scores(found: list[dict[Candidate, float]]) -> dict[Candidate, float]:
    """Return every candidate's mean over senders."""
    return {candidate: sum(f[candidate] for f in found) / len(found) for candidate in found[0]}


def mean_tokens(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return every token's mean over senders, by the attacks that all of them allow."""
    shared = [attack for attack in found[0] if all(attack in f for f in found)]
    return {attack: np.mean([f[attack] for f in found], axis=0) for attack in shared}


def add_scores(rounds: list[Scored]) -> Scored:
    """Return the sums over the rounds in which each sender sent something."""
    total: Scored = {}
    for scored in rounds:
        for attack, by_sender in scored.items():
            for sender, scores in by_sender.items():
                sums = total.setdefault(attack, {}).setdefault(sender, dict.fromkeys(scores, 0.0))
                for candidate, value in scores.items():
                    sums[candidate] += value
    return total


def add_tokens(rounds: list[TokenScores]) -> TokenScores:
    """Return the sums over the rounds in which each sender sent something."""
    total: TokenScores = {}
    for by_sender in rounds:
        for sender, scores in by_sender.items():
            sums = total.setdefault(sender, {})
            for attack, values in scores.items():
                sums[attack] = sums.get(attack, 0) + values
    return total
