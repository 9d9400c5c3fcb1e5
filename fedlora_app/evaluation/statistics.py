"""Intervals and tests for proportions, all at 95 % and always with their n."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 1_000
ROUNDING = 1e-12  # differences below it are those of floating-point sums


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and the number of observations behind it."""

    value: float | None
    low: float | None
    high: float | None
    n: int

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


def proportion(outcomes: Sequence[bool]) -> Estimate:
    """Return the share of true outcomes with its Wilson score interval.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    n = len(outcomes)
    if n == 0:
        return NOTHING
    successes = sum(map(bool, outcomes))
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def share_of_questions(value: float, n: int) -> Estimate:
    """Return a mean over several answers to each of ``n`` questions, with Wilson's interval.

    Raises:
        ValueError: the mean is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"A share of {n} questions is {value}, expected 0 to 1.")
    right = round(value * n)
    return replace(proportion([True] * right + [False] * (n - right)), value=value)


def paired_difference(
    ones: Sequence[float], others: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """Return the mean of ``ones - others`` with a paired bootstrap interval.

    Whole clusters (the paraphrases of one fact) are resampled, because they are not
    independent of each other. Where all differences agree the bootstrap's interval would have
    no width; it is then as wide as Wilson's for none of that many clusters if all values lie
    in [0, 1], and missing otherwise.
    """
    if len(ones) == 0:
        return NOTHING
    positions = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums, sizes = np.zeros(len(positions)), np.zeros(len(positions))
    for one, other, cluster in zip(ones, others, clusters, strict=True):
        sums[positions[cluster]] += float(one) - float(other)
        sizes[positions[cluster]] += 1
    mean = float(sums.sum() / sizes.sum())
    if np.ptp(sums / sizes) < ROUNDING:
        if not all(0 <= value <= 1 for value in (*ones, *others)):
            return Estimate(mean, None, None, len(ones))
        width = _width_without_variation(len(positions))
        return Estimate(mean, max(-1.0, mean - width), min(1.0, mean + width), len(ones))
    means = _resample(sums, sizes, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, float(low), float(high), len(ones))


def _resample(sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the means of resampled clusters, a part at a time to bound the memory."""
    parts = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        drawn = rng.integers(len(sums), size=(RESAMPLES_AT_ONCE, len(sums)))
        parts.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(parts)


def _width_without_variation(n: int) -> float:
    """Return how far from 0 a share may lie of which n observations hold none."""
    return proportion([False] * n).high


def mcnemar(ones: Sequence[bool], others: Sequence[bool]) -> dict[str, Any]:
    """Return McNemar's exact two-sided test on paired outcomes.

    McNemar 1947, https://doi.org/10.1007/BF02295996; the binomial form, valid for small n.
    """
    only_one = sum(bool(a) and not b for a, b in zip(ones, others, strict=True))
    only_other = sum(bool(b) and not a for a, b in zip(ones, others, strict=True))
    discordant = only_one + only_other
    p_value = float(stats.binomtest(only_one, discordant).pvalue) if discordant else 1.0
    return {"only_first": only_one, "only_second": only_other, "p_value": p_value, "n": len(ones)}


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


def average_shares(shares: Sequence[Estimate]) -> Estimate:
    """Return the mean over runs, as wide as the seeds or the distinct questions make it."""
    if len(shares) == 1:
        return shares[0]
    if not all(share.n for share in shares):
        return NOTHING
    by_seed = over_seeds([share.value for share in shares])
    return share_of_questions(by_seed.value, min(share.n for share in shares)).widen(by_seed, 0.0)


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
    width = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt(variance))
    if width < ROUNDING:
        width = _width_without_variation(min(m, k))
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), m + k)


def clustered_area(
    positives: Sequence[float],
    negatives: Sequence[float],
    positive_clusters: Sequence[Hashable],
    negative_clusters: Sequence[Hashable],
) -> Estimate:
    """Return the AUC with an interval for scores that hang together in clusters.

    Obuchowski 1997, Nonparametric analysis of clustered ROC curve data, Biometrics 53:567-578.
    With one score per cluster it is DeLong's. n counts clusters.
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
    width = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(max(0.0, variance))
    return Estimate(value, max(0.0, value - width), min(1.0, value + width), len(names))
