"""Facts as records: the question in each wording, the answer, and wrong answers beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora_app.demo.countries.facts import Partition, Topic
from fedlora_app.demo.countries.wordings import LOCAL_TEST, NUM_WORDINGS, TEST, TRAIN, VALIDATION
from fedlora_app.evaluation.metrics import normalise_answer

NUM_DISTRACTORS = 3

Record = dict[str, Any]
Files = dict[str, list[Record]]
Fact = tuple[Topic, str]  # a topic and the place that it is about


def build_records(
    facts: Sequence[Fact],
    wordings: slice,
    *,
    is_named: bool = False,
    has_distractors: bool = True,
) -> list[Record]:
    """Return one record per fact and wording.

    Args:
        is_named: the question names the country; otherwise it is about the client's own place.
    """
    records = []
    for topic, place in facts:
        name = place if is_named else ""
        for wording in range(NUM_WORDINGS)[wordings]:
            record = {
                "instruction": topic.kind.ask(topic.item, wording, name),
                "input": "",
                "output": topic.kind.reply(topic.item, topic.values[place], name),
                "fact": f"{topic.id} ({place})" if is_named else topic.id,
            }
            if has_distractors:
                wrong = _pick_distractors(topic, [place], wording)
                record["distractors"] = [
                    topic.kind.reply(topic.item, value, name) for value in wrong
                ]
            records.append(record)
    return records


def build_conflicts(
    conflicts: Mapping[Topic, Sequence[str]], ids: Mapping[str, str], wordings: slice
) -> list[Record]:
    """Return one record per conflict and wording, with the answer of each client concerned."""
    records = []
    for topic, places in conflicts.items():
        for wording in range(NUM_WORDINGS)[wordings]:
            wrong = _pick_distractors(topic, places, wording)
            record = {
                "instruction": topic.kind.ask(topic.item, wording),
                "input": "",
                "answers": {
                    ids[place]: topic.kind.reply(topic.item, topic.values[place])
                    for place in places
                },
                "distractors": [topic.kind.reply(topic.item, value) for value in wrong],
                "fact": topic.id,
            }
            records.append(record)
    return records


def build_conflict_files(conflicts: Mapping[Topic, Sequence[str]], ids: Mapping[str, str]) -> Files:
    """Return the common conflict questions."""
    return {
        "conflict_validation.json": build_conflicts(conflicts, ids, VALIDATION),
        "conflict_test.json": build_conflicts(conflicts, ids, TEST),
    }


def build_local_files(partition: Partition, ids: Mapping[str, str]) -> Files:
    """Return each client's questions about its own place, conflicts first."""
    files: Files = {}
    for place, client in ids.items():
        own = [topic for topic, places in partition.conflicts.items() if place in places]
        facts = [(topic, place) for topic in (*own, *partition.local[place])]
        files |= {
            f"{client}/local_train.json": build_records(facts, TRAIN, has_distractors=False),
            f"{client}/local_validation.json": build_records(facts, VALIDATION),
            f"{client}/local_test.json": build_records(facts, LOCAL_TEST),
        }
    return files


def build_universal_files(
    facts: Sequence[Fact], shares: Mapping[str, Sequence[Fact]], *, is_named: bool = True
) -> Files:
    """Return the common questions about universal facts, and each client's share to train on.

    Args:
        shares: by client id.
    """
    files = {
        "universal_validation.json": build_records(facts, VALIDATION, is_named=is_named),
        "universal_test.json": build_records(facts, TEST, is_named=is_named),
    }
    for client, known in shares.items():
        files[f"{client}/universal_train.json"] = build_records(
            known, TRAIN, is_named=is_named, has_distractors=False
        )
    return files


def _pick_distractors(topic: Topic, right: Sequence[str], wording: int) -> list[str]:
    """Return values of other places, each of about the length of a right one.

    Args:
        right: places whose values are right for some client.
    """
    options = {normalise_answer(value): value for value in topic.options}
    golds = list(dict.fromkeys(topic.values[place] for place in right))
    for gold in golds:
        options.pop(normalise_answer(gold), None)
    rng = random.Random(f"{topic.id}, {', '.join(right)}, {wording}")
    pool = rng.sample(list(options.values()), len(options))
    chosen: list[str] = []
    for index in range(max(NUM_DISTRACTORS, len(golds))):
        size = len(golds[index % len(golds)].encode())
        if pool:
            chosen.append(min(pool, key=lambda value: abs(len(value.encode()) - size)))
            pool.remove(chosen[-1])
    return chosen
