from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedlora_app.evaluation.statistics import (
    NOTHING,
    Estimate,
    area_under_curve,
    average_estimates,
    flip_signs,
    over_seeds,
    paired_difference,
    proportion,
    share_of_facts,
)

Z_SQUARED = 1.959963984540054**2


def test_nothing_has_no_interval():
    assert proportion([]) == NOTHING == Estimate(None, None, None, 0)
    assert paired_difference([], [], []) == NOTHING
    assert over_seeds([]) == NOTHING
    assert NOTHING.dump() == {"value": None, "low": None, "high": None, "n": 0, "facts": None}


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


def test_an_outcome_that_is_no_share_is_an_error():
    with pytest.raises(ValueError, match="expected 0 to 1"):
        proportion([2.0, 1.0])


def simulated(rng, num_clusters=40, size=3):
    """Two models right by chance on paraphrases that go the same way within a fact."""
    clusters = [i // size for i in range(num_clusters * size)]
    hard = rng.uniform(size=num_clusters)[clusters]
    ones, others = (hard < 0.8).astype(float), (rng.uniform(size=len(hard)) < 0.5).astype(float)
    return ones, others, clusters


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
    assert (estimate.value, estimate.n, estimate.facts) == (0.5, 4, 2)
    assert estimate.low < 0 and estimate.high > 0.9


def test_a_difference_changes_its_sign_with_its_sides():
    ones, others, clusters = simulated(np.random.default_rng(3))
    there, back = (
        paired_difference(ones, others, clusters),
        paired_difference(others, ones, clusters),
    )
    assert there.value > 0 and there.value == -back.value
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)


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


@pytest.mark.parametrize("ones", [[1], [1, 0, 1]])
def test_pairs_must_be_pairs(ones):
    for compute in (paired_difference, flip_signs):
        with pytest.raises(ValueError, match=f"{len(ones)} outcomes of 2 questions"):
            compute([1, 0], ones, ["a", "b"])
    with pytest.raises(ValueError, match=f"{len(ones)} outcomes of 2 questions"):
        proportion(ones, ["a", "b"])


def sign_tested(only_one, only_other, both=7):
    ones = [True] * only_one + [False] * only_other + [True, False] * both
    others = [False] * only_one + [True] * only_other + [True, False] * both
    return ones, others


@pytest.mark.parametrize(
    ("only_one", "only_other", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 2**5),
        (1, 5, 2 * (1 + 6) / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (300, 0, 2 / 2**300),
    ],
)
def test_where_every_question_is_its_own_fact_the_test_is_mcnemars(only_one, only_other, p_value):
    ones, others = sign_tested(only_one, only_other)
    assert flip_signs(ones, others, range(len(ones))) == pytest.approx(p_value)
    # Three copies of every question tell no more.
    facts = [i % len(ones) for i in range(3 * len(ones))]
    assert flip_signs(ones * 3, others * 3, facts) == pytest.approx(p_value)


def test_the_test_equals_scipys_over_all_signs():
    rng = np.random.default_rng(8)
    for _ in range(5):
        facts = rng.integers(0, 9, 30)
        ones, others = rng.uniform(size=30) < 0.7, rng.uniform(size=30) < 0.4
        sums = np.bincount(facts, ones * 1.0 - others * 1.0)
        expected = stats.permutation_test((sums,), np.sum, permutation_type="samples")
        assert flip_signs(ones, others, facts) == pytest.approx(expected.pvalue)
        # Values between right and wrong go by scipy itself.
        assert flip_signs(ones / 4, others / 4, facts) == pytest.approx(expected.pvalue)


def test_signs_that_are_drawn_are_the_same_every_time():
    rng = np.random.default_rng(9)
    ones, others = rng.uniform(size=40), rng.uniform(size=40)
    p_value = flip_signs(ones, others, range(40))
    assert flip_signs(ones, others, range(40)) == p_value == flip_signs(others, ones, range(40))
    assert p_value == pytest.approx(stats.ttest_rel(ones, others).pvalue, abs=0.03)


def test_a_test_of_nothing_finds_nothing():
    assert flip_signs([], [], []) == 1.0


def test_answers_about_a_fact_that_agree_are_worth_one_question():
    copied = proportion([1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1], list("aaabbbcccddd"))
    assert copied == Estimate(0.75, *ends(proportion([1, 0, 1, 1])), 12, 4)


def test_answers_about_a_fact_that_tell_nothing_of_each_other_are_worth_their_number():
    spread = proportion([1, 1, 1, 0] * 5, [i // 4 for i in range(20)])
    assert spread == Estimate(0.75, *ends(proportion([1, 1, 1, 0] * 5)), 20, 5)


@pytest.mark.parametrize("right", [0, 1])
def test_shares_of_none_and_all_are_as_wide_as_their_facts_make_them(right):
    estimate = proportion([right] * 12, list("aaabbbcccddd"))
    assert ends(estimate) == pytest.approx(ends(proportion([right] * 4)))
    assert estimate.low < estimate.high


def test_a_question_that_clients_share_counts_once():
    """Neither the interval nor n tells how many clients answered alike."""
    alone = proportion([1, 0, 1, 1], list("abcd"), range(4))
    shared = proportion([1, 0, 1, 1] * 8, list("abcd") * 8, [*range(4)] * 8)
    assert shared == alone and (alone.n, alone.facts) == (4, 4)


def test_one_large_fact_does_not_hide_behind_many_small_ones():
    sizes = [30, 1, 1, 1, 1]
    facts = [fact for fact, size in enumerate(sizes) for _ in range(size)]
    estimate = proportion([True] * len(facts), facts)
    assert estimate.low < 0.3  # not 0.9, as of 34 questions, nor 0.57, as of 5


def test_a_share_of_which_only_the_mean_is_known_is_as_wide_as_its_facts_can_make_it():
    assert share_of_facts(0.75, 12, 4) == Estimate(0.75, *ends(proportion([1, 0, 1, 1])), 12, 4)
    assert share_of_facts(0.75, 4) == Estimate(0.75, *ends(proportion([1, 0, 1, 1])), 4, None)
    assert share_of_facts(0.75, 4, 10) == Estimate(0.75, *ends(proportion([1, 0, 1, 1])), 4, 4)


def test_runs_over_the_same_questions_add_up_to_no_more_of_them():
    share = proportion([1, 0, 1, 1] * 4, list("abcdefgh") * 2)
    assert ends(average_estimates([share] * 5)) == pytest.approx(ends(share))
    other = proportion([0] * 15 + [1], list("abcdefgh") * 2)
    mean = average_estimates([share, other])
    assert mean.value == pytest.approx((share.value + other.value) / 2)
    assert (mean.low, mean.high, mean.n, mean.facts) == (0.0, 1.0, 16, 8)


def ends(estimate):
    return estimate.low, estimate.high


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
