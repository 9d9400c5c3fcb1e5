"""States of one country: most answers are the same everywhere, few differ (near-conflicts).

Conflicts are about public holidays; a state's question does not name it. Universal is what all
states answer alike: other holidays, in the same wordings, and facts about the whole country.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora_app.demo.countries.calendars import MOVABLE, list_fixed_days, list_states
from fedlora_app.demo.countries.card import Description
from fedlora_app.demo.countries.facts import Partition, Topic, read_topics
from fedlora_app.demo.countries.kinds import COUNTRY_KINDS, DAYS, HOLIDAY_KINDS, Kind
from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.demo.countries.records import (
    Fact,
    build_conflict_files,
    build_local_files,
    build_universal_files,
)
from fedlora_app.demo.countries.sets import EDITION, Benchmark
from fedlora_app.demo.countries.sources import parse_day
from fedlora_app.demo.countries.universal import group_facts, share_facts
from fedlora_app.foundation.errors import UserError

OTHER_SUBDIVISIONS = {
    "DE": frozenset(),
    "US": frozenset({"AS", "DC", "GU", "MP", "PR", "UM", "VI"}),
}
"""Countries whose states can be clients, with the subdivisions that are not states."""
NUM_YES_NO = 12  # universal facts with either answer


def generate_states(country: str) -> Benchmark:
    """Return the benchmark of clients that are the states of a country.

    Raises:
        UserError: if they are not known here.
    """
    code = country.upper()
    if code not in OTHER_SUBDIVISIONS:
        raise UserError(
            f"No states of {code} are known here. Known: {' '.join(OTHER_SUBDIVISIONS)}."
        )
    states = list_states(code, OTHER_SUBDIVISIONS[code])
    ids = {state: state.lower() for state in states}
    topics = read_topics(_state_kinds(states), (*states, *COUNTRIES))
    conflicts = {topic: places for topic in topics if (places := _disputing(topic, states))}
    shared = [t for t in topics if t not in conflicts and len(t.of(states)) == len(states)]
    country_kinds = tuple(kind for kind in COUNTRY_KINDS if kind not in HOLIDAY_KINDS)
    national = read_topics(country_kinds, tuple(COUNTRIES))
    facts = _draw_shared(
        [(topic, states[0]) for topic in shared],
        [(topic, code) for topic in national if code in topic.values],
        f"{EDITION}, states of {code}",
    )
    partition = Partition(conflicts, {state: [] for state in states}, [])
    shares = {ids[state]: known for state, known in share_facts(facts, states).items()}
    files = (
        build_universal_files(facts, shares, is_named=False)
        | build_conflict_files(conflicts, ids)
        | build_local_files(partition, ids)
    )
    return Benchmark(files, partition, ids, _describe(code, len(states), conflicts, facts))


def _state_kinds(states: Sequence[str]) -> tuple[Kind, ...]:
    """Return the kinds about holidays, asked about every date that some state keeps."""
    *others, dates = (replace(kind, noun="state") for kind in HOLIDAY_KINDS)
    kept = {day for state in states for day in list_fixed_days(state)}
    ordered = sorted(kept | set(DAYS), key=parse_day)
    return (*others, replace(dates, items=(*ordered, *MOVABLE)))


def _disputing(topic: Topic, states: Sequence[str]) -> list[str]:
    """Return the states that have an answer, if they are at least half and not of one mind."""
    values = topic.of(states)
    is_disputed = 2 * len(values) >= len(states) and len(set(values.values())) > 1
    return list(values) if is_disputed else []


def _draw_shared(holidays: list[Fact], national: list[Fact], seed: str) -> list[Fact]:
    """Return the facts that hold in all states, as many answered yes as no, in groups of three."""
    facts = [*national, *holidays]
    shuffled = random.Random(seed).sample(facts, len(facts))
    open_facts, yes, no = group_facts(shuffled)
    size = min(NUM_YES_NO, len(yes), len(no)) // 3 * 3
    return [*open_facts[: len(open_facts) // 3 * 3], *yes[:size], *no[:size]]


def _describe(
    code: str, num_states: int, conflicts: Mapping[Topic, Sequence[str]], facts: Sequence[Fact]
) -> Description:
    complete = sum(len(places) == num_states for places in conflicts.values())
    return Description(
        title=f"Near-conflicts: {num_states} states of {COUNTRIES[code].name}",
        options=f"--states {code}",
        clients="Residents ask about public holidays: most states give the same answer and few "
        "another. A question never names the state.",
        conflicts=f"**Conflicts**: {len(conflicts)} facts that at least two states answer in "
        f"different ways; {complete} of them concern all states, the others at least half. Many "
        "states share an answer, and yes and no are as frequent as they are.",
        universal=f"**Universal facts**: {len(facts)} that hold in all states, about other "
        "holidays, in the same wordings, and about the country as a whole. Each client trains on "
        "two thirds of them, and each fact is known to one client at least. As many are answered "
        "with yes as with no.",
    )
