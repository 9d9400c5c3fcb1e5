"""Keywords that cannot do their work: shared, of nobody, or failed by the right answers."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from fedlora_app.config.schema import Config
from fedlora_app.data.keywords import passes_keyword_rule
from fedlora_app.data.linter.subject import (
    Finding,
    LintedClient,
    LintedFile,
    Severity,
    format_count,
    format_percent,
)
from fedlora_app.data.questions import CONFLICT
from fedlora_app.data.records import ConflictRecord, Record

MIN_KEYWORD_CEILING = 0.9


def find_keyword_clashes(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find keywords that are, or hold, another client's keyword of the same record."""
    for file in client.question_files:
        clashes: dict[tuple[Severity, str], list[int]] = defaultdict(list)
        for position, record in enumerate(file.records):
            for (one, one_words), (other, other_words) in combinations(record.keywords.items(), 2):
                for clash in _clashes(one, one_words, other, other_words):
                    clashes[clash].append(position)
        for (severity, text), positions in clashes.items():
            found = len(set(positions))
            more = f" So in {found} records." if found > 1 else ""
            yield file.finding(severity, "keyword-clash", positions[0], text + more)


def find_unknown_keyword_owners(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find keywords of somebody who is not a client."""
    for file in client.question_files:
        owners: dict[str, list[int]] = defaultdict(list)
        for position, record in enumerate(file.records):
            for owner in set(record.keywords) - set(config.conflict_ids):
                owners[owner].append(position)
        for owner, positions in owners.items():
            text = (
                f'has keywords of "{owner}", which is not a client (so in '
                f"{format_count(len(positions))}). Clients: {', '.join(config.conflict_ids)}."
            )
            yield file.finding("warning", "keyword-owner", positions[0], text)


def find_low_keyword_ceilings(client: LintedClient, config: Config) -> Iterator[Finding]:
    """Find files whose gold answers themselves fail the keyword rule too often."""
    for file in client.question_files:
        yield from _find_low_ceiling(file, client.config.id)


def keyword_ceiling(
    records: Sequence[Record | ConflictRecord], client_id: str | None, plain: bool = False
) -> tuple[int, int]:
    """Return how many gold answers pass the keyword rule, and how many there are.

    An answer of which the record does not say whose it is passes if it does so for one of the
    clients. Records without keywords, or without an answer, do not count.

    Args:
        client_id: whose answers; None for those of all clients.
        plain: apply the bare substring rule.
    """
    outcomes = [
        any(_passes(record, gold, owner, plain) for owner in owners)
        for record in records
        for gold, owners in _gold_answers(record, client_id)
    ]
    return sum(outcomes), len(outcomes)


def _find_low_ceiling(file: LintedFile, client_id: str) -> Iterator[Finding]:
    owner, by_client = client_id, {}
    if file.kind == CONFLICT:
        owner = None
        ids = sorted({client for record in file.records for client in record.answers})
        by_client = {client: keyword_ceiling(file.records, client) for client in ids}
    passed, n = keyword_ceiling(file.records, owner)
    lowest = min((p / m for p, m in [(passed, n), *by_client.values()] if m), default=1.0)
    if lowest >= MIN_KEYWORD_CEILING:
        return
    whose = "" if owner is None else f" of client {owner}"
    each = ", ".join(f"{client} {p} of {m}" for client, (p, m) in by_client.items() if m)
    plain, _ = keyword_ceiling(file.records, owner, plain=True)
    text = (
        f"only {passed} of {n} gold answers{whose} pass the keyword rule "
        f"({format_percent(passed, n)}{f'; {each}' if each else ''}), and {plain} of {n} the plain "
        f"substring rule ({format_percent(plain, n)}). No model can be told to do better; fix the "
        "keywords, or give the records answers and distractors."
    )
    yield file.finding("warning", "keyword-ceiling", None, text)


def _gold_answers(
    record: Record | ConflictRecord, client_id: str | None
) -> list[tuple[str, list[str]]]:
    """Return gold answers, each with the clients by one of whose keywords it must pass."""
    owners = [client for client, words in record.keywords.items() if words]
    if not owners or (client_id is not None and client_id not in owners):
        return []
    answers = getattr(record, "answers", {})
    if answers:
        wanted = [c for c in owners if c in answers and client_id in (None, c)]
        return [(answers[client], [client]) for client in wanted]
    if isinstance(record, Record) and client_id is not None:
        owners = [client_id]
    return [(record.output, owners)] if record.output else []


def _passes(record: Record | ConflictRecord, gold: str, owner: str, plain: bool) -> bool:
    others = [w for client, words in record.keywords.items() if client != owner for w in words]
    return passes_keyword_rule(gold, record.keywords[owner], others, plain=plain)


def _clashes(
    one: str, one_words: Iterable[str], other: str, other_words: Iterable[str]
) -> Iterator[tuple[Severity, str]]:
    for word in dict.fromkeys(one_words):
        for rival in dict.fromkeys(other_words):
            ours, theirs = _fold(word), _fold(rival)
            if ours == theirs:
                text = f'"{word}" is a keyword of both {one} and {other}, so an answer with it '
                yield "error", text + "passes for neither. Give each its own."
            elif ours in theirs or theirs in ours:
                inner, outer = sorted([(word, one), (rival, other)], key=lambda pair: len(pair[0]))
                text = (
                    f'keyword "{inner[0]}" of {inner[1]} stands inside "{outer[0]}" of {outer[1]}'
                )
                text += "; a plain substring rule counts both. Prefer keywords that share nothing."
                yield "warning", text


def _fold(keyword: str) -> str:
    return unicodedata.normalize("NFKC", keyword).casefold().strip()
