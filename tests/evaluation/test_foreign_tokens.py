"""A question that names what only universal questions name is none of the client's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fedlora_app.evaluation.foreign_tokens import TokenCounts, choose_threshold
from fedlora_app.evaluation.gate_fit import FactFeatures, separate

CAPITAL, COINS, PERU, SPAIN, THE = range(5)
FACTS = [
    (True, frozenset({THE, CAPITAL})),
    (True, frozenset({THE, COINS})),
    (False, frozenset({THE, CAPITAL, PERU})),
    (False, frozenset({COINS, PERU})),
    (False, frozenset({THE, CAPITAL, SPAIN})),
]


def test_evidence_is_the_number_of_universal_facts_with_a_token_that_no_local_one_has():
    counts = TokenCounts(FACTS)
    assert counts.find_evidence({THE, CAPITAL}) == 0
    assert counts.find_evidence({THE, CAPITAL, SPAIN}) == 1
    assert counts.find_evidence({SPAIN, PERU}) == 2
    assert counts.find_evidence({99}) == counts.find_evidence(()) == 0
    assert counts.list_above(0).tolist() == [PERU, SPAIN]
    assert counts.list_above(1).tolist() == [PERU]
    assert counts.list_above(math.inf).tolist() == []


def test_a_fact_that_is_left_out_is_not_counted():
    counts = TokenCounts(FACTS)
    assert counts.find_evidence({PERU}, without=2) == 1
    assert counts.find_evidence({SPAIN}, without=4) == 0
    assert counts.find_evidence({PERU}, without=4) == 2
    # Of the local facts the second alone has it: without that nothing speaks for it any more.
    assert counts.find_evidence({COINS}) == 0
    assert counts.find_evidence({COINS}, without=1) == 1


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ([0] * 99, [3] * 50, 0),
        ([0] * 95 + [2] * 5, [3] * 50, 2),  # the highest that costs nothing
        ([0] * 99 + [3], [3] * 50 + [0] * 50, 0),  # one own question for half of the others
        ([3] * 100, [3] * 50, math.inf),
        ([0] * 3, [3] * 1 + [0] * 9, math.inf),  # of three questions one more may be lost
        ([0] * 3, [3] * 9 + [0] * 1, 0),
        ([0] * 9, [], math.inf),
        ([], [3], math.inf),
    ],
)
def test_the_threshold_closes_for_more_of_the_others_than_it_may_cost(own, others, expected):
    evidence = torch.tensor(own + others)
    is_own = torch.tensor([True] * len(own) + [False] * len(others), dtype=torch.bool)
    assert choose_threshold(evidence, is_own, torch.ones_like(is_own)) == expected


def test_questions_that_the_gate_is_closed_for_anyway_are_nobodys_gain():
    evidence = torch.tensor([0] * 9 + [3] * 9)
    is_own = torch.tensor([True] * 9 + [False] * 9)
    assert choose_threshold(evidence, is_own, is_own) == math.inf


def name_countries(num_topics: int = 12, num_countries: int = 8) -> tuple[list, list, list]:
    """Own questions about topics, universal ones about topics in countries, and unknown ones.

    What the base model sees is the topic and little of the country; every question has a token of
    its topic, and universal ones have one of their country.
    """
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(num_topics, 32, dtype=torch.double, generator=generator)
    countries = 0.1 * torch.randn(num_countries, 32, dtype=torch.double, generator=generator)

    def ask(topic: int, country: int | None, num_wordings: int = 3) -> FactFeatures:
        centre = topics[topic] if country is None else topics[topic] + countries[country]
        noise = torch.randn(2, num_wordings, 32, dtype=torch.double, generator=generator)
        named = () if country is None else (100 + country,)
        tokens = tuple(frozenset({1, topic + 10, *named, 200 + w}) for w in range(num_wordings))
        return FactFeatures(country is None, tuple(centre + 0.3 * noise), tokens)

    def list_facts(*steps: int) -> list[FactFeatures]:
        places = [
            (topic, (topic + step) % num_countries) for topic in range(num_topics) for step in steps
        ]
        return [ask(*place) for place in places]

    local = [ask(topic, None) for topic in range(num_topics)]
    universal, unknown = list_facts(1, 3), list_facts(2)
    return local, universal, unknown


def test_a_gate_is_closed_for_a_country_that_only_universal_questions_name():
    local, universal, unknown = name_countries()
    gate = separate(local + universal)
    blind = dataclasses.replace(gate, foreign=torch.tensor([], dtype=torch.int64))

    def share_open(gate, facts):
        opened = [gate.judge(fact.features, fact.tokens) > 0.5 for fact in facts]
        return torch.cat(opened).double().mean().item()

    assert gate.figures.by_fact
    assert {token for token in gate.foreign.tolist() if token >= 100} <= set(range(100, 108))
    assert share_open(gate, local) == share_open(blind, local) == 1
    assert share_open(blind, unknown) > 0.5 > 0.2 > share_open(gate, unknown)
    assert share_open(gate, universal) == 0


def test_where_nothing_is_named_no_token_closes_a_gate():
    local, universal, _ = name_countries()
    nameless = [
        dataclasses.replace(fact, tokens=tuple(frozenset({1}) for _ in fact.tokens))
        for fact in local + universal
    ]
    assert separate(nameless).foreign.tolist() == []
