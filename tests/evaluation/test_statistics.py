from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedlora_app.evaluation.statistics import (
    NOTHING,
    Estimate,
    area_under_curve,
    mcnemar,
    over_seeds,
    paired_difference,
    proportion,
)

Z_SQUARED = 1.959963984540054**2


def test_nothing_has_no_interval():
    assert proportion([]) == NOTHING == Estimate(None, None, None, 0)
    assert paired_difference([], [], []) == NOTHING
    assert over_seeds([]) == NOTHING
    assert NOTHING.dump() == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, Z_SQUARED / (10 + Z_SQUARED)),
        (10, 10, 10 / (10 + Z_SQUARED), 1.0),
        (0, 1, 0.0, 0.79345),
        (8, 10, 0.49016, 0.94332),
        (81, 263, 0.25528, 0.36621),  # Newcombe 1998, table I, to four digits there
    ],
)
def test_proportion_has_wilsons_interval(successes, n, low, high):
    estimate = proportion([True] * successes + [False] * (n - successes))
    assert estimate.value == successes / n and estimate.n == n
    assert estimate.low == pytest.approx(low, abs=1e-4)
    assert estimate.high == pytest.approx(high, abs=1e-4)


def test_proportion_counts_whatever_is_true():
    assert proportion([1, 0, np.True_, False]) == proportion([True, False, True, False])


def simulated(rng, num_clusters=40, size=3):
    """Two models right by chance on paraphrases that go the same way within a fact."""
    clusters = [i // size for i in range(num_clusters * size)]
    hard = rng.uniform(size=num_clusters)[clusters]
    ones, others = (hard < 0.8).astype(float), (rng.uniform(size=len(hard)) < 0.5).astype(float)
    return ones, others, clusters


def test_paired_differences_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("fedlora_app.evaluation.statistics.NUM_RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    estimates = [paired_difference(*simulated(rng)) for _ in range(300)]
    covered = sum(estimate.low <= 0.3 <= estimate.high for estimate in estimates) / 300
    assert 0.90 <= covered <= 0.98
    assert np.mean([estimate.value for estimate in estimates]) == pytest.approx(0.3, abs=0.02)


def test_questions_that_are_taken_for_independent_claim_too_much():
    ones, others, clusters = simulated(np.random.default_rng(1), size=8)
    clustered = paired_difference(ones, others, clusters)
    separate = paired_difference(ones, others, range(len(ones)))
    assert clustered.value == separate.value and clustered.n == separate.n == 320
    assert clustered.high - clustered.low > 1.3 * (separate.high - separate.low)


def test_paired_difference_agrees_with_the_normal_interval_for_many_independent_pairs():
    rng = np.random.default_rng(2)
    ones, others = (rng.uniform(size=400) < 0.7) * 1.0, (rng.uniform(size=400) < 0.6) * 1.0
    estimate = paired_difference(ones, others, range(400))
    width = 1.96 * (ones - others).std(ddof=1) / math.sqrt(400)
    assert estimate.value == pytest.approx((ones - others).mean())
    assert estimate.low == pytest.approx(estimate.value - width, abs=0.01)
    assert estimate.high == pytest.approx(estimate.value + width, abs=0.01)


def test_clusters_of_different_size_weigh_by_their_questions():
    estimate = paired_difference([1, 1, 1, 0], [0, 0, 0, 1], ["a", "a", "a", "b"])
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (-1.0, 1.0)


def test_a_difference_changes_its_sign_with_its_sides():
    ones, others, clusters = simulated(np.random.default_rng(3))
    there, back = (
        paired_difference(ones, others, clusters),
        paired_difference(others, ones, clusters),
    )
    assert there.value > 0 and there.value == -back.value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)


def test_the_bootstrap_is_the_same_every_time_and_another_with_another_seed():
    ones, others, clusters = simulated(np.random.default_rng(4), num_clusters=39)
    first = paired_difference(ones, others, clusters)
    assert paired_difference(ones, others, clusters) == first
    assert paired_difference(ones, others, [f"fact {c}" for c in clusters]) == first
    changed = {paired_difference(ones, others, clusters, seed).low for seed in range(6)}
    assert len(changed) > 1


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (1, 0, (1 - Z_SQUARED / (5 + Z_SQUARED), 1.0)),
        (0, 1, (-1.0, Z_SQUARED / (5 + Z_SQUARED) - 1)),
        (1, 1, (-Z_SQUARED / (5 + Z_SQUARED), Z_SQUARED / (5 + Z_SQUARED))),
    ],
)
def test_differences_that_all_agree_still_have_a_width(one, other, expected):
    clusters = [i // 2 for i in range(10)]
    estimate = paired_difference([one] * 10, [other] * 10, clusters)
    assert (estimate.value, estimate.n) == (one - other, 10)
    assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_rounding_does_not_hide_that_all_differences_agree():
    estimate = paired_difference(
        [0.1] * 4, [0.0] * 4, ["a", "b", "b", "b"]
    )  # sum of three / 3 > 0.1
    assert estimate.low < 0 and estimate.high > 0.7


def test_differences_in_nats_that_all_agree_have_no_interval():
    estimate = paired_difference([4.0] * 5, [1.0] * 5, range(5))
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (3.0, None, None, 5)


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError):
        paired_difference([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError):
        mcnemar([True, False], [True])


@pytest.mark.parametrize(
    ("only_one", "only_other", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_is_the_exact_binomial_on_what_differs(only_one, only_other, p_value):
    ones = [True] * only_one + [False] * only_other + [True, False] * 7
    others = [False] * only_one + [True] * only_other + [True, False] * 7
    result = mcnemar(ones, others)
    assert (result["only_first"], result["only_second"]) == (only_one, only_other)
    assert result["n"] == only_one + only_other + 14
    assert result["p_value"] == pytest.approx(p_value)


def test_seeds_have_students_interval():
    estimate = over_seeds([0.80, 0.90, 0.85])
    width = 4.302653 * 0.05 / math.sqrt(3)  # t at 97.5 % with 2 degrees of freedom
    assert estimate.value == pytest.approx(0.85)
    assert (estimate.low, estimate.high) == pytest.approx((0.85 - width, 0.85 + width))
    assert estimate.n == 3


def test_one_seed_has_no_interval():
    assert over_seeds([0.5]) == Estimate(0.5, None, None, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_seed_without_a_value_leaves_no_mean(value):
    assert over_seeds([0.5, value, 0.7]) == Estimate(None, None, None, 3)


@pytest.mark.parametrize(
    ("positives", "negatives", "value"),
    [
        ([3, 4, 5], [0, 1, 2], 1.0),
        ([0, 1, 2], [3, 4, 5], 0.0),
        ([1, 1, 1], [1, 1], 0.5),
        ([1, 3], [2, 2], 0.5),
        ([2, 3], [1, 2], 0.875),
    ],
)
def test_area_under_curve(positives, negatives, value):
    estimate = area_under_curve(positives, negatives)
    assert estimate.value == value and estimate.n == len(positives) + len(negatives)
    assert 0 <= estimate.low < estimate.high <= 1
    assert estimate.low <= value <= estimate.high


def test_area_under_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(6)
    positives, negatives = rng.integers(0, 9, 40) + 2, rng.integers(0, 9, 23)
    pairs = [1 if p > n else 0.5 if p == n else 0 for p in positives for n in negatives]
    assert area_under_curve(positives, negatives).value == pytest.approx(sum(pairs) / len(pairs))
    statistic = stats.mannwhitneyu(positives, negatives).statistic
    assert area_under_curve(positives, negatives).value == pytest.approx(statistic / (40 * 23))


@pytest.mark.parametrize(("m", "spread", "k", "other_spread"), [(120, 1, 80, 2), (80, 2, 120, 1)])
def test_delongs_interval_agrees_with_a_bootstrap(m, spread, k, other_spread):
    rng = np.random.default_rng(7)
    positives, negatives = rng.normal(1, spread, m), rng.normal(0, other_spread, k)
    estimate = area_under_curve(positives, negatives)
    areas = []
    for _ in range(2000):
        drawn = rng.choice(positives, m), rng.choice(negatives, k)
        areas.append((drawn[0][:, None] > drawn[1][None, :]).mean())
    low, high = np.quantile(areas, [0.025, 0.975])
    assert estimate.low == pytest.approx(low, abs=0.01)
    assert estimate.high == pytest.approx(high, abs=0.01)


def test_scores_that_do_not_overlap_still_leave_a_width():
    estimate = area_under_curve(range(10, 20), range(5))
    assert estimate.value == estimate.high == 1.0
    assert estimate.low == pytest.approx(1 - Z_SQUARED / (5 + Z_SQUARED))


@pytest.mark.parametrize(("positives", "negatives"), [([], [1, 2]), ([1], [1, 2]), ([1, 2], [1])])
def test_too_few_scores_have_no_area(positives, negatives):
    n = len(positives) + len(negatives)
    assert area_under_curve(positives, negatives) == Estimate(None, None, None, n)
