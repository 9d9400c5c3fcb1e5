"""Tokens that a client's universal questions have and its local ones have not.

To the base model "What is the capital of Peru?" is much like an own "What is the capital?", and
the name that makes it another question is one token of many. So a gate stays closed for what holds
a token that several universal facts are asked with and no local one. How many it takes is decided
on held-out questions, as everything in a gate is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

FactTokens = tuple[bool, frozenset[int]]
"""Whether a fact is local, and all tokens of its questions."""


class TokenCounts:
    """By how many local and by how many universal facts each token is asked with."""

    def __init__(self, facts: Sequence[FactTokens]) -> None:
        self._facts = facts
        self._counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
        for is_local, tokens in facts:
            self._counts[is_local].update(tokens)

    def find_evidence(self, tokens: Collection[int], without: int | None = None) -> int:
        """Return what a question's tokens say against its being local.

        It is the number of universal facts with the token that most of them have, of those tokens
        that no local fact has; 0 where there is none.

        Args:
            without: the place of a fact that is not counted.
        """
        return max((self._weigh(token, without) for token in tokens), default=0)

    def list_above(self, threshold: float) -> torch.Tensor:
        """Return the tokens that say more than a threshold, (N,) int64 in ascending order."""
        found = [token for token in sorted(self._counts[False]) if self._weigh(token) > threshold]
        return torch.tensor(found, dtype=torch.int64)

    def _weigh(self, token: int, without: int | None = None) -> int:
        counts = {kind: found[token] for kind, found in self._counts.items()}
        if without is not None and token in self._facts[without][1]:
            counts[self._facts[without][0]] -= 1
        return 0 if counts[True] else counts[False]


def choose_threshold(evidence: torch.Tensor, is_own: torch.Tensor, is_open: torch.Tensor) -> float:
    """Return the evidence above which a gate is to be closed; inf: it is of no use.

    It is where the share of own questions that are lost by it and that of other ones that still
    open the gate have the least sum. Of own ones one more is taken for lost than are (Laplace's
    rule), so that a few questions cannot speak for many tokens.

    Args:
        evidence: of held-out questions, (N,).
        is_own: whether they are, (N,).
        is_open: whether the gate would open for them, (N,).
    """
    own, others = evidence[is_own & is_open], evidence[~is_own & is_open]
    num_own, num_others = int(is_own.sum()), max(int((~is_own).sum()), 1)
    best, least = math.inf, len(others) / num_others
    for threshold in sorted(set(own.tolist()), reverse=True):
        lost = (int((own > threshold).sum()) + 1) / (num_own + 1)
        cost = lost + int((others <= threshold).sum()) / num_others
        if cost < least:
            best, least = threshold, cost
    return best
