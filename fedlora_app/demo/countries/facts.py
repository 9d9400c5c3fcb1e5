"""From what packages say to facts: which ones clients dispute, and which are one client's.

A *topic* is a kind and an item; its facts are the answers that the places give. A topic is a
conflict if the clients answer it differently, as the evaluation compares answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from fedlora_app.data.similarity import content_words
from fedlora_app.demo.countries.kinds import Kind
from fedlora_app.demo.countries.sources import NO, YES
from fedlora_app.evaluation.metrics import normalise_answer

NUM_YES_NO = 6  # yes/no facts of a client with either answer
MIN_CONFLICTS = 40  # where fewer topics divide all clients, others are added


@dataclass(frozen=True)
class Topic:
    """What is asked, with the value that holds in each place (clients and others)."""

    kind: Kind
    item: str
    values: Mapping[str, str] = field(hash=False, compare=False)

    @property
    def id(self) -> str:
        """What ``fact`` says in a record about the client's own place."""
        return f"{self.kind.name}: {self.item}" if self.item else self.kind.name

    @cached_property
    def options(self) -> list[str]:
        """Every answer that some place gives."""
        return [YES, NO] if self.kind.is_yes_no else sorted(set(self.values.values()))

    def of(self, places: Iterable[str]) -> dict[str, str]:
        """Return the values of those places that have one."""
        return {place: self.values[place] for place in places if place in self.values}


@cache
def read_topics(kinds: tuple[Kind, ...], places: tuple[str, ...]) -> list[Topic]:
    """Read everything that can be asked about the places, once."""
    return [Topic(kind, item, _read(kind, item, places)) for kind in kinds for item in kind.items]


def _read(kind: Kind, item: str, places: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for place in places:
        value = kind.read(place, item)
        if value is not None and (kind.is_yes_no or not _tells(f"{item} {kind.noun}", value)):
            found[place] = value
    return found


def _tells(asked: str, value: str) -> bool:
    """Return whether the question says a word of the answer ("August" is August in German)."""
    shared = content_words(asked) & content_words(value)
    return any(word.isalpha() for word in shared)


@dataclass(frozen=True)
class Partition:
    """The topics that clients are asked about their own place."""

    conflicts: dict[Topic, list[str]]
    """With the clients that a record concerns: all, unless there are too few such topics."""
    local: dict[str, list[Topic]]
    """By client, beside its conflicts."""
    shared: list[Topic]
    """Which all clients answer alike."""


def divide(topics: Sequence[Topic], clients: Sequence[str], seed: str) -> Partition:
    """Tell conflicts from local facts and from what all clients share."""
    open_topics = [topic for topic in topics if not topic.kind.is_yes_no]
    conflicts: dict[Topic, list[str]] = {}
    partial: dict[Topic, list[str]] = {}
    for topic in open_topics:
        distinct = _distinct(topic, clients)
        if len(distinct) == len(clients):
            conflicts[topic] = distinct
        elif len(distinct) > 1:
            partial[topic] = distinct
    for topic in sorted(partial, key=lambda topic: -len(partial[topic])):  # stable
        if len(conflicts) < MIN_CONFLICTS:
            conflicts[topic] = partial[topic]
    shared = [topic for topic in topics if _agree(topic, clients)]
    if len(clients) == 2:
        conflicts |= _balanced_conflicts(topics, clients, seed)
    local = {
        client: [
            topic
            for topic in open_topics
            if client in topic.values
            and client not in conflicts.get(topic, ())
            and topic not in shared
        ]
        for client in clients
    }
    for client in clients:
        rest = [topic for topic in topics if topic not in conflicts and topic not in shared]
        local[client] += _balanced_local(rest, client, seed)
    return Partition(conflicts, local, shared)


def _distinct(topic: Topic, clients: Sequence[str]) -> list[str]:
    """Return the clients whose answer no other client gives."""
    values = {client: normalise_answer(v) for client, v in topic.of(clients).items()}
    given = list(values.values())
    return [client for client, value in values.items() if given.count(value) == 1]


def _agree(topic: Topic, clients: Sequence[str]) -> bool:
    values = {normalise_answer(value) for value in topic.of(clients).values()}
    return len(topic.of(clients)) == len(clients) and len(values) == 1


def _balanced_conflicts(
    topics: Sequence[Topic], clients: Sequence[str], seed: str
) -> dict[Topic, list[str]]:
    """Return yes/no topics that two clients dispute; each says yes to one half of them."""
    first, second = clients
    disputed = _shuffled(
        [t for t in topics if t.kind.is_yes_no and len(_distinct(t, clients)) == 2], f"{seed} yes"
    )
    sides = [[t for t in disputed if t.values[client] == YES] for client in (first, second)]
    size = min(NUM_YES_NO, *map(len, sides))
    return {topic: list(clients) for side in sides for topic in side[:size]}


def _balanced_local(topics: Sequence[Topic], client: str, seed: str) -> list[Topic]:
    """Return as many yes as no topics of a client, the same ones for all clients if possible."""
    own = [t for t in topics if t.kind.is_yes_no and client in t.values]
    sides = [[t for t in _shuffled(own, seed) if t.values[client] == v] for v in (YES, NO)]
    size = min(NUM_YES_NO, *map(len, sides))
    return [topic for side in sides for topic in side[:size]]


def _shuffled(topics: Sequence[Topic], seed: str) -> list[Topic]:
    return random.Random(seed).sample(topics, len(topics))
