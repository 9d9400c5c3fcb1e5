"""Evaluated runs: what their ``evaluation.json`` holds, which are alike, and what they differ in.

Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from fedlora_app.config.combination import GATE, SCALE
from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.names import (
    EXACT_MATCH,
    MEASURES,
    QUESTION_SETS,
    Measure,
    own_answerer,
    relative_label,
)
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.terminal import shell

FORMAT = 1
NUM_NAMED = 3
"""How many differing values a sentence names before it only counts them."""

Row = Mapping[str, Any]
Key = tuple[str, int]
"""Client and record: a question within its set."""

Evaluations = Mapping[str, Mapping[str, Any]]
"""Each run's ``evaluation.json`` by the run's name."""


class ComparisonError(UserError):
    """Evaluations cannot be compared."""


Variant = dict[int, str]
"""Like runs by seed."""


def question_id(question_set: str, client: str, record: int) -> tuple[Hashable, ...]:
    """Return what tells questions apart: what all clients are asked is one question."""
    return (question_set, record, *(() if QUESTION_SETS[question_set].is_shared else (client,)))


def fact_of(row: Row) -> str:
    """Return what a question or a conflict is about: its fact, or else the question itself."""
    return row["fact"] or row["instruction"]


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
                raise ComparisonError(
                    f"{self.name}: evaluation.json holds record {key[1]} of {key[0]}'s "
                    f"{row['question_set']} questions twice. Expected one row per question at "
                    f"scale 1.0. Write it again with: fedlora evaluate {shell(self.name)}"
                )
            rows[key] = row
        return sets

    def hashes(self, roles: Iterable[str]) -> dict[str, str]:
        """Return the beginnings of the files' hashes by role and client."""
        files = self.evaluation["files"]
        pairs = [(role, client) for role in roles for client in files if role in files[client]]
        return {f"{role} of {client} (sha256)": files[client][role][:12] for role, client in pairs}

    @property
    def conditions(self) -> list[dict[str, str]]:
        """What has to be equal in a fair comparison, apart from the questions."""
        return [describe(self) for describe in CONDITIONS.values()]

    @property
    def combination(self) -> str:
        """How its adapters answered together; evaluations of old knew the gate alone."""
        was_gated = any(row.get("gate") is not None for row in self.evaluation["questions"])
        return self.evaluation.get("combination") or (GATE if was_gated else SCALE)

    @property
    def num_parameters(self) -> int:
        """Parameters of the adapters that a client answers with."""
        sizes = self.evaluation["num_parameters"]
        return sum(sizes[adapter] for adapter in self.evaluation["answering"].split("+"))

    @property
    def limits(self) -> dict[str, str]:
        """The most tokens of a generated answer; evaluations of old do not say it."""
        limit = self.evaluation.get("max_new_tokens")
        return {} if limit is None else {"": f"{limit:,}"}

    @property
    def base_model(self) -> str:
        """Name and beginning of the fingerprint."""
        base = self.evaluation["base_model"]
        return f"{base['name']} ({base['fingerprint'][:12]})"


OTHER_PROMPTS = "have other system prompts"
CONDITIONS: dict[str, Callable[[EvaluatedRun], dict[str, str]]] = {
    "have other clients": lambda run: {"": f"({', '.join(sorted(run.evaluation['files']))})"},
    "have other base models": lambda run: {"": run.base_model},
    "have other training data": lambda run: run.hashes(
        ("universal_train", "local_train", "public")
    ),
    OTHER_PROMPTS: lambda run: {
        f"for {client}": prompt for client, prompt in run.evaluation["system_prompts"].items()
    },
    "have other numbers of optimizer steps": lambda run: {"": f"{run.evaluation['num_steps']:,}"},
    "generated answers of other numbers of tokens at most": lambda run: run.limits,
}
"""What has to be equal in a fair comparison, apart from the questions."""


def find_leading(evaluation: Mapping[str, Any], question_set: str) -> Measure:
    """Return what a question set is judged by first; exact match in evaluations of old."""
    return MEASURES[(evaluation.get("leading") or {}).get(question_set, EXACT_MATCH.name)]


def read_conflicts(evaluation: Mapping[str, Any]) -> tuple[dict[int, bool], dict[int, str]]:
    """Return by conflict record whether all clients passed, and its fact."""
    key = find_leading(evaluation, CONFLICT).extend("passed")
    rows = {row["record"]: row for row in evaluation.get("conflicts") or ()}
    scored = {record: row for record, row in rows.items() if row[key] is not None}
    facts = {record: fact_of(row) for record, row in scored.items()}
    return {record: row[key] for record, row in scored.items()}, facts


def group_rows(evaluation: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the swap table's rows by who answers, adapters at full scale."""
    rows: dict[str, list[Row]] = {}
    for row in evaluation["swap_table"]:
        if row["scale"] == 1.0:
            rows.setdefault(relative_label(row), []).append(row)
    return rows


def chosen_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Return the clients' rows under their own adapters at the scale that was chosen."""
    own = own_answerer(evaluation["answering"])
    scales = {client: entry["chosen"] for client, entry in evaluation["scales"].items()}
    return [
        row
        for row in evaluation["swap_table"]
        if relative_label(row) == own and row["scale"] == scales.get(row["client"], 1.0)
    ]


def read_runs(evaluations: Evaluations) -> list[EvaluatedRun]:
    """Return two or more runs.

    Raises:
        ComparisonError: there are fewer, or an evaluation has another format.
    """
    if len(evaluations) < 2:
        given = ", ".join(evaluations) or "none"
        raise ComparisonError(
            f"A comparison needs two or more different runs; given: {given}. Name another run."
        )
    for name, evaluation in evaluations.items():
        if evaluation.get("format") != FORMAT:
            raise ComparisonError(
                f"{name}: evaluation.json has format {evaluation.get('format')!r}, expected "
                f"{FORMAT}. Write it again with: fedlora evaluate {shell(name)}"
            )
    return [EvaluatedRun(name, evaluation) for name, evaluation in evaluations.items()]


def group_alike(runs: Iterable[EvaluatedRun]) -> list[list[EvaluatedRun]]:
    """Return groups of runs that differ in their seeds at most.

    Alike are runs of one mode, number of parameters, settings and combination of adapters, trained
    and tested under the same conditions.
    """
    alike: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        names = ("mode", "answering", "num_parameters", "files", "settings")
        identity = [*map(run.evaluation.get, names), run.conditions, run.combination]
        alike.setdefault(json.dumps(identity, sort_keys=True), []).append(run)
    return list(alike.values())


def find_variants(names: Sequence[str], evaluations: Evaluations) -> list[Variant]:
    """Return the variants among evaluated runs; of several runs with one seed the first given."""
    runs = [EvaluatedRun(name, evaluations[name]) for name in names if name in evaluations]
    variants = []
    for group in group_alike(runs):
        variants.append({})
        for run in group:
            variants[-1].setdefault(run.evaluation["seed"], run.name)
    return variants


def choose_pair(
    ones: Sequence[Variant], others: Sequence[Variant], evaluations: Evaluations
) -> tuple[Variant, Variant]:
    """Return comparable variants if there are any, of these the most runs, then the first given."""

    def rank(pair: tuple[Variant, Variant]) -> tuple[bool, int]:
        names = (next(iter(variant.values())) for variant in pair)
        one, other = (EvaluatedRun(name, evaluations[name]).conditions for name in names)
        return one != other, -sum(map(len, pair))

    return min(product(ones, others), key=rank)


def find_other_conditions(reference: EvaluatedRun, run: EvaluatedRun) -> list[str]:
    """Return a sentence for everything but the questions that two runs differ in."""
    sentences = []
    for claim, describe in CONDITIONS.items():
        mark = '"' if claim == OTHER_PROMPTS else ""
        differing = contrast(describe(reference), describe(run), mark)
        if differing:
            sentences.append(f"{reference.name} and {run.name} {claim}: {differing}.")
    return sentences


def contrast(ones: Mapping[str, str], others: Mapping[str, str], mark: str = "") -> str:
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


def note_other_size(reference: EvaluatedRun, run: EvaluatedRun) -> list[str]:
    """Return a note where two runs answer with other numbers of adapter parameters."""
    if run.num_parameters == reference.num_parameters:
        return []
    return [
        f"{reference.name} answers with {reference.num_parameters:,} adapter parameters, "
        f"{run.name} with {run.num_parameters:,}."
    ]
