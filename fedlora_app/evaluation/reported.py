"""What clients report of their evaluations during a run: the last of each figure, and in words."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.names import (
    ANSWERERS,
    EXACT_MATCH,
    PASS_HEADING,
    QUESTION_SETS,
    Measure,
    own_answerer,
)
from fedlora_app.foundation.percent import format_percent
from fedlora_app.foundation.progress import format_duration
from fedlora_app.foundation.terminal import render_table

EVALUATION_PREFIXES = (
    *(f"{answerer}/" for answerer in ("base", "global", "local", "global+local")),
    *("evaluation_seconds", "peak_memory_bytes"),
)
Reports = dict[str, dict[str, Any]]
"""Each client's metrics."""


def describe_round(
    server_round: int,
    num_rounds: int,
    reports: Reports,
    seconds: float,
    seconds_left: float | None = None,
) -> str:
    """Return the one line that a round leaves in the log; figures are means over clients.

    Args:
        seconds_left: what the rounds that follow will take, as far as it is known.
    """
    time_used = f"({format_duration(seconds)}"
    if seconds_left:
        time_used += f", about {format_duration(seconds_left)} left"
    label = next(iter(_labels(reports)), None)
    if label is None:
        return f"round {server_round}/{num_rounds} not evaluated {time_used})"
    parts = []
    for name, question_set in QUESTION_SETS.items():
        values = [r[k] for r in reports.values() if (k := _key(label, name)) in r]
        if values:
            parts.append(f"{question_set.heading} {sum(values) / len(values):.2f}")
    passed = list(judge_conflicts(reports, label).values())
    if passed:
        parts.append(f"{PASS_HEADING} {sum(passed)}/{len(passed)}")
    figures = ", ".join(parts) or "no question sets"
    return f"round {server_round}/{num_rounds} [{label}] {figures} {time_used})"


def describe_run(history: list[dict[str, Any]]) -> str:
    """Return the closing table: exact match by adapters and client, the last of each."""
    reports = collect_reports(history)
    labels = sorted(_labels(reports), key=lambda label: list(ANSWERERS).index(own_answerer(label)))
    shown = [
        name
        for name in QUESTION_SETS
        if any(_key(label, name) in r for label in labels for r in reports.values())
    ]
    headings = ("adapters", "client", *(QUESTION_SETS[name].heading for name in shown))
    table = Table(*headings, title="Greedy answers to held-out paraphrases that match exactly")
    for column in table.columns[2:]:
        column.justify = "right"
    for label in labels:
        for client, report in sorted(reports.items()):
            cells = (format_percent(report.get(_key(label, name)), unit=" %") for name in shown)
            table.add_row(ANSWERERS[own_answerer(label)], client, *cells)
    lines = [render_table(table)]
    for label in labels:
        passed = list(judge_conflicts(reports, label).values())
        if passed:
            lines.append(
                f"{ANSWERERS[own_answerer(label)]}: {sum(passed)} of {len(passed)} conflict "
                "questions answered in its own way by every client"
            )
    return "\n".join(lines)


def split_evaluation(metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a reply tells of its evaluation, and of the training before it."""
    evaluation = {k: v for k, v in metrics.items() if k.startswith(EVALUATION_PREFIXES)}
    return evaluation, {k: v for k, v in metrics.items() if k not in evaluation}


def collect_reports(history: list[dict[str, Any]]) -> Reports:
    """Return each client's evaluation metrics, the last of each name."""
    reports: Reports = {}
    for entry in history:
        if entry["phase"] == "evaluate":
            scores = {k: v for k, v in entry["metrics"].items() if k.count("/") == 2}
            reports.setdefault(entry["client"], {}).update(scores)
    return reports


def judge_conflicts(
    reports: Reports, label: str, measure: Measure = EXACT_MATCH
) -> dict[int, bool]:
    """Return by conflict record whether every client gave its own answer.

    Questions that fewer than two clients have an answer for (-1 for the others) do not count.
    Empty unless all clients reported on the same records.
    """
    key = f"{label}/{CONFLICT}/{measure.reported_each}"
    columns = [report[key] for report in reports.values() if key in report]
    if not columns or len(columns) < len(reports) or len({len(c) for c in columns}) > 1:
        return {}
    rows = ([value for value in row if value >= 0] for row in zip(*columns, strict=True))
    return {record: all(row) for record, row in enumerate(rows) if len(row) > 1}


def _labels(reports: Reports) -> dict[str, None]:
    """Return the adapters that there are results for, in their order of appearance."""
    names = (name for report in reports.values() for name in report)
    return dict.fromkeys(name.split("/")[0] for name in names if name.count("/") == 2)


def _key(label: str, question_set: str) -> str:
    return f"{label}/{question_set}/{EXACT_MATCH.reported}"
