"""What ``fedlora compare`` prints: evaluated runs side by side, paired by question.

Input: the contents of two or more runs' ``evaluation.json``; the first is the reference. Output:
their figures, the differences with intervals and tests, and every reason for which this is not
a like-for-like comparison.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.chance import read_chances
from fedlora_app.evaluation.evaluated_run import (
    EvaluatedRun,
    Evaluations,
    Key,
    Variant,
    contrast,
    fact_of,
    find_leading,
    find_other_conditions,
    group_alike,
    note_other_size,
    question_id,
    read_conflicts,
    read_runs,
)
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    FIGURES,
    LEAKAGE,
    PASS_RATE,
    SPECIFICITY,
    Measure,
    figure_key,
    shown_measures,
)
from fedlora_app.evaluation.shares import read_summary
from fedlora_app.evaluation.statistics import (
    ROUNDING,
    SIGNIFICANT,
    Estimate,
    average_estimates,
    flip_signs,
    over_seeds,
    paired_difference,
)

Verdicts = Mapping[int, bool]
"""By conflict record: every client gave its own answer."""


@dataclass(frozen=True)
class Topic:
    """Some questions, and the summary's figure of how they went."""

    figure: str
    question_set: str
    unseen_only: bool = False
    every_client: bool = False
    """A record counts once, and as right only if every client's own answer is."""

    def leads(self, run: EvaluatedRun) -> Measure:
        """Return what the topic's questions are judged by first."""
        name = UNIVERSAL_UNSEEN if self.unseen_only else self.question_set
        return find_leading(run.evaluation, name)

    def select(self, run: EvaluatedRun) -> dict[Key, dict[str, Any]]:
        """Return the rows of a run that belong to the topic."""
        rows = run.rows.get(self.question_set, {})
        return {k: row for k, row in rows.items() if row["is_unseen"] or not self.unseen_only}


TOPICS = (
    Topic(UNIVERSAL, UNIVERSAL),
    Topic(UNIVERSAL_UNSEEN, UNIVERSAL, unseen_only=True),
    Topic(LOCAL_SET, LOCAL_SET),
    Topic(CONFLICT, CONFLICT),
    Topic(PASS_RATE, CONFLICT, every_client=True),
)


def compare_evaluations(evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare runs with the first of them; returns data that JSON can hold.

    Args:
        evaluations: each run's ``evaluation.json`` by the run's name.

    Raises:
        ComparisonError: fewer than two runs, or an evaluation that cannot be read.
    """
    reference, *others = runs = read_runs(evaluations)
    differences: list[dict[str, Any]] = []
    faults: list[str] = []
    notes: list[str] = []
    for run in others:
        faults += find_other_conditions(reference, run)
        notes += note_other_size(reference, run)
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
    """Return means over the seeds of like runs, and notes on runs that were not averaged."""
    groups, notes = [], []
    for members in group_alike(read_runs(evaluations)):
        names = [run.name for run in members]
        seeds = [run.evaluation["seed"] for run in members]
        label = f"{members[0].evaluation['mode']}, {members[0].num_parameters:,} parameters"
        if len(members) > len(set(seeds)):
            notes.append(
                f"{', '.join(names)} ({label}) share seeds ({', '.join(map(str, seeds))}), so no "
                "mean over seeds is given for them."
            )
        elif len(members) > 1:
            figures = _average([read_summary(run.evaluation) for run in members])
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


@dataclass(frozen=True)
class Paired:
    """A difference over the same questions, and a test of it that flips whole facts."""

    difference: Estimate
    p_value: float

    @property
    def sign(self) -> int:
        """1 or -1 where both tell the difference from none, else 0."""
        low, high = self.difference.low, self.difference.high
        if low is None or self.p_value >= SIGNIFICANT:
            return 0
        return (low > 0) - (high < 0)


def pair_conflicts(
    pairs: Sequence[tuple[Verdicts, Verdicts]], facts: Mapping[int, Hashable]
) -> Paired | None:
    """Return the difference over the same conflict records, run by run.

    Facts are the unit, because paraphrases of one are not independent. Over several runs the
    interval is the wider of that and Student's t. None unless the facts are known and all were
    asked the same records.

    Args:
        facts: by record, what its paraphrases share.
    """
    if not facts or any(side.keys() != facts.keys() for pair in pairs for side in pair):
        return None
    records = [record for _ in pairs for record in facts]
    about = [facts[record] for record in records]
    ones, others = ([pair[i][record] for pair in pairs for record in facts] for i in (0, 1))
    difference = paired_difference(ones, others, about, records)
    if len(pairs) > 1:
        by_seed = over_seeds([fmean(two.values()) - fmean(one.values()) for two, one in pairs])
        difference = difference.widen(by_seed, lowest=-1.0)
    return Paired(difference, flip_signs(ones, others, about))


def pair_variants(two: Variant, one: Variant, evaluations: Evaluations) -> Paired | None:
    """Return the difference between like runs, paired by seed; None unless the seeds are equal."""
    if two.keys() != one.keys():
        return None
    sides = [[read_conflicts(evaluations[side[s]]) for s in two] for side in (two, one)]
    pairs = [(ones, others) for (ones, _), (others, _) in zip(*sides, strict=True)]
    return pair_conflicts(pairs, sides[0][0][1])


def _dump_run(run: EvaluatedRun) -> dict[str, Any]:
    keys = ("mode", "seed", "round", "answering", "num_steps")
    return {
        "name": run.name,
        **{key: run.evaluation[key] for key in keys},
        "num_parameters": run.num_parameters,
        "figures": read_summary(run.evaluation),
        "chances": read_chances(run.evaluation),
    }


def _average(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Average what all summaries have; a figure that one run has no value of has no mean."""
    means = {}
    for key in summaries[0]:
        found = [Estimate(**summary[key]) for summary in summaries if key in summary]
        lowest = -1.0 if key.startswith((LEAKAGE, SPECIFICITY)) else 0.0
        if len(found) == len(summaries):
            means[key] = average_estimates(found, lowest).dump()
    return means


def _compute_differences(
    reference: EvaluatedRun, run: EvaluatedRun, topic: Topic
) -> list[dict[str, Any]]:
    """Return a topic's differences; a measure that nothing was scored by has none."""
    differences = []
    leads = topic.leads(reference)
    for measure in shown_measures():
        outcomes = _pair_outcomes(reference, run, topic, measure)
        if not outcomes:
            continue
        facts, questions, ones, others = zip(*outcomes, strict=True)
        difference = paired_difference(ones, others, facts, questions)
        gains: dict[Any, float] = dict.fromkeys(questions, 0.0)
        for question, one, other in zip(questions, ones, others, strict=True):
            gains[question] += float(one) - float(other)
        differences.append(
            {
                "run": run.name,
                "reference": reference.name,
                "topic": FIGURES[topic.figure],
                "scored_by": measure.label,
                "leads": measure is leads,
                "measure": figure_key(topic.figure, measure),
                "difference": difference.dump(),
                "p_value": flip_signs(ones, others, facts),
                "only_run": sum(gain > ROUNDING for gain in gains.values()),
                "only_reference": sum(gain < -ROUNDING for gain in gains.values()),
                "n": difference.n,
                "facts": difference.facts,
            }
        )
    return differences


def _pair_outcomes(
    reference: EvaluatedRun, run: EvaluatedRun, topic: Topic, measure: Measure
) -> list[tuple[str, tuple[Any, ...], float, float]]:
    """Return (fact, question, outcome of the run, of the reference) for all that was scored."""
    if topic.every_client and measure.passes_above is None:
        return []
    field = measure.row_key
    ones, others = topic.select(run), topic.select(reference)
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
            fact_of(ones[keys[0]]),
            question_id(topic.question_set, *keys[0]),
            min(ones[key][field] for key in keys),
            min(others[key][field] for key in keys),
        )
        for keys in units
    ]


def _find_other_questions(reference: EvaluatedRun, run: EvaluatedRun, topic: Topic) -> str | None:
    """Return why two runs cannot be paired on a topic, None where they can."""
    names, name = f"{reference.name} and {run.name}", topic.question_set
    sets = [_fingerprint_questions(r.rows.get(name, {})) for r in (reference, run)]
    differing = contrast(reference.hashes([name]), run.hashes([name]))
    if all(sets) and differing:
        return f"{names} have other {name} test files, so they are not paired: {differing}."
    if sets[0] != sets[1]:
        return (
            f"{names} were asked other {name} questions, so they are not paired: {len(sets[0])} "
            f"and {len(sets[1])}, {len(sets[0] & sets[1])} in common."
        )
    ones, others = (topic.select(r) for r in (reference, run))
    if ones.keys() != others.keys():
        return (
            f"{names} had other facts that clients never saw, so they are not paired on these: "
            f"{len(ones)} and {len(others)} questions, {len(ones.keys() & others.keys())} in "
            "common."
        )
    rows, other_rows = (r.rows.get(name, {}) for r in (reference, run))
    num_other = sum(_rank_others(row, other_rows[key]) for key, row in rows.items())
    if num_other:
        return (
            f"{names} ranked other candidates in {num_other} of {len(rows)} {name} questions, so "
            "they are not paired. Write both again with: fedlora evaluate"
        )
    return None


def _rank_others(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two rows of a question hold other candidates; evaluations of old hold none."""
    candidates = [set(row.get("candidates") or ()) for row in (one, other)]
    return all(candidates) and candidates[0] != candidates[1]


def _fingerprint_questions(rows: Mapping[Key, dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Return what has to be equal for pairs: the questions and what each is scored by."""
    return {
        (key, row["instruction"], *(row[m.row_key] is None for m in (ACCURACY, EXACT_MATCH)))
        for key, row in rows.items()
    }
