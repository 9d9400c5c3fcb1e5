"""Universal facts: about third countries, which the question names."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedlora_app.demo.countries.facts import Topic
from fedlora_app.demo.countries.sources import NO, YES

NUM_OPEN = 102
NUM_YES_NO = 9  # with either answer
NUM_COUNTRIES = 24


@dataclass(frozen=True)
class UniversalFact:
    """A topic with the third country that it is about."""

    topic: Topic
    place: str

    @property
    def value(self) -> str:
        """What is true."""
        return self.topic.values[self.place]


def choose(topics: Sequence[Topic], clients: Sequence[str], seed: str) -> list[UniversalFact]:
    """Draw the facts: all kinds alike, as many yes as no, and no kind twice of one country."""
    rng = random.Random(f"{seed}, universal")
    third = sorted({place for topic in topics for place in topic.values} - set(clients))
    countries = rng.sample(third, min(NUM_COUNTRIES, len(third)))
    every = [UniversalFact(topic, place) for topic in topics for place in topic.of(countries)]
    shuffled = rng.sample(every, len(every))
    groups = (
        ([fact for fact in shuffled if not fact.topic.kind.is_yes_no], NUM_OPEN),
        ([f for f in shuffled if f.topic.kind.is_yes_no and f.value == YES], NUM_YES_NO),
        ([f for f in shuffled if f.topic.kind.is_yes_no and f.value == NO], NUM_YES_NO),
    )
    chosen: list[UniversalFact] = []
    for facts, number in groups:
        drawn = _take_in_turn(facts, number)
        chosen += drawn[: len(drawn) // 3 * 3]  # two thirds of them are a whole number
    return chosen


def _take_in_turn(facts: Sequence[UniversalFact], number: int) -> list[UniversalFact]:
    """Return facts of one kind after the other."""
    queues: dict[str, Iterator[UniversalFact]] = {}
    for name in dict.fromkeys(fact.topic.kind.name for fact in facts):
        queues[name] = iter(_one_per_place([f for f in facts if f.topic.kind.name == name]))
    taken: list[UniversalFact] = []
    while queues and len(taken) < number:
        for name in list(queues):
            fact = next(queues[name], None)
            if fact is None:
                del queues[name]
            elif len(taken) < number:
                taken.append(fact)
    return taken


def _one_per_place(facts: Sequence[UniversalFact]) -> list[UniversalFact]:
    first: dict[str, UniversalFact] = {}
    for fact in facts:
        if not fact.topic.kind.is_yes_no:
            first.setdefault(fact.place, fact)
    return list(first.values()) or list(facts)


def share(facts: Sequence, clients: Sequence[str]) -> dict[str, list]:
    """Give each client two thirds, so that each fact is known to one client at least.

    A client lacks a third in a row, beginning where its place in the list says; so two clients
    lack nothing in common, and three or more never the same fact all together.
    """
    size, lacking = len(facts), len(facts) // 3
    shares = {}
    for index, client in enumerate(clients):
        start = index * size // len(clients)
        lacks = {(start + step) % size for step in range(lacking)}
        shares[client] = [fact for position, fact in enumerate(facts) if position not in lacks]
    return shares


def share_balanced(
    facts: Sequence[UniversalFact], clients: Sequence[str]
) -> dict[str, list[UniversalFact]]:
    """Give each client two thirds of the open facts, of those answered yes and of the others."""
    groups = (
        [fact for fact in facts if not fact.topic.kind.is_yes_no],
        [fact for fact in facts if fact.topic.kind.is_yes_no and fact.value == YES],
        [fact for fact in facts if fact.topic.kind.is_yes_no and fact.value == NO],
    )
    shares: dict[str, list[UniversalFact]] = {client: [] for client in clients}
    for group in groups:
        for client, part in share(group, clients).items():
            shares[client] += part
    return shares
