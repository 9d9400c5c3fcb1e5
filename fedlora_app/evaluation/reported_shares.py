"""Shares of right answers with their intervals, from what clients report while a run goes.

The same figures, by the same function, as ``fedlora evaluate`` makes of the single answers: a run's
history has a verdict per record, and as numbers which records are about one fact. What clients call
their own facts it does not have, so that nothing tells whether two clients' local questions are
about one fact; then a share of them has no interval. Histories of earlier versions have the number
of facts alone, and the answers about one fact are taken to agree. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from statistics import fmean

from fedlora_app.config.rounds import BASE
from fedlora_app.data.questions import CONFLICT, UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.evaluated_run import question_id
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    FACT_EACH,
    QUESTION_SETS,
    UNSEEN_EACH,
    Measure,
)
from fedlora_app.evaluation.reported import COUNTS, Reports, judge_conflicts
from fedlora_app.evaluation.shares import Shares, pool_shares
from fedlora_app.evaluation.statistics import NOTHING, Estimate, proportion, share_of_facts

MEASURES = (EXACT_MATCH, ACCURACY)

Answer = tuple[int, Hashable, tuple[Hashable, ...]]
"""Whether it passes, what it is about, and what was asked."""


def read_reported_shares(reports: Reports, label: str) -> Shares:
    """Return what the adapters ``label`` got right over all clients."""
    shares: Shares = {}
    for measure in MEASURES:
        for name in QUESTION_SETS:
            if (estimate := estimate_share(reports, label, name, measure)).n:
                shares.setdefault(measure.name, {})[name] = estimate
    return shares


def estimate_share(reports: Reports, label: str, question_set: str, measure: Measure) -> Estimate:
    """Return a question set's share of right answers over all clients."""
    prefix = f"{label}/{question_set}"
    found = {
        client: (report[key], int(report[f"{prefix}/{COUNTS[measure.name]}"]))
        for client, report in reports.items()
        if (key := f"{prefix}/{measure.reported}") in report
    }
    if not found:
        return NOTHING
    answers = [
        _read_answers(client, reports[client], label, question_set, measure) for client in found
    ]
    if [len(listed) for listed in answers] != [n for _, n in found.values()]:
        counts = [(client, *counted) for client, counted in found.items()]
        return pool_shares(question_set, counts, _count_facts(reports, prefix))
    outcomes, facts, questions = zip(*(a for listed in answers for a in listed), strict=True)
    estimate = proportion(outcomes, facts, questions)
    if len({fact[0] for fact in facts if isinstance(fact, tuple)}) > 1:
        return replace(estimate, low=None, high=None, facts=None)
    return estimate


def estimate_passes(reports: Reports, label: str, measure: Measure) -> Estimate:
    """Return the share of conflicts that every client answered in its own way."""
    verdicts = judge_conflicts(reports, label, measure)
    if not verdicts:
        return NOTHING
    if facts := read_conflict_facts(reports, verdicts):
        return proportion([*verdicts.values()], [facts[record] for record in verdicts])
    num_facts = _count_facts(reports, f"{label}/{CONFLICT}")
    return share_of_facts(fmean(verdicts.values()), len(verdicts), num_facts)


def pair_answers(
    reports: Reports, labels: tuple[str, str], question_set: str, measure: Measure
) -> tuple[list[int], list[int], list[Hashable]]:
    """Return whether the adapters of two labels pass, and what about, by question of all clients.

    Of the questions that both were asked; empty where verdicts are not listed.
    """
    rows: list[tuple[int, int, Hashable]] = []
    for client, report in reports.items():
        ones, others = (
            {asked: (passed, fact) for passed, fact, asked in answers}
            for label in labels
            for answers in [_read_answers(client, report, label, question_set, measure)]
        )
        rows += [(*ones[asked][:1], *others[asked]) for asked in ones if asked in others]
    return tuple(map(list, zip(*rows, strict=True))) if rows else ([], [], [])


def read_conflict_facts(reports: Reports, records: Iterable[int]) -> dict[int, Hashable]:
    """Return the number of each conflict record's fact; empty in histories of old."""
    key = f"{BASE}/{CONFLICT}/{FACT_EACH}"
    listed = next((report[key] for report in reports.values() if key in report), [])
    return {record: listed[record] for record in records if record < len(listed)}


def _read_answers(
    client: str, report: Mapping[str, list[int]], label: str, question_set: str, measure: Measure
) -> list[Answer]:
    """Return a client's answers; none where its verdicts are not listed.

    What is about a fact of the client's own is marked by a tuple, for nobody else can know it.
    """
    asked = UNIVERSAL if question_set == UNIVERSAL_UNSEEN else question_set
    verdicts = report.get(f"{label}/{asked}/{measure.reported_each}", [])
    numbers = report.get(f"{BASE}/{asked}/{FACT_EACH}", [])
    unseen = report.get(f"{BASE}/{asked}/{UNSEEN_EACH}", [])
    if len(verdicts) != len(numbers):
        return []
    return [
        (passed, number if number >= 0 else (client, number), question_id(asked, client, record))
        for record, (passed, number) in enumerate(zip(verdicts, numbers, strict=True))
        if passed >= 0 and (question_set == asked or unseen[record])
    ]


def _count_facts(reports: Reports, prefix: str) -> int | None:
    """Return how many facts a set is about at the client with the most; None if not reported."""
    counts = [r[k] for r in reports.values() if (k := f"{prefix}/n_facts") in r]
    return int(max(counts)) if counts else None
