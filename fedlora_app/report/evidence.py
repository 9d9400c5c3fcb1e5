"""Whether two adapters and one differ: over the same facts, over seeds, or by their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.evaluation.statistics import (
    NOTHING,
    Estimate,
    mcnemar,
    over_seeds,
    paired_difference,
)
from fedlora_app.report.numbers import Figures, share_of_questions

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Paired:
    """A difference over the same questions, and an exact test of it."""

    difference: Estimate
    p_value: float
    test: str = "McNemar's test"

    @property
    def sign(self) -> int:
        """1 or -1 where both tell the difference from none, else 0."""
        low, high = self.difference.low, self.difference.high
        if low is None or self.p_value >= SIGNIFICANT:
            return 0
        return (low > 0) - (high < 0)


def pair_records(pairs: Sequence[tuple[Figures, Figures]]) -> Paired | None:
    """Return the difference over the same conflict records, run by run.

    Facts are the unit, because paraphrases of one are not independent: they are resampled whole,
    and the test is the sign test over them. Over several runs the interval is the wider of that
    and Student's t. None unless the facts are known and all were asked the same records.
    """
    facts = pairs[0][0].facts
    if not facts or any(run.verdicts.keys() != facts.keys() for pair in pairs for run in pair):
        return None
    clusters = [facts[record] for _ in pairs for record in facts]
    ones = [two.verdicts[record] for two, _ in pairs for record in facts]
    others = [one.verdicts[record] for _, one in pairs for record in facts]
    difference = paired_difference(ones, others, clusters)
    if len(pairs) > 1:
        by_seed = over_seeds([two.passed().value - one.passed().value for two, one in pairs])
        difference = _widen(difference, by_seed, lowest=-1.0)
    won = dict.fromkeys(clusters, 0)
    for fact, one, other in zip(clusters, ones, others, strict=True):
        won[fact] += one - other
    test = mcnemar([n > 0 for n in won.values()], [n < 0 for n in won.values()])
    return Paired(difference, test["p_value"], "sign test over facts")


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over runs, as wide as the seeds or the distinct questions make it."""
    if len(estimates) == 1:
        return estimates[0]
    if not all(estimate.n for estimate in estimates):
        return NOTHING
    by_seed = over_seeds([estimate.value for estimate in estimates])
    questions = share_of_questions(by_seed.value, min(estimate.n for estimate in estimates))
    return _widen(questions, by_seed, lowest=0.0)


def compare_intervals(two: Estimate, one: Estimate) -> int:
    """Return 1 or -1 where the intervals do not overlap, else 0."""
    return (two.low > one.high) - (two.high < one.low)


def _widen(one: Estimate, other: Estimate, lowest: float) -> Estimate:
    low, high = max(lowest, min(one.low, other.low)), min(1.0, max(one.high, other.high))
    return Estimate(one.value, low, high, one.n)
