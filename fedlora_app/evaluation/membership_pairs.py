"""Members and matched non-members for membership inference: which record is put beside which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.questions import CONFLICT, LOCAL_ANSWERS, LOCAL_SET
from fedlora_app.data.records import ConflictRecord, Record, format_question
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.foundation.seeds import derive_seed


@dataclass(frozen=True)
class Pairs:
    """Members and as many matched non-members, in the same order."""

    members: list[Record]
    nonmembers: list[Record]
    num_by_length: int = 0
    """Pairs of different facts, which answers of similar length had to do for."""
    num_dropped: int = 0
    """Members without a partner."""


def build_pairs(
    members: Iterable[Record],
    candidates: Iterable[Record],
    num_tokens: Callable[[str], int],
    trained_questions: frozenset[str] = frozenset(),
) -> Pairs:
    """Give every member its own non-member; the order of the lists does not matter.

    A partner is of the same fact, with the same answer if there is one. Only members whose
    fact no candidate shares (or that name none) get one of the nearest answer length, from
    facts that no member is about.

    Args:
        num_tokens: length of an answer.
        trained_questions: ``question_key`` of everything that any client trained on; such
            candidates would be members themselves.
    """
    ordered = _in_drawn_order(members)
    free = [r for r in _in_drawn_order(candidates) if question_key(r) not in trained_questions]
    candidate_facts = {record.fact for record in free if record.fact}
    member_facts = {record.fact for record in ordered if record.fact}
    by_fact = _match_facts([m for m in ordered if m.fact in candidate_facts], free)
    by_length = _match_lengths(
        [member for member in ordered if member.fact not in candidate_facts],
        [record for record in free if record.fact not in member_facts],
        num_tokens,
    )
    matched = by_fact + by_length
    return Pairs(
        members=[member for member, _ in matched],
        nonmembers=[partner for _, partner in matched],
        num_by_length=len(by_length),
        num_dropped=len(ordered) - len(matched),
    )


def build_answer_pairs(client_id: str, client_files: Mapping[str, ClientFiles]) -> Pairs:
    """Pair every local record of a client with its own question and a wrong answer.

    The wrong answer is a distractor of the same fact that no client gives as an answer, else
    another client's answer. The latter is weaker as a control: where local records were
    trained on, that answer was too.
    """
    own, rivals, distractors = _collect_answers(client_id, client_files)
    members = _in_drawn_order(client_files[client_id].local.records)
    pairs = []
    for member in members:
        fact = cluster(member)
        options = distractors[fact] - own[fact] - rivals[fact] or rivals[fact] - own[fact]
        if options:
            wrong = min(options, key=lambda text: derive_seed(LOCAL_ANSWERS, _key(member), text))
            pairs.append((member, replace(member, output=wrong)))
    return Pairs(
        members=[member for member, _ in pairs],
        nonmembers=[wrong for _, wrong in pairs],
        num_dropped=len(members) - len(pairs),
    )


def question_key(record: Record) -> str:
    """Return what two wordings of a question share that differ in case or punctuation only."""
    return normalise_answer(format_question(record))


def cluster(record: Record | ConflictRecord) -> str:
    """Return what makes records depend on each other: the fact, else the question."""
    return record.fact or format_question(record)


def _collect_answers(
    client_id: str, client_files: Mapping[str, ClientFiles]
) -> tuple[dict[str, set[str]], dict[str, set[str]], dict[str, set[str]]]:
    """Return by fact: a client's own answers, the other clients', and distractors."""
    own: dict[str, set[str]] = defaultdict(set)
    rivals: dict[str, set[str]] = defaultdict(set)
    distractors: dict[str, set[str]] = defaultdict(set)
    for name, files in client_files.items():
        test = files.tests[LOCAL_SET].records if LOCAL_SET in files.tests else []
        for record in [*files.local.records, *test]:
            (own if name == client_id else rivals)[cluster(record)].add(record.output)
            if name == client_id:
                distractors[cluster(record)].update(record.distractors)
    tests = client_files[client_id].tests
    for record in tests[CONFLICT].records if CONFLICT in tests else []:
        distractors[cluster(record)].update(record.distractors)
        for name, answer in record.answers.items():
            (own if name == client_id else rivals)[cluster(record)].add(answer)
    return own, rivals, distractors


def _key(record: Record) -> tuple[str, str]:
    return format_question(record), record.output


def _in_drawn_order(records: Iterable[Record]) -> list[Record]:
    """Return distinct records in an order drawn from their texts.

    Alphabetical order would keep the same few question templates of every fact.
    """
    distinct = {_key(record): record for record in records}
    return [distinct[key] for key in sorted(distinct, key=lambda k: derive_seed("membership", *k))]


def _match_facts(
    members: Sequence[Record], candidates: Sequence[Record]
) -> list[tuple[Record, Record]]:
    """Pair records of the same fact, those with the same answer before any others."""
    free: dict[str | None, list[Record]] = defaultdict(list)
    for record in candidates:
        free[record.fact].append(record)
    partners: dict[int, Record] = {}
    for wants_same_answer in (True, False):
        for position, member in enumerate(members):
            fitting = [
                index
                for index, record in enumerate(free[member.fact])
                if record.output == member.output or not wants_same_answer
            ]
            if fitting and position not in partners:
                partners[position] = free[member.fact].pop(fitting[0])
    return [(members[position], partner) for position, partner in partners.items()]


def _match_lengths(
    members: Sequence[Record], candidates: Sequence[Record], num_tokens: Callable[[str], int]
) -> list[tuple[Record, Record]]:
    """Pair each member with the free record whose answer is nearest in length."""
    free: dict[int, list[Record]] = defaultdict(list)
    for record in candidates:
        free[num_tokens(record.output)].append(record)
    pairs = []
    for member in members:
        length = num_tokens(member.output)
        nearest = min(
            (n for n, records in free.items() if records),
            key=lambda n, length=length: (abs(n - length), n),
            default=None,
        )
        if nearest is not None:
            pairs.append((member, free[nearest].pop(0)))
    return pairs
