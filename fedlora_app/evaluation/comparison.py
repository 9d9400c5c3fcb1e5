"""What ``fedlora compare`` prints: evaluated runs side by side, paired by question.

In come the contents of two or more runs' ``evaluation.json``; the first is the reference. Out
come their figures, the differences with intervals and tests, and every reason for which this is
no like-for-like comparison.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    FIGURES,
    PASS_RATE,
    Measure,
    figure_key,
    shown_measures,
)
from fedlora_app.evaluation.statistics import mcnemar, over_seeds, paired_difference

FORMAT = 1
NUM_NAMED = 3
"""How many differing values a sentence names before it only counts them."""

Key = tuple[str, int]
"""Client and record: a question within its set."""


@dataclass(frozen=True)
class Topic:
    """Some questions, and the summary's figure of how they went."""

    figure: str
    question_set: str
    unseen_only: bool = False
    every_client: bool = False
    """A record counts once, and as right only if every client's own answer is."""


TOPICS = (
    Topic(UNIVERSAL, UNIVERSAL),
    Topic(UNIVERSAL_UNSEEN, UNIVERSAL, unseen_only=True),
    Topic(LOCAL_SET, LOCAL_SET),
    Topic(CONFLICT, CONFLICT),
    Topic(PASS_RATE, CONFLICT, every_client=True),
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A run's name and the content of its ``evaluation.json``."""

    name: str
    evaluation: Mapping[str, Any]

    @cached_property
    def rows(self) -> dict[str, dict[Key, dict[str, Any]]]:
        """The questions of every set as the clients answer them, adapters at full scale."""
        sets: dict[str, dict[Key, dict[str, Any]]] = {}
        for row in self.evaluation["questions"]:
            if row["scale"] != 1.0:
                continue
            rows, key = sets.setdefault(row["question_set"], {}), (row["client"], row["record"])
            if key in rows:
                raise ValueError(
                    f"{self.name}: evaluation.json holds record {key[1]} of {key[0]}'s "
                    f"{row['question_set']} questions twice. Expected one row per question at "
                    f"scale 1.0. Write it again with: fedlora evaluate {self.name}"
                )
            rows[key] = row
        return sets

    def select(self, topic: Topic) -> dict[Key, dict[str, Any]]:
        """Return the rows that belong to a topic."""
        rows = self.rows.get(topic.question_set, {})
        return {k: row for k, row in rows.items() if row["is_unseen"] or not topic.unseen_only}

    def hashes(self, roles: Iterable[str]) -> dict[str, str]:
        """Return the beginnings of the files' hashes by role and client."""
        files = self.evaluation["files"]
        pairs = [(role, client) for role in roles for client in files if role in files[client]]
        return {f"{role} of {client} (sha256)": files[client][role][:12] for role, client in pairs}

    @property
    def num_parameters(self) -> int:
        """Parameters of the adapters that a client answers with."""
        sizes = self.evaluation["num_parameters"]
        return sum(sizes[adapter] for adapter in self.evaluation["answering"].split("+"))

    @property
    def base_model(self) -> str:
        """Name and beginning of the fingerprint."""
        base = self.evaluation["base_model"]
        return f"{base['name']} ({base['fingerprint'][:12]})"


OTHER_PROMPTS = "have other system prompts"
CONDITIONS: dict[str, Callable[[EvaluatedRun], dict[str, str]]] = {
    "have other clients": lambda run: {"": f"({', '.join(sorted(run.evaluation['files']))})"},
    "have other base models": lambda run: {"": run.base_model},
    "have other training data": lambda run: run.hashes(("universal_train", "local_train")),
    OTHER_PROMPTS: lambda run: {
        f"for {client}": prompt for client, prompt in run.evaluation["system_prompts"].items()
    },
    "have other numbers of optimizer steps": lambda run: {"": f"{run.evaluation['num_steps']:,}"},
}
"""What has to be equal in a fair comparison, apart from the questions."""


def compare_evaluations(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare runs with the first of them; returns data that JSON can hold.

    Args:
        evaluations: each run's ``evaluation.json`` by the run's name.

    Raises:
        ValueError: fewer than two runs, or an evaluation that cannot be read.
    """
    reference, *others = runs = _read_runs(evaluations)
    differences: list[dict[str, Any]] = []
    faults: list[str] = []
    notes: list[str] = []
    for run in others:
        faults += _find_other_conditions(reference, run)
        notes += _note_other_size(reference, run)
        for topic in TOPICS:
            fault = _find_other_questions(reference, run, topic)
            faults += [fault] if fault else []
            differences += [] if fault else _compute_differences(reference, run, topic)
    adjusted = adjust_holm([entry["p_value"] for entry in differences])
    for entry, p_value in zip(differences, adjusted, strict=True):
        entry["p_value_holm"] = p_value
    groups, group_notes = group_by_mode(evaluations)
    return {
        "runs": [_dump_run(run) for run in runs],
        "differences": differences,
        "groups": groups,
        "not_comparable": list(dict.fromkeys(faults)),
        "notes": notes + group_notes,
    }


def group_by_mode(
    evaluations: Mapping[str, dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return means over the seeds of like runs, and notes on runs that were not averaged.

    Alike are runs of one mode, number of parameters and settings, trained and tested under the
    same conditions. The n of a mean counts seeds.
    """
    alike: dict[str, list[EvaluatedRun]] = {}
    for run in _read_runs(evaluations):
        names = ("mode", "answering", "num_parameters", "files", "settings")
        identity = [run.evaluation.get(name) for name in names]
        conditions = [describe(run) for describe in CONDITIONS.values()]
        alike.setdefault(json.dumps([identity, conditions], sort_keys=True), []).append(run)
    groups, notes = [], []
    for members in alike.values():
        names = [run.name for run in members]
        seeds = [run.evaluation["seed"] for run in members]
        label = f"{members[0].evaluation['mode']}, {members[0].num_parameters:,} parameters"
        if len(members) > len(set(seeds)):
            notes.append(
                f"{', '.join(names)} ({label}) share seeds ({', '.join(map(str, seeds))}), so no "
                "mean over seeds is given for them."
            )
        elif len(members) > 1:
            figures = _average([run.evaluation["summary"] for run in members])
            groups.append({"label": label, "runs": names, "seeds": seeds, "figures": figures})
    return groups, notes


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number, in the order given.

    Holm 1979, https://www.jstor.org/stable/4615733.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _read_runs(evaluations: Mapping[str, dict[str, Any]]) -> list[EvaluatedRun]:
    if len(evaluations) < 2:
        given = ", ".join(evaluations) or "none"
        raise ValueError(
            f"A comparison needs two or more different runs; given: {given}. Name another run."
        )
    for name, evaluation in evaluations.items():
        if evaluation.get("format") != FORMAT:
            raise ValueError(
                f"{name}: evaluation.json has format {evaluation.get('format')!r}, expected "
                f"{FORMAT}. Write it again with: fedlora evaluate {name}"
            )
    return [EvaluatedRun(name, evaluation) for name, evaluation in evaluations.items()]


def _dump_run(run: EvaluatedRun) -> dict[str, Any]:
    keys = ("mode", "seed", "round", "answering", "num_steps")
    return {
        "name": run.name,
        **{key: run.evaluation[key] for key in keys},
        "num_parameters": run.num_parameters,
        "figures": dict(run.evaluation["summary"]),
    }


def _average(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Average what all summaries have; a figure that one run has no value of has no mean."""
    columns = {key: [s[key]["value"] for s in summaries if key in s] for key in summaries[0]}
    return {
        key: over_seeds([math.nan if value is None else value for value in values]).dump()
        for key, values in columns.items()
        if len(values) == len(summaries)
    }


def _compute_differences(
    reference: EvaluatedRun, run: EvaluatedRun, topic: Topic
) -> list[dict[str, Any]]:
    """Return a topic's differences; a measure that nothing was scored by has none."""
    differences = []
    for measure in shown_measures():
        outcomes = _pair_outcomes(reference, run, topic, measure)
        if not outcomes:
            continue
        clusters, ones, others = zip(*outcomes, strict=True)
        better = [one > other for one, other in zip(ones, others, strict=True)]
        worse = [one < other for one, other in zip(ones, others, strict=True)]
        test = mcnemar(better, worse)  # of passes McNemar's, of other values the sign test
        differences.append(
            {
                "run": run.name,
                "reference": reference.name,
                "topic": FIGURES[topic.figure],
                "scored_by": measure.label,
                "measure": figure_key(topic.figure, measure),
                "difference": paired_difference(ones, others, clusters).dump(),
                "p_value": test["p_value"],
                "only_run": test["only_first"],
                "only_reference": test["only_second"],
                "n": test["n"],
            }
        )
    return differences


def _pair_outcomes(
    reference: EvaluatedRun, run: EvaluatedRun, topic: Topic, measure: Measure
) -> list[tuple[str, float, float]]:
    """Return (cluster, outcome of the run, of the reference) for all that was scored."""
    if topic.every_client and measure.passes_above is None:
        return []
    field = measure.row_key
    ones, others = run.select(topic), reference.select(topic)
    scored = [k for k, row in ones.items() if None not in (row.get(field), others[k].get(field))]
    units = [[key] for key in scored]
    if topic.every_client:
        records: dict[int, list[Key]] = {}
        for key in scored:
            records.setdefault(key[1], []).append(key)
        # A record of one client alone is in conflict with nobody.
        units = [keys for keys in records.values() if len(keys) > 1]
    return [
        (
            ones[keys[0]]["fact"] or ones[keys[0]]["instruction"],
            min(ones[key][field] for key in keys),
            min(others[key][field] for key in keys),
        )
        for keys in units
    ]


def _find_other_conditions(reference: EvaluatedRun, run: EvaluatedRun) -> list[str]:
    """Return a sentence for everything but the questions that two runs differ in."""
    sentences = []
    for claim, describe in CONDITIONS.items():
        mark = '"' if claim == OTHER_PROMPTS else ""
        contrast = _contrast(describe(reference), describe(run), mark)
        if contrast:
            sentences.append(f"{reference.name} and {run.name} {claim}: {contrast}.")
    return sentences


def _find_other_questions(reference: EvaluatedRun, run: EvaluatedRun, topic: Topic) -> str | None:
    """Return why two runs cannot be paired on a topic, None where they can."""
    names, name = f"{reference.name} and {run.name}", topic.question_set
    sets = [_fingerprint_questions(r.rows.get(name, {})) for r in (reference, run)]
    contrast = _contrast(reference.hashes([name]), run.hashes([name]))
    if all(sets) and contrast:
        return f"{names} have other {name} test files, so they are not paired: {contrast}."
    if sets[0] != sets[1]:
        return (
            f"{names} were asked other {name} questions, so they are not paired: {len(sets[0])} "
            f"and {len(sets[1])}, {len(sets[0] & sets[1])} in common."
        )
    unseen = [r.select(topic).keys() for r in (reference, run)]
    if unseen[0] != unseen[1]:
        return (
            f"{names} had other facts that clients never saw, so they are not paired on these: "
            f"{len(unseen[0])} and {len(unseen[1])} questions, {len(unseen[0] & unseen[1])} in "
            "common."
        )
    return None


def _fingerprint_questions(rows: Mapping[Key, dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Return what has to be equal for pairs: the questions and what each is scored by."""
    return {
        (key, row["instruction"], *(row[m.row_key] is None for m in (ACCURACY, EXACT_MATCH)))
        for key, row in rows.items()
    }


def _contrast(ones: Mapping[str, str], others: Mapping[str, str], mark: str = "") -> str:
    """Name the values that differ; what only one side has is another sentence's matter."""
    differing = [key for key in ones if key in others and ones[key] != others[key]]
    parts = []
    for key in differing[:NUM_NAMED]:
        one, other = _shorten(ones[key], others[key])
        parts.append(f"{key} {mark}{one}{mark} and {mark}{other}{mark}".strip())
    left = len(differing) - NUM_NAMED
    return "; ".join([*parts, f"{left} more"] if left > 0 else parts)


def _shorten(one: str, other: str, width: int = 44) -> list[str]:
    """Cut long texts to where they begin to differ."""
    if max(len(one), len(other)) <= width:
        return [one, other]
    letters = enumerate(zip(one, other, strict=False))
    start = next((i for i, pair in letters if len(set(pair)) > 1), min(len(one), len(other)))
    start = max(0, start - width // 4)
    return [
        "..." * (start > 0) + text[start : start + width] + "..." * (start + width < len(text))
        for text in (one, other)
    ]


def _note_other_size(reference: EvaluatedRun, run: EvaluatedRun) -> list[str]:
    if run.num_parameters == reference.num_parameters:
        return []
    return [
        f"{reference.name} answers with {reference.num_parameters:,} adapter parameters, "
        f"{run.name} with {run.num_parameters:,}."
    ]
