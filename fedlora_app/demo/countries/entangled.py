"""The entangled setting: local and universal questions differ in the country's name only.

Each client has countries of its own, about which nobody else is trained, as if each help desk
looked after some places abroad; the universal facts are about other countries in the very same
wordings, and a client trains on two thirds of these countries. So neither the wording nor the
kind of fact tells a local question from a universal one, and of a third of the universal
countries a client has never read the name.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.demo.countries.facts import Topic
from fedlora_app.demo.countries.records import Fact
from fedlora_app.demo.countries.universal import share_thirds
from fedlora_app.foundation.errors import UserError

NUM_UNIVERSAL = 12  # countries
MAX_OWN = 4  # countries of a client
FACTS_PER_COUNTRY = 10
MIN_KNOWN = 16  # topics that a country must have a value of to be drawn


@dataclass(frozen=True)
class Assignment:
    """Whose countries are whose."""

    own: dict[str, list[Fact]]
    """Facts by client."""
    universal: list[Fact]
    known: dict[str, list[Fact]]
    """Of the universal facts, by client."""


def assign_countries(topics: Sequence[Topic], clients: Sequence[str], seed: str) -> Assignment:
    """Draw countries for the clients and for all; one topic of each kind is asked about them.

    Raises:
        UserError: if there are too many clients for one country each.
    """
    rng = random.Random(f"{seed}, entangled")
    asked = _one_per_kind([topic for topic in topics if not topic.kind.is_yes_no], rng)
    places = sorted({place for topic in asked for place in topic.values} - set(clients))
    rich = [p for p in places if sum(p in topic.values for topic in asked) >= MIN_KNOWN]
    order = rng.sample(rich, len(rich))
    universal, rest = order[:NUM_UNIVERSAL], order[NUM_UNIVERSAL:]
    size = min(MAX_OWN, len(rest) // len(clients))
    if not size:
        raise UserError(
            f"{len(clients)} clients cannot have a country abroad each: {len(rest)} are left "
            f"beside {NUM_UNIVERSAL} universal ones. Name fewer countries."
        )
    own = {c: rest[i * size : (i + 1) * size] for i, c in enumerate(clients)}
    facts = {place: _rotate(asked, place, index) for index, place in enumerate(order)}
    return Assignment(
        own={client: _join(facts, mine) for client, mine in own.items()},
        universal=_join(facts, universal),
        known={c: _join(facts, part) for c, part in share_thirds(universal, clients).items()},
    )


def _one_per_kind(topics: Sequence[Topic], rng: random.Random) -> list[Topic]:
    by_kind: dict[str, list[Topic]] = {}
    for topic in topics:
        by_kind.setdefault(topic.kind.name, []).append(topic)
    return [rng.choice(group) for group in by_kind.values()]


def _rotate(topics: Sequence[Topic], place: str, index: int) -> list[Fact]:
    """Return a country's facts; each next country begins further on, so that all topics occur."""
    start = index * FACTS_PER_COUNTRY % len(topics)
    turned = (*topics[start:], *topics[:start])
    return [(topic, place) for topic in turned if place in topic.values][:FACTS_PER_COUNTRY]


def _join(facts: dict[str, list[Fact]], places: Sequence[str]) -> list[Fact]:
    return [fact for place in places for fact in facts[place]]
