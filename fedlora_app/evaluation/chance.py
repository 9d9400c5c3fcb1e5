"""How often guessing would rank the right answer first: 1 / number of candidates, averaged.

Over the questions that were asked and have something to rank. A conflict that every client has to
get right takes a right guess of each of them. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from fedlora_app.data.questions import CONFLICT, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.names import ACCURACY, CHANCE, PASS_RATE, QUESTION_SETS
from fedlora_app.foundation.percent import format_percent

Chances = dict[str, float]
"""By question set, and under ``PASS_RATE`` for conflicts that every client has to get right."""


def read_chances(evaluation: Mapping[str, Any]) -> Chances:
    """Return the chances of the questions in an ``evaluation.json``."""
    found: dict[str, list[float]] = {}
    conflicts: dict[int, list[float]] = {}
    for row in evaluation["questions"]:
        num_candidates = len(row.get("candidates") or ())
        if row["scale"] != 1.0 or num_candidates < 2:
            continue
        names = [row["question_set"], *[UNIVERSAL_UNSEEN] * bool(row["is_unseen"])]
        for name in names:
            found.setdefault(name, []).append(1 / num_candidates)
        if row["question_set"] == CONFLICT:
            conflicts.setdefault(row["record"], []).append(1 / num_candidates)
    return _average(found, conflicts)


def find_reported_chances(reports: Mapping[str, Mapping[str, Any]]) -> Chances:
    """Return the chances of the questions that clients report of; none in histories of old."""
    found: dict[str, list[float]] = {}
    conflicts: dict[int, list[float]] = {}
    for report in reports.values():
        for name in QUESTION_SETS:
            ending = f"/{name}/{CHANCE}"
            prefix = next((k.removesuffix(CHANCE) for k in report if k.endswith(ending)), None)
            if prefix is None:
                continue
            found.setdefault(name, []).extend(
                [report[prefix + CHANCE]] * int(report[f"{prefix}n_ranked"])
            )
            verdicts = report.get(prefix + ACCURACY.reported_each, []) if name == CONFLICT else []
            for record, verdict in enumerate(verdicts):
                if verdict >= 0:
                    conflicts.setdefault(record, []).append(report[prefix + CHANCE])
    return _average(found, conflicts)


def describe_chance(chances: Chances, name: str, *, lead: str = "", end: str = "") -> str:
    """Return "chance 33 %" between ``lead`` and ``end``, or "" where it is not known."""
    if name not in chances:
        return ""
    return f"{lead}chance {format_percent(chances[name], digits=None)} %{end}"


def _average(found: Mapping[str, list[float]], conflicts: Mapping[int, list[float]]) -> Chances:
    passes = [math.prod(chances) for chances in conflicts.values() if len(chances) > 1]
    return {name: fmean(values) for name, values in {**found, PASS_RATE: passes}.items() if values}
