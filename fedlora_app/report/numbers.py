"""The figures that a report opens with: who answers how much rightly, with intervals.

They come from ``evaluation.json`` where there is one, and else from what the run measured
itself after its last round; beside the former only where that is of the same round and clients.

What an interval counts is facts, and a question that several clients or several foreign
adapters answer counts once; see ``evaluation.shares`` and ``evaluation.reported_shares``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora_app.config.rounds import BASE, BOTH, adapters_label
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.chance import Chances, find_reported_chances, read_chances
from fedlora_app.evaluation.evaluated_run import find_leading, read_conflicts
from fedlora_app.evaluation.names import (
    ACCURACY,
    ANSWERERS,
    EXACT_MATCH,
    MEASURES,
    PASS_RATE,
    QUESTION_SETS,
    figure_key,
    own_answerer,
)
from fedlora_app.evaluation.reported import (
    Reports,
    collect_reports,
    find_reported_leading,
    judge_conflicts,
)
from fedlora_app.evaluation.reported_shares import (
    estimate_passes,
    read_conflict_facts,
    read_reported_shares,
)
from fedlora_app.evaluation.shares import read_chosen_shares, read_shares, read_summary
from fedlora_app.evaluation.statistics import NOTHING, Estimate

EXACT, RANKED = EXACT_MATCH.name, ACCURACY.name
KEYWORD, KEYWORD_CEILING = "keyword_pass_rate", "keyword_ceiling"
CHOSEN = ":chosen"
LABELS = {
    key: text
    for who, label in ANSWERERS.items()
    for key, text in ((who, label), (who + CHOSEN, f"{label}, chosen scale"))
    if key == who or who.endswith(":own")
}
PASS_KEYS = {name: figure_key(PASS_RATE, MEASURES[name]) for name in (EXACT, RANKED)}


@dataclass(frozen=True)
class Figures:
    """What one choice of adapters answers rightly, over all clients.

    ``shares`` and ``passes`` hold estimates by measure (exact_match, accuracy): shares by question
    set, passes for conflicts that every client answered in its own way. Where no conflict has a
    whole answer, ``passes`` holds keyword_pass_rate and keyword_ceiling, of all questions with
    keywords.
    """

    who: str
    shares: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    passes: dict[str, Estimate] = field(default_factory=dict)
    verdicts: dict[int, bool] = field(default_factory=dict)
    """By conflict record: every client gave its own answer, by the measure that leads."""
    facts: dict[int, Hashable] = field(default_factory=dict)
    """By conflict record: what its paraphrases share, where that is known."""
    leading: dict[str, str] = field(default_factory=dict)
    """By question set: the measure that it is judged by first; exact match by default."""
    chances: Chances = field(default_factory=dict)
    """How often a guess ranks the right answer first."""

    @property
    def label(self) -> str:
        """Who answers, in words."""
        return LABELS[self.who]

    def leads(self, question_set: str = CONFLICT) -> str:
        """Return the measure that a question set is judged by first."""
        return self.leading.get(question_set, EXACT)

    def share(self, question_set: str, measure: str | None = None) -> Estimate:
        """Return a question set's share of right answers, by what leads; or nothing."""
        measure = measure or self.leads(question_set)
        return self.shares.get(measure, {}).get(question_set, NOTHING)

    def passed(self, measure: str | None = None) -> Estimate:
        """Return the share of conflicts that every client passed, by what leads; or nothing."""
        return self.passes.get(measure or self.leads(), NOTHING)


def measure_run(
    history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None
) -> dict[str, Figures]:
    """Return the figures by who answers, in the order in which they are shown."""
    if evaluation is not None:
        history = [entry for entry in history if entry["round"] in (0, evaluation["round"])]
    reports = collect_reports(list(history))
    found = {}
    for label in (BASE, GLOBAL, LOCAL, adapters_label(BOTH)):
        who = own_answerer(label)
        figures = _from_reports(who, label, reports)
        if any(figures.shares.values()):
            found[who] = figures
    chances = find_reported_chances(reports)
    if evaluation is not None:
        if reports.keys() != evaluation["files"].keys():  # these are of some clients only
            found = {}
        _add_evaluation(found, evaluation)
        chances |= read_chances(evaluation)
    return {who: replace(found[who], chances=chances) for who in LABELS if who in found}


def _add_evaluation(found: dict[str, Figures], evaluation: Mapping[str, Any]) -> None:
    """Put what ``evaluation.json`` holds in the place of what the run measured itself."""
    leading = {name: find_leading(evaluation, name).name for name in QUESTION_SETS}
    for who, shares in read_shares(evaluation).items():
        found[who] = replace(found.get(who, Figures(who)), shares=shares, leading=leading)
    own = own_answerer(evaluation["answering"])
    verdicts, facts = read_conflicts(evaluation)
    passes = _passes_of(read_summary(evaluation)) or _keywords_of(evaluation)
    figures = found.get(own, Figures(own))
    passes = passes or figures.passes
    found[own] = replace(figures, passes=passes, verdicts=verdicts, facts=facts, leading=leading)
    if any(entry["chosen"] != 1.0 for entry in evaluation["scales"].values()):
        shares = read_chosen_shares(evaluation)
        passes = _passes_of(read_summary(evaluation, "summary_chosen_scale"))
        found[own + CHOSEN] = Figures(own + CHOSEN, shares, passes, leading=leading)


def _from_reports(who: str, label: str, reports: Reports) -> Figures:
    leading = {name: find_reported_leading(reports, name).name for name in QUESTION_SETS}
    passes = {
        measure.name: passed
        for measure in (EXACT_MATCH, ACCURACY)
        if (passed := estimate_passes(reports, label, measure)).n
    }
    verdicts = judge_conflicts(reports, label, MEASURES[leading[CONFLICT]])
    facts = read_conflict_facts(reports, verdicts)
    shares = read_reported_shares(reports, label)
    return Figures(who, shares, passes, verdicts, facts, leading)


def _passes_of(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    found = {measure: Estimate(**summary[name]) for measure, name in PASS_KEYS.items()}
    return {measure: e for measure, e in found.items() if e.n and e.value is not None}


def _keywords_of(evaluation: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the keyword rule's figures if conflict questions were judged by it."""
    rows = (row for row in evaluation["swap_table"] if row["question_set"] == CONFLICT)
    if not any(row.get("n_keyword") for row in rows):
        return {}
    return {key: Estimate(**evaluation["summary"][key]) for key in (KEYWORD, KEYWORD_CEILING)}
