"""Universal facts: about third countries, which the question names."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from fedlora_app.demo.countries.facts import Topic
from fedlora_app.demo.countries.records import Fact
from fedlora_app.demo.countries.sources import NO, YES

NUM_OPEN = 102
NUM_YES_NO = 9  # with either answer
NUM_COUNTRIES = 24

T = TypeVar("T")


def draw_universal(topics: Sequence[Topic], clients: Sequence[str], seed: str) -> list[Fact]:
    """Draw the facts: all kinds alike, as many yes as no, and a kind once of each country."""
    rng = random.Random(f"{seed}, universal")
    third = sorted({place for topic in topics for place in topic.values} - set(clients))
    countries = rng.sample(third, min(NUM_COUNTRIES, len(third)))
    every = [(topic, place) for topic in topics for place in topic.of(countries)]
    shuffled = rng.sample(every, len(every))
    drawn: list[Fact] = []
    numbers = (NUM_OPEN, NUM_YES_NO, NUM_YES_NO)
    for group, number in zip(group_facts(shuffled), numbers, strict=True):
        taken = _take_in_turn(group, number)
        drawn += taken[: len(taken) // 3 * 3]  # two thirds of them are a whole number
    return drawn


def group_facts(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Return the open facts, those that are answered yes, and those that are answered no."""
    open_facts = [(topic, place) for topic, place in facts if not topic.kind.is_yes_no]
    yes, no = (
        [(t, place) for t, place in facts if t.kind.is_yes_no and t.values[place] == answer]
        for answer in (YES, NO)
    )
    return open_facts, yes, no


def _take_in_turn(facts: Sequence[Fact], number: int) -> list[Fact]:
    """Return facts of one kind after the other."""
    by_kind: dict[str, list[Fact]] = {}
    for topic, place in facts:
        by_kind.setdefault(topic.kind.name, []).append((topic, place))
    queues = {name: iter(_once_per_country(group)) for name, group in by_kind.items()}
    taken: list[Fact] = []
    while queues and len(taken) < number:
        for name in list(queues):
            fact = next(queues[name], None)
            if fact is None:
                del queues[name]
            elif len(taken) < number:
                taken.append(fact)
    return taken


def _once_per_country(facts: Sequence[Fact]) -> list[Fact]:
    """Return the first fact of each country; a yes or no about one date says little of the next."""
    if facts[0][0].kind.is_yes_no:
        return list(facts)
    first: dict[str, Fact] = {}
    for topic, place in facts:
        first.setdefault(place, (topic, place))
    return list(first.values())


def share_facts(facts: Sequence[Fact], clients: Iterable[str]) -> dict[str, list[Fact]]:
    """Give each client two thirds of the open facts, of those answered yes and of the others."""
    shares: dict[str, list[Fact]] = {client: [] for client in clients}
    for group in group_facts(facts):
        for client, part in share_thirds(group, list(shares)).items():
            shares[client] += part
    return shares


def share_thirds(parts: Sequence[T], clients: Sequence[str]) -> dict[str, list[T]]:
    """Give each client two thirds, so that each part is known to one client at least.

    A client lacks a third in a row that begins where its place in the list says: two clients lack
    nothing in common, and of more no part is unknown to all.
    """
    size, lacking = len(parts), len(parts) // 3
    shares = {}
    for index, client in enumerate(clients):
        start = index * size // len(clients)
        lacks = {(start + step) % size for step in range(lacking)}
        shares[client] = [part for position, part in enumerate(parts) if position not in lacks]
    return shares
