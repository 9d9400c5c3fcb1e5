"""The files of a benchmark: each client's training and test records, and the common tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora_app.demo.countries.card import Description
from fedlora_app.demo.countries.facts import (
    MIN_CONFLICTS,
    Partition,
    Record,
    Topic,
    divide,
    make_conflict,
    make_record,
    pick_distractors,
    read_topics,
)
from fedlora_app.demo.countries.kinds import COUNTRY_KINDS
from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.demo.countries.universal import UniversalFact, choose, share_balanced
from fedlora_app.demo.countries.wordings import LOCAL_TEST, NUM_WORDINGS, TEST, TRAIN, VALIDATION
from fedlora_app.foundation.errors import UserError

MIN_THIRD = 12  # countries that are left for the universal facts
EDITION = "fedlora countries, edition 1"
Files = dict[str, list[Record]]


def check_countries(codes: Sequence[str]) -> list[str]:
    """Return the codes in upper case.

    Raises:
        UserError: with every fault of the list.
    """
    upper = [code.upper() for code in codes]
    unknown = [code for code in dict.fromkeys(upper) if code not in COUNTRIES]
    repeated = [code for code in dict.fromkeys(upper) if upper.count(code) > 1]
    faults = []
    if unknown:
        faults.append(
            f"{', '.join(unknown)}: no country of that code is known here. "
            f"Known: {' '.join(COUNTRIES)}."
        )
    if repeated:
        faults.append(f"{', '.join(repeated)}: named more than once. Name each country once.")
    if len(set(upper)) < 2:
        faults.append("One country has nobody to disagree with. Name at least two.")
    if len(set(upper)) > len(COUNTRIES) - MIN_THIRD:
        faults.append(
            f"{len(set(upper))} clients leave too few third countries for the universal facts. "
            f"Name at most {len(COUNTRIES) - MIN_THIRD}."
        )
    if faults:
        raise UserError("\n".join(faults))
    return upper


@dataclass(frozen=True)
class Benchmark:
    """A set's files, with what its card tells about them."""

    files: Files
    partition: Partition
    ids: dict[str, str]
    """Client ids by place."""
    description: Description


def generate_countries(codes: Sequence[str]) -> Benchmark:
    """Return the benchmark of clients that are countries."""
    topics = read_topics(COUNTRY_KINDS, tuple(COUNTRIES))
    seed = f"{EDITION}, {' '.join(codes)}"
    partition = divide(topics, codes, seed)
    facts = choose(topics, codes, seed)
    ids = {code: COUNTRIES[code].slug for code in codes}
    files = universal_files(facts) | own_files(partition, ids, "country")
    for code, known in share_balanced(facts, codes).items():
        files[f"{ids[code]}/universal_train.json"] = named_records(
            [(fact.topic, fact.place) for fact in known], TRAIN, with_distractors=False
        )
    return Benchmark(files, partition, ids, describe_countries(codes, partition, facts))


def describe_countries(
    codes: Sequence[str], partition: Partition, facts: Sequence[UniversalFact]
) -> Description:
    """Return what the card says about clients that are countries."""
    complete = sum(len(places) == len(codes) for places in partition.conflicts.values())
    partial = len(partition.conflicts) - complete
    third = len({fact.place for fact in facts})
    return Description(
        title=f"One question, {len(codes)} countries",
        options=f"--countries {' '.join(codes)}",
        clients="People ask a help desk for residents the same question everywhere, and the right "
        f"answer depends on the country: {', '.join(COUNTRIES[code].name for code in codes)}. A "
        "question about the own country never names it.",
        conflicts=f"**Conflicts**: {complete} facts that every client has and answers in its own "
        "way, none like another."
        + (
            f" As these are fewer than {MIN_CONFLICTS}, {partial} more concern only those clients "
            "whose answer no other client shares."
            if partial
            else ""
        )
        + " Facts that some clients answer alike and others not (EUR in two of them) are local "
        f"ones, and {len(partition.shared)} that all of them answer alike are left out.",
        universal=f"**Universal facts**: {len(facts)} about {third} third countries, which the "
        "question names, of the same kinds and in the same wordings. Each client trains on two "
        "thirds of them, and each fact is known to one client at least.",
    )


def universal_files(facts: Sequence[UniversalFact]) -> Files:
    """Return the common tests of universal facts."""
    pairs = [(fact.topic, fact.place) for fact in facts]
    return {
        "universal_validation.json": named_records(pairs, VALIDATION),
        "universal_test.json": named_records(pairs, TEST),
    }


def named_records(
    pairs: Sequence[tuple[Topic, str]], phrasings: slice, *, with_distractors: bool = True
) -> list[Record]:
    """Return one record per fact and wording; each names the place that it is about."""
    records = []
    for topic, place in pairs:
        for phrasing in range(NUM_WORDINGS)[phrasings]:
            record = make_record(topic, place, phrasing, named=True)
            if with_distractors:
                record["distractors"] = pick_distractors(topic, [place], phrasing, named=True)
            records.append(record)
    return records


def own_files(partition: Partition, ids: Mapping[str, str], noun: str) -> Files:
    """Return each client's local files and the common conflicts."""
    files: Files = {}
    for name, phrasings in (("validation", VALIDATION), ("test", TEST)):
        files[f"conflict_{name}.json"] = [
            make_conflict(topic, {place: ids[place] for place in places}, phrasing, noun)
            for topic, places in partition.conflicts.items()
            for phrasing in range(NUM_WORDINGS)[phrasings]
        ]
    for place, client in ids.items():
        own = [topic for topic, places in partition.conflicts.items() if place in places]
        topics = own + partition.local[place]
        for name, phrasings in (
            ("train", TRAIN),
            ("validation", VALIDATION),
            ("test", LOCAL_TEST),
        ):
            records = []
            for topic in topics:
                for phrasing in range(NUM_WORDINGS)[phrasings]:
                    record = make_record(topic, place, phrasing, noun=noun)
                    if name != "train":
                        record["distractors"] = pick_distractors(
                            topic, [place], phrasing, noun=noun
                        )
                    records.append(record)
            files[f"{client}/local_{name}.json"] = records
    return files
