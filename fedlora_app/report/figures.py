"""The figures that a report opens with: who answers how much rightly, with intervals.

They come from ``evaluation.json`` where there is one, and else from what the run measured
itself after its last round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora_app.evaluation.intervals import NOTHING, Estimate, proportion
from fedlora_app.report.plots import ANSWERERS, QUESTION_SETS, relative_label
from fedlora_app.summary import Reports, collect_reports, conflict_passes

EXACT, RANKED = "exact_match", "ranked"
OF_THE_RUN = {"base": "base", "global": "global", "local": "local:own"}
OF_THE_RUN |= {"global+local": "global+local:own"}


@dataclass(frozen=True)
class Figures:
    """What one choice of adapters answers rightly, pooled over the clients.

    ``shares`` and ``passes`` hold estimates by measure (exact_match, ranked): shares by question
    set, passes for conflicts that every client answered in its own way.
    """

    who: str
    shares: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    passes: dict[str, Estimate] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Who answers, in words."""
        return ANSWERERS[self.who]

    def share(self, question_set: str, measure: str = EXACT) -> Estimate:
        """Return a question set's share of right answers, or nothing."""
        return self.shares.get(measure, {}).get(question_set, NOTHING)

    def passed(self, measure: str = EXACT) -> Estimate:
        """Return the share of conflicts that every client passed, or nothing."""
        return self.passes.get(measure, NOTHING)


def measure_run(
    history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None
) -> dict[str, Figures]:
    """Return the figures by who answers, in the order in which they are shown."""
    reports = collect_reports(list(history))
    found = {}
    for label, who in OF_THE_RUN.items():
        figures = _from_reports(who, label, reports)
        if any(figures.shares.values()):
            found[who] = figures
    if evaluation is not None:
        for who, rows in _group_rows(evaluation["swap_table"]).items():
            passes = found[who].passes if who in found else {}
            found[who] = Figures(who, _from_rows(rows), passes)
        own = f"{evaluation['answering']}:own" if "local" in evaluation["answering"] else "global"
        if own in found:
            found[own].passes.update(_passes_of(evaluation["summary"]))
    return {who: found[who] for who in ANSWERERS if who in found}


def own_answerer(answering: Iterable[str]) -> str:
    """Return who a client answers with, from the adapters active in its run's mode."""
    label = "+".join(answering)
    return f"{label}:own" if "local" in label else label


def _from_reports(who: str, label: str, reports: Reports) -> Figures:
    """Pool what the clients reported; their means become counts again."""
    shares: dict[str, dict[str, Estimate]] = {EXACT: {}, RANKED: {}}
    names = {EXACT: ("exact_match", "n"), RANKED: ("rank_accuracy", "n_ranked")}
    for measure, (metric, count) in names.items():
        for question_set in QUESTION_SETS:
            pairs = [
                (
                    report[f"{label}/{question_set}/{metric}"],
                    report[f"{label}/{question_set}/{count}"],
                )
                for report in reports.values()
                if f"{label}/{question_set}/{metric}" in report
            ]
            if pairs:
                shares[measure][question_set] = _pool(pairs)
    passes = {}
    for measure, metric in ((EXACT, "exact_match"), (RANKED, "ranked_first")):
        verdicts = conflict_passes(reports, label, metric)
        if verdicts:
            passes[measure] = proportion(verdicts)
    return Figures(who, shares, passes)


def _from_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    pairs: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for row in rows:
        for measure, value, n in (
            (EXACT, row["exact_match"], row["n_generated"]),
            (RANKED, row["accuracy"], row["n"]),
        ):
            if value is not None and n:
                pairs.setdefault((measure, row["question_set"]), []).append((value, n))
    shares: dict[str, dict[str, Estimate]] = {EXACT: {}, RANKED: {}}
    for (measure, question_set), found in pairs.items():
        shares[measure][question_set] = _pool(found)
    return shares


def _passes_of(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    names = {EXACT: "conflict_pass_rate_exact_match", RANKED: "conflict_pass_rate"}
    found = {measure: Estimate(**summary[name]) for measure, name in names.items()}
    return {measure: estimate for measure, estimate in found.items() if estimate.n}


def _group_rows(table: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        if row["scale"] == 1.0:
            rows.setdefault(relative_label(row), []).append(row)
    return rows


def _pool(pairs: Iterable[tuple[float, float]]) -> Estimate:
    """Return the interval of means over ``n`` questions each, taken together."""
    right = total = 0
    for mean, n in pairs:
        right, total = right + round(mean * n), total + int(n)
    return proportion([True] * right + [False] * (total - right))
