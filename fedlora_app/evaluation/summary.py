"""The figures of a round over all clients: rates, leakage, specificity, the keyword rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.linter import keyword_ceiling
from fedlora_app.data.questions import (
    CONFLICT,
    LOCAL_SET,
    UNIVERSAL,
    UNIVERSAL_UNSEEN,
    Question,
    cluster_of,
)
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.choices import Cell, SavedRound
from fedlora_app.evaluation.evaluated_run import question_id
from fedlora_app.evaluation.names import (
    ASKED_SETS,
    KEYWORD,
    LEAKAGE,
    OWN_SETS,
    PASS_RATE,
    QUESTION_SETS,
    SPECIFICITY,
    Measure,
    figure_key,
    shown_measures,
)
from fedlora_app.evaluation.scores import Score
from fedlora_app.evaluation.statistics import NOTHING, Estimate, paired_difference, proportion

Scores = dict[Cell, list[Score]]
Pairs = list[tuple[Question, Score]]
Conflict = dict[str, tuple[Question, Score]]
"""By client: its question of a conflict record, and how that went."""


@dataclass(frozen=True)
class Results:
    """Scores of a round's test questions, each client's local adapter at its scale."""

    saved: SavedRound
    scores: Scores
    scales: Mapping[str, float]

    @property
    def clients(self) -> list[str]:
        """The clients, in order."""
        return self.saved.clients

    def find(self, client: str, name: str, answering: Answering) -> Pairs:
        """Return a set's questions under a choice of adapters and the client's own prompt."""
        wanted = UNIVERSAL if name == UNIVERSAL_UNSEEN else name
        for cell, results in self.scores.items():
            key = (cell.client, cell.question_set, cell.answering, cell.prompt_kind)
            if key == (client, wanted, answering, "own"):
                pairs = zip(cell.questions, results, strict=True)
                return [p for p in pairs if name != UNIVERSAL_UNSEEN or p[0].is_unseen]
        return []

    def own(self, client: str, name: str) -> Pairs:
        """Return a set's questions under the client's own adapters."""
        return self.find(client, name, self.saved.own(client, self.scales.get(client, 1.0)))

    def foreign(self, client: str) -> list[Answering]:
        """Return the client's adapters with others' local ones in its own one's place, if asked."""
        asked = {cell.answering for cell in self.scores if cell.client == client}
        foreign = self.saved.foreign(client, self.scales.get(client, 1.0))
        return [answering for answering in foreign if answering in asked]

    @cached_property
    def conflicts(self) -> dict[int, Conflict]:
        """The conflict records that two clients or more answer."""
        found: dict[int, Conflict] = {}
        for client in self.clients:
            for question, score in self.own(client, CONFLICT):
                if question.answer is not None:  # else keywords only: nothing to rank or match
                    found.setdefault(question.record, {})[client] = (question, score)
        return {record: c for record, c in sorted(found.items()) if len(c) > 1}

    def estimate(self, name: str, measure: Measure) -> Estimate:
        """Return a measure's mean over all clients' questions of a set."""
        return average(((name, client, self.own(client, name)) for client in self.clients), measure)

    def leakage(self, name: str, measure: Measure) -> Estimate:
        """Return how much more global alone is right than the base, on what is a client's own."""
        if GLOBAL not in self.saved.trained:
            return NOTHING
        return compute_difference(
            (
                (c, self.find(c, name, self.saved.alone(c)), [self.find(c, name, Answering())])
                for c in self.clients
            ),
            name,
            measure,
        )

    def specificity(self, name: str, measure: Measure) -> Estimate:
        """Return how much more a client's own local adapter is right than the others' ones."""
        return compute_difference(
            (
                (client, self.own(client, name), [self.find(client, name, f) for f in foreign])
                for client in self.clients
                if (foreign := self.foreign(client))
            ),
            name,
            measure,
        )


def summarise_scores(results: Results) -> dict[str, dict[str, Any]]:
    """Return the figures over all clients, each under its own adapters at its scale."""
    summary: dict[str, Estimate] = {}
    for measure in shown_measures(with_variants=True):
        if measure.passes_above is not None:
            summary[measure.extend(PASS_RATE)] = _pass_rate(results, measure)
        for name in sorted(QUESTION_SETS):
            summary[figure_key(name, measure)] = results.estimate(name, measure)
    for measure in shown_measures():
        for name in OWN_SETS:
            ending = "" if name == LOCAL_SET else f"_{name}"
            summary[measure.extend(LEAKAGE + ending)] = results.leakage(name, measure)
            summary[measure.extend(SPECIFICITY + ending)] = results.specificity(name, measure)
    summary |= _keyword_figures(results)
    return {name: estimate.dump() for name, estimate in summary.items()}


def every_client_passes(conflict: Conflict, measure: Measure) -> bool | None:
    """Return whether every client's own answer passes; None where one could not be scored."""
    values = [score.outcome(measure) for _, score in conflict.values()]
    return None if None in values else all(values)


def average(scored: Iterable[tuple[str, str, Pairs]], measure: Measure) -> Estimate:
    """Return a measure's mean over all questions that it could be taken of.

    Args:
        scored: question set, client, and how its questions went.
    """
    rows = [
        (outcome, question.cluster, question_id(name, client, question.record))
        for name, client, pairs in scored
        for question, score in pairs
        if (outcome := score.outcome(measure)) is not None
    ]
    if not rows:
        return NOTHING
    outcomes, facts, questions = zip(*rows, strict=True)
    if measure.passes_above is None and not all(0 <= outcome <= 1 for outcome in outcomes):
        return paired_difference(outcomes, [0.0] * len(outcomes), facts, questions)
    return proportion(outcomes, facts, questions)


def compute_difference(
    compared: Iterable[tuple[str, Pairs, list[Pairs]]], name: str, measure: Measure
) -> Estimate:
    """Return the paired difference of a set of questions against the mean of several others.

    Args:
        compared: client, how its questions went, and how they went with each rival.
        name: the question set.
    """
    ones, others, facts, questions = [], [], [], []
    for client, own, rivals in compared:
        for index, (question, score) in enumerate(own):
            value = score.outcome(measure)
            rival_values = [rival[index][1].outcome(measure) for rival in rivals]
            if value is None or None in rival_values:
                continue
            ones.append(value)
            others.append(fmean(rival_values))
            facts.append(question.cluster)
            questions.append(question_id(name, client, question.record))
    return paired_difference(ones, others, facts, questions)


def _pass_rate(results: Results, measure: Measure) -> Estimate:
    """Return the share of conflict records that every client answers in its own way."""
    judged = [
        (passed, next(iter(conflict.values()))[0].cluster)
        for conflict in results.conflicts.values()
        if (passed := every_client_passes(conflict, measure)) is not None
    ]
    return proportion([passed for passed, _ in judged], [fact for _, fact in judged])


def _keyword_figures(results: Results) -> dict[str, Estimate]:
    """Return the keyword rule's pass rate beside its ceiling on the gold answers."""
    asked = (
        (name, client, results.own(client, name))
        for client in results.clients
        for name in ASKED_SETS
    )
    figures = {"keyword_pass_rate": average(asked, KEYWORD)}
    for name, plain in (("keyword_ceiling", False), ("keyword_ceiling_plain", True)):
        passed, facts, questions = [], [], []
        seen = set()
        for client, files in results.saved.files.items():
            for kind, file in files.tests.items():
                owner = None if kind == CONFLICT else client
                if (file.path, owner) in seen:
                    continue
                seen.add((file.path, owner))
                for position, record in enumerate(file.records):
                    right, total = keyword_ceiling([record], owner, plain=plain)
                    passed += [True] * right + [False] * (total - right)
                    facts += [cluster_of(record)] * total
                    questions += [(file.path, position)] * total
        figures[name] = proportion(passed, facts, questions)
    return figures
