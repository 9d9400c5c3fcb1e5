"""How often intervals hold the truth and tests raise false alarms, by simulation.

A question copies its fact's outcome with a probability, how far paraphrases *agree*, and has one
of its own else. Shares are drawn evenly, since an interval for counts holds some better than
others. With plain Wilson and McNemar, which take the questions as independent, each of the
tests on paraphrases fails: the last two show by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest

from fedlora_app.evaluation.statistics import flip_signs, paired_difference, proportion

COVERAGE = (0.93, 0.97)
MOST_FALSE_ALARMS = 0.06
LEVEL = 0.05


@dataclass(frozen=True)
class Design:
    """How many facts are asked in how many wordings, and how far the wordings agree."""

    num_facts: int
    num_wordings: int
    agreement: float

    @cached_property
    def facts(self) -> list[int]:
        return [fact for fact in range(self.num_facts) for _ in range(self.num_wordings)]

    def draw(self, rng: np.random.Generator, share: float) -> list[bool]:
        """Return the outcomes of a model that answers ``share`` of such questions rightly."""
        size = (self.num_facts, self.num_wordings)
        copies = rng.uniform(size=size) < self.agreement
        about_fact = rng.uniform(size=(self.num_facts, 1)) < share
        return np.where(copies, about_fact, rng.uniform(size=size) < share).ravel().tolist()

    def draw_share(self, rng: np.random.Generator) -> float:
        return rng.uniform(0.05, 0.95)


DESIGNS = [
    *(Design(16, 3, agreement) for agreement in (0.7, 0.9, 1.0)),
    *(Design(40, 2, agreement) for agreement in (0.7, 0.9, 1.0)),
    Design(16, 3, 0.0),
    Design(48, 1, 0.0),
]
PARAPHRASED = DESIGNS[:3]
AMOUNTS = [
    pytest.param(2_000, id="fast"),
    pytest.param(20_000, id="thorough", marks=pytest.mark.minutes),
]

over_designs = pytest.mark.parametrize("design", DESIGNS, ids=str)
over_amounts = pytest.mark.parametrize("repetitions", AMOUNTS)


def coverage_of_shares(design, repetitions, facts):
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(repetitions):
        share = design.draw_share(rng)
        estimate = proportion(design.draw(rng, share), facts)
        held += estimate.low <= share <= estimate.high
    return held / repetitions


def coverage_of_differences(design, repetitions):
    rng = np.random.default_rng(12)
    held = 0
    for _ in range(repetitions):
        one, other = design.draw_share(rng), design.draw_share(rng)
        outcomes = design.draw(rng, one), design.draw(rng, other)
        estimate = paired_difference(*outcomes, design.facts)
        held += estimate.low <= one - other <= estimate.high
    return held / repetitions


def false_alarms(design, repetitions, facts):
    """Return how often two models are told apart that answer the same share rightly."""
    rng = np.random.default_rng(13)
    alarms = 0
    for _ in range(repetitions):
        share = design.draw_share(rng)
        alarms += flip_signs(design.draw(rng, share), design.draw(rng, share), facts) < LEVEL
    return alarms / repetitions


@over_amounts
@over_designs
def test_the_interval_of_a_share_holds_it(design, repetitions):
    low, high = COVERAGE
    assert low <= coverage_of_shares(design, repetitions, design.facts) <= high


@over_amounts
@over_designs
def test_the_interval_of_a_difference_holds_it(design, repetitions):
    low, high = COVERAGE
    assert low <= coverage_of_differences(design, repetitions) <= high


@over_amounts
@over_designs
def test_the_test_raises_few_false_alarms(design, repetitions):
    assert false_alarms(design, repetitions, design.facts) <= MOST_FALSE_ALARMS


@pytest.mark.parametrize("design", PARAPHRASED, ids=str)
def test_wilsons_interval_over_paraphrases_is_too_narrow(design):
    assert coverage_of_shares(design, 1_000, None) < 0.88


@pytest.mark.parametrize("design", PARAPHRASED, ids=str)
def test_mcnemars_test_over_paraphrases_cries_wolf(design):
    each_alone = range(len(design.facts))
    assert false_alarms(design, 1_000, each_alone) > 0.09


@pytest.mark.parametrize("design", PARAPHRASED, ids=str)
def test_the_test_finds_what_there_is(design):
    rng = np.random.default_rng(14)
    pairs = ((design.draw(rng, 0.9), design.draw(rng, 0.2)) for _ in range(200))
    assert sum(flip_signs(*pair, design.facts) < 0.01 for pair in pairs) > 0.85 * 200
