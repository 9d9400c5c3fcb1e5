"""Intervals and tests for proportions, all at 95 % and always with their n.

Paraphrases of one fact go the same way more often than not, so the unit is the fact: a share has
Wilson's interval for as many questions as its answers are worth, a difference is made of two
such intervals, and a test flips the signs of whole facts. Where every question is a fact of its
own these are Wilson's interval, Newcombe's and McNemar's test. `docs/evaluation.md` has what a
simulation says of their coverage, and `tests/evaluation/test_coverage.py` holds it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # p-values below it
NORMAL_QUANTILE = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
NUM_RESAMPLES = 9_999
ROUNDING = 1e-12  # differences below it are those of floating-point sums


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and the numbers of questions and facts behind it.

    A question that several clients answer counts once, as does a fact that several questions
    are about. ``facts`` is None where it is not known, or where ``n`` counts something else.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    facts: int | None = None

    def dump(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def widen(self, other: Estimate, lowest: float) -> Estimate:
        """Return this value with an interval that holds the other's too, within [lowest, 1]."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return replace(self, low=max(lowest, low), high=min(1.0, high))

    def differs_from(self, other: Estimate) -> int:
        """Return 1 or -1 where the intervals do not overlap, else 0."""
        return (self.low > other.high) - (self.high < other.low)


NOTHING = Estimate(None, None, None, 0)


def proportion(
    outcomes: Sequence[float],
    facts: Sequence[Hashable] | None = None,
    questions: Sequence[Hashable] | None = None,
) -> Estimate:
    """Return the mean of outcomes in [0, 1] with an interval that counts facts.

    Args:
        facts: what each outcome is about; left out, each is about a fact of its own.
        questions: what was asked; left out, each outcome is of another question.

    Raises:
        ValueError: an outcome outside [0, 1], or lists of several lengths.
    """
    if len(outcomes) == 0:
        return NOTHING
    sums, sizes = _group(outcomes, facts)
    n = len(outcomes if questions is None else set(questions))
    return _share(sums, sizes, n)


def share_of_facts(value: float, n: int, facts: int | None = None) -> Estimate:
    """Return a mean of which no more is known than how many questions and facts it is over.

    As wide as if the answers about a fact agreed entirely; with ``facts`` unknown as if every
    question were a fact of its own. Of the facts of a larger set no more than ``n`` count.

    Raises:
        ValueError: the mean is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"A share of {n} questions is {value}, expected 0 to 1.")
    facts = None if facts is None else min(facts, n)
    return Estimate(value, *_wilson(value, facts or n), n, facts)


def paired_difference(
    ones: Sequence[float],
    others: Sequence[float],
    facts: Sequence[Hashable],
    questions: Sequence[Hashable] | None = None,
) -> Estimate:
    """Return the mean of ``ones - others``, paired outcomes in [0, 1], with its interval.

    The interval is made of those of the two shares, by how the facts go together in both
    (method 10 without its continuity correction of Newcombe 1998, Statistics in Medicine
    17:2635-2650; the same as MOVER, Zou 2008, https://doi.org/10.1093/aje/kwm283). Where all
    differences agree it is as wide as Wilson's for none of that many facts. Outcomes outside
    [0, 1], nats for instance, have Student's interval over facts, and none where all agree.
    """
    if len(ones) == 0:
        return NOTHING
    (sums, sizes), (other_sums, _) = _group(ones, facts), _group(others, facts)
    count, num_facts = len(ones if questions is None else set(questions)), len(sums)
    mean = float((sums - other_sums).sum() / sizes.sum())
    are_shares = min(*ones, *others) >= 0 and max(*ones, *others) <= 1
    if np.ptp((sums - other_sums) / sizes) < ROUNDING:
        width = _wilson(0.0, num_facts)[1] if are_shares else None
        low, high = (None, None) if width is None else (mean - width, mean + width)
    elif are_shares:
        shares = [_share(part, sizes, count) for part in (sums, other_sums)]
        low, high = _combine(*shares, _correlate(sums, other_sums, sizes))
    else:
        error = math.sqrt(_variance(sums - other_sums, sizes))
        width = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, num_facts - 1))
        return Estimate(mean, mean - width, mean + width, count, num_facts)
    if low is not None:
        low, high = max(-1.0, low), min(1.0, high)
    return Estimate(mean, low, high, count, num_facts)


def flip_signs(
    ones: Sequence[float], others: Sequence[float], facts: Sequence[Hashable], seed: int = 0
) -> float:
    """Return the two-sided p-value of a paired difference, by flipping the signs of facts.

    Fisher's randomization test: if two models do not differ, swapping their answers about any
    fact is as likely as not. Exact where the outcomes are whole numbers, right and wrong for
    instance, and then McNemar's exact test if every fact has one question; else exact for up
    to 13 facts that differ and drawn for more.
    """
    if len(ones) == 0:
        return 1.0
    differences = _group(ones, facts)[0] - _group(others, facts)[0]
    differences = differences[np.abs(differences) > ROUNDING]
    if len(differences) == 0:
        return 1.0
    if not np.all(differences == np.round(differences)):
        return _draw_signs(differences, seed)
    chances = np.ones(1)  # of each sum from -total to total, in steps of 1
    for size in np.abs(differences).astype(int):
        chances = np.convolve(chances, [0.5, *[0.0] * (2 * size - 1), 0.5])
    reached = np.abs(np.arange(len(chances)) - len(chances) // 2)
    p_value = chances[reached >= abs(differences.sum())].sum()
    return min(1.0, float(p_value))


def _draw_signs(differences: np.ndarray, seed: int) -> float:
    result = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=1_000,
        rng=seed,
    )
    return float(result.pvalue)


def _group(
    values: Sequence[float], facts: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return by fact the sum and the number of its values."""
    if facts is None:
        return np.array(values, dtype=float), np.ones(len(values))
    if len(values) != len(facts):
        raise ValueError(f"{len(values)} outcomes of {len(facts)} questions, expected as many.")
    positions = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    indices = [positions[fact] for fact in facts]
    weights = np.array(values, dtype=float)
    return np.bincount(indices, weights), np.bincount(indices).astype(float)


def _share(sums: np.ndarray, sizes: np.ndarray, n: int) -> Estimate:
    """Return a mean with Wilson's interval for as many questions as its answers are worth."""
    value = float(sums.sum() / sizes.sum())
    if not -ROUNDING <= value <= 1 + ROUNDING:
        raise ValueError(f"A share is {value}, expected 0 to 1.")
    value = min(1.0, max(0.0, value))
    return Estimate(value, *_wilson(value, _effective_n(value, sums, sizes, n)), n, len(sums))


def _effective_n(value: float, sums: np.ndarray, sizes: np.ndarray, n: int) -> float:
    """Return how many independent questions a mean over facts is worth.

    What it takes for the variance that the facts show (Kish 1965, Survey Sampling; Korn and
    Graubard 1998), yet no fewer than if the answers about each fact agreed entirely, and no
    more than were asked. Where all answers are the same none can show that, so the fewest.
    """
    fewest = float(sizes.sum() ** 2 / (sizes**2).sum())
    spread = value * (1 - value)
    if len(sums) < 2 or spread < ROUNDING:
        return fewest
    return min(max(spread / max(_variance(sums, sizes), ROUNDING), fewest), max(n, fewest))


def _variance(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Return the variance of a mean over facts, by Taylor linearization of the ratio."""
    rest = sums - sizes * sums.sum() / sizes.sum()
    return float(len(sums) / (len(sums) - 1) * (rest @ rest) / sizes.sum() ** 2)


def _correlate(ones: np.ndarray, others: np.ndarray, sizes: np.ndarray) -> float:
    """Return how the facts' sums go together, beyond what their numbers of questions make."""
    rests = [part - sizes * part.sum() / sizes.sum() for part in (ones, others)]
    spread = math.sqrt(float(rests[0] @ rests[0]) * float(rests[1] @ rests[1]))
    return float(rests[0] @ rests[1]) / spread if spread > ROUNDING else 0.0


def _combine(one: Estimate, other: Estimate, correlation: float) -> tuple[float, float]:
    """Return the interval of a difference from those of its sides."""

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    mean = one.value - other.value
    below = distance(one.value - one.low, other.high - other.value)
    above = distance(one.high - one.value, other.value - other.low)
    return mean - below, mean + above


def _wilson(value: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval; n need not be whole.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    square = NORMAL_QUANTILE**2
    centre = (value + square / (2 * n)) / (1 + square / n)
    spread = math.sqrt(value * (1 - value) / n + square / (4 * n * n))
    width = NORMAL_QUANTILE * spread / (1 + square / n)
    # At 0 and 1 an end is the value itself, but for rounding.
    low, high = min(value, centre - width), max(value, centre + width)
    return (0.0 if value == 0 else max(0.0, low)), (1.0 if value == 1 else min(1.0, high))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with Student's t interval.

    One seed has no interval, and a value that is not finite leaves no mean either.
    """
    if len(values) == 0 or not all(map(math.isfinite, values)):
        return Estimate(None, None, None, len(values))
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None, 1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    width = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, mean - width, mean + width, len(values))


def average_estimates(estimates: Sequence[Estimate], lowest: float = 0.0) -> Estimate:
    """Return the mean over runs, as wide as the seeds or the questions make it.

    The questions are the same ones in all runs, so that these leave each run's interval as it is.

    Args:
        lowest: where an interval of shares, or of their differences, has to end.
    """
    if len(estimates) == 1:
        return estimates[0]
    if not all(entry.n for entry in estimates):
        return NOTHING
    by_seed = over_seeds([math.nan if e.value is None else e.value for e in estimates])
    facts = [entry.facts for entry in estimates]
    fewest = None if None in facts else min(facts)
    mean = replace(by_seed, n=min(entry.n for entry in estimates), facts=fewest)
    if by_seed.value is None or any(entry.low is None for entry in estimates):
        return mean
    low, high = (statistics.fmean(getattr(e, end) for e in estimates) for end in ("low", "high"))
    if low < lowest or high > 1:  # no shares, but nats for instance
        return replace(mean, low=min(low, by_seed.low), high=max(high, by_seed.high))
    return replace(mean, low=low, high=high).widen(by_seed, lowest)


def area_under_curve(positives: Sequence[float], negatives: Sequence[float]) -> Estimate:
    """Return the AUC of scores that should be higher for positives, with DeLong's interval.

    DeLong et al. 1988, https://doi.org/10.2307/2531595. n counts both sides together. Where
    the two sides do not overlap DeLong's interval would have no width; it is then as wide as
    Wilson's for none of the smaller side.
    """
    m, k = len(positives), len(negatives)
    if m < 2 or k < 2:
        return Estimate(None, None, None, m + k)
    ones, others = np.asarray(positives)[:, None], np.asarray(negatives)[None, :]
    wins = (ones > others) + 0.5 * (ones == others)  # (m, k)
    value = float(wins.mean())
    variance = wins.mean(1).var(ddof=1) / m + wins.mean(0).var(ddof=1) / k
    width = NORMAL_QUANTILE * math.sqrt(variance)
    if width < ROUNDING:
        width = _wilson(0.0, min(m, k))[1]
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), m + k)


def clustered_area(
    positives: Sequence[float],
    negatives: Sequence[float],
    positive_clusters: Sequence[Hashable],
    negative_clusters: Sequence[Hashable],
) -> Estimate:
    """Return the AUC with an interval for scores that hang together in clusters.

    Obuchowski 1997, Nonparametric analysis of clustered ROC curve data, Biometrics 53:567-578.
    With one score per cluster it is DeLong's, also where the two sides do not overlap. n counts
    clusters.
    """
    names = {c: i for i, c in enumerate(dict.fromkeys([*positive_clusters, *negative_clusters]))}
    m, k = len(positives), len(negatives)
    rows = np.array([names[c] for c in positive_clusters], dtype=int)
    columns = np.array([names[c] for c in negative_clusters], dtype=int)
    num_rows, num_columns = len(set(rows)), len(set(columns))
    if num_rows < 2 or num_columns < 2:
        return Estimate(None, None, None, len(names))
    ones, others = np.asarray(positives)[:, None], np.asarray(negatives)[None, :]
    wins = (ones > others) + 0.5 * (ones == others)  # (m, k)
    value = float(wins.mean())
    # Each cluster's sum of what its scores win beyond the AUC, as positives and as negatives.
    won = np.bincount(rows, wins.mean(1) - value, len(names)) / m
    lost = np.bincount(columns, wins.mean(0) - value, len(names)) / k
    variance = (
        num_rows / (num_rows - 1) * float(won @ won)
        + num_columns / (num_columns - 1) * float(lost @ lost)
        + 2 * len(names) / (len(names) - 1) * float(won @ lost)
    )
    width = NORMAL_QUANTILE * math.sqrt(max(0.0, variance))
    if np.abs([won, lost]).max() < ROUNDING:  # not where they cancel, cluster by cluster
        width = _wilson(0.0, min(num_rows, num_columns))[1]
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), len(names))
