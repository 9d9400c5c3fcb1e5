"""What clients report of their evaluations during a run: the last figures, and in words.

Figures of several clients or adapters are put together only where they are of one round; the base
model's, which is asked in round 0, stand beside those of any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from fedlora_app.config.rounds import BASE
from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.chance import describe_chance, find_reported_chances
from fedlora_app.evaluation.gate_report import describe_gates
from fedlora_app.evaluation.names import (
    ACCURACY,
    ANSWERERS,
    EXACT_MATCH,
    PASS_HEADING,
    PASS_RATE,
    QUESTION_SETS,
    Measure,
    leading_measure,
    own_answerer,
)
from fedlora_app.foundation.percent import format_fraction, format_percent
from fedlora_app.foundation.progress import format_duration
from fedlora_app.foundation.terminal import render_table

EVALUATION_PREFIXES = (
    *(f"{answerer}/" for answerer in ("base", "global", "local", "global+local")),
    *("gate/", "validation/", "evaluation_", "peak_memory_bytes"),
)
COUNTS = {EXACT_MATCH.name: "n", ACCURACY.name: "n_ranked"}
"""What a history calls the number of answers by a measure."""
RANKED_CAPTION = (
    "* right answer ranked first (matches exactly), above it how often a guess is: most right "
    "answers are long or free, so that few can match whatever was learnt"
)

Reports = dict[str, dict[str, Any]]
"""Each client's metrics."""


def describe_round(
    server_round: int,
    num_rounds: int,
    reports: Reports,
    seconds: float,
    seconds_left: float | None = None,
    sample: int = 0,
) -> str:
    """Return the one line that a round leaves in the log; figures are means over all answers.

    Args:
        seconds_left: what the rounds that follow will take, as far as it is known.
        sample: at most so many questions of each set were asked; 0: all of them.
    """
    time_used = f"({format_duration(seconds)}"
    if sample and server_round < num_rounds:
        time_used = f"(of {sample} questions a set at most; {format_duration(seconds)}"
    if seconds_left:
        time_used += f", about {format_duration(seconds_left)} left"
    label = next(iter(_labels(reports)), None)
    if label is None:
        return f"round {server_round}/{num_rounds} not evaluated {time_used})"
    figures = _describe_figures(reports, label) or "no question sets"
    return f"round {server_round}/{num_rounds} [{label}] {figures} {time_used})"


def describe_headline(
    history: list[dict[str, Any]], evaluation: Mapping[str, Any] | None = None
) -> str:
    """Return the figures of clients' own answers on one line, "" where there are none.

    Args:
        evaluation: what ``fedlora evaluate`` wrote, if it did; else the run's last figures count.
    """
    if evaluation is not None:
        return _describe_evaluation(evaluation)
    reports = collect_reports(history)
    if not (labels := sort_labels(reports)):
        return ""
    missing = sorted(_collect_latest(history)[1].keys() - reports.keys())
    without = f" (without {', '.join(missing)})" if missing else ""
    return _describe_figures(reports, labels[-1]) + without


def _describe_evaluation(evaluation: Mapping[str, Any]) -> str:
    own, leading = own_answerer(evaluation["answering"]), evaluation["leading"]
    shares = {r["question_set"]: r for r in evaluation["shares"] if r["answered_by"] == own}
    parts = [
        f"{question_set.heading} {format_fraction(shares[name][leading[name]]['value'])}"
        for name, question_set in QUESTION_SETS.items()
        if name in shares and shares[name][leading[name]]["value"] is not None
    ]
    measure = "_exact_match" if leading.get(CONFLICT) == EXACT_MATCH.name else ""
    passed = evaluation["summary"].get(f"conflict_pass_rate{measure}") or {"value": None}
    if passed["value"] is not None:
        parts.append(f"{PASS_HEADING} {format_fraction(passed['value'])}")
    return ", ".join(parts)


def _describe_figures(reports: Reports, label: str) -> str:
    """Return the means of each question set, and the conflicts that all clients get right."""
    parts, chances = [], find_reported_chances(reports)
    for name, question_set in QUESTION_SETS.items():
        leads = find_reported_leading(reports, name)
        if len(figures := _means(reports, label, name, leads)) == len(_beside(leads)):
            by_chance = describe_chance(chances, name, end="; ")
            parts.append(f"{question_set.heading} {_join(figures, leads, by_chance)}")
    leads = find_reported_leading(reports, CONFLICT)
    passed = [list(judge_conflicts(reports, label, m).values()) for m in _beside(leads)]
    if passed[0]:
        counts = [f"{sum(found)}/{len(found)}" for found in passed]
        by_chance = describe_chance(chances, PASS_RATE, end="; ")
        parts.append(f"{PASS_HEADING} {_join(counts, leads, by_chance)}")
    return ", ".join(parts)


def describe_run(history: list[dict[str, Any]]) -> str:
    """Return the closing table by adapters and client, each one's last figures, and the gates."""
    last, latest = _collect_latest(history)
    shown_reports = {client: report for client, (_, report) in latest.items()}
    labels = sort_labels(shown_reports)
    if not labels:
        return "Nothing was evaluated (evaluation.interval: 0). To do it: fedlora evaluate RUN"
    shown = [
        name
        for name in QUESTION_SETS
        if any(_key(label, name) in r for label in labels for r in shown_reports.values())
    ]
    reports = collect_reports(history)
    leading = {name: find_reported_leading(reports, name) for name in (*shown, CONFLICT)}
    chances = find_reported_chances(reports)
    marks = {
        name: " *" + describe_chance(chances, name, lead="\n")
        for name, leads in leading.items()
        if leads is not EXACT_MATCH
    }
    headings = (f"{QUESTION_SETS[name].heading}{marks.get(name, '')}" for name in shown)
    title = "Greedy answers to held-out paraphrases that match exactly"
    table = Table("adapters", "client", *headings, title=title)
    if any(name in marks for name in shown):
        table.caption = RANKED_CAPTION
    for column in table.columns[2:]:
        column.justify = "right"
    for label in labels:
        for client, report in sorted(shown_reports.items()):
            cells = (_cell(report, label, name, leading[name]) for name in shown)
            if all(_key(label, name) not in report for name in shown):
                continue
            is_earlier = label != BASE and latest[client][0] < last
            who = f"{client}, round {latest[client][0]}" if is_earlier else client
            table.add_row(ANSWERERS[own_answerer(label)], who, *cells)
    lines = [render_table(table)]
    for label in labels:
        leads = leading[CONFLICT]
        passed, *exact = [judge_conflicts(reports, label, m).values() for m in _beside(leads)]
        if passed:
            how = "answered in its own way by every client"
            if exact:
                by_chance = describe_chance(chances, PASS_RATE, end="; ")
                how = "of which every client ranks its own answer first "
                how += f"({by_chance}{sum(exact[0])} exact)"
            who = ANSWERERS[own_answerer(label)]
            lines.append(f"{who}: {sum(passed)} of {len(passed)} conflict questions {how}")
    return "\n".join([*lines, *describe_left_out(history), *describe_gates(history)])


def split_evaluation(metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a reply tells of its evaluation, and of the training before it."""
    evaluation = {k: v for k, v in metrics.items() if k.startswith(EVALUATION_PREFIXES)}
    return evaluation, {k: v for k, v in metrics.items() if k not in evaluation}


def collect_reports(history: list[dict[str, Any]]) -> Reports:
    """Return the figures of the last round that was evaluated, and the base model's beside them.

    Of the clients that report of that round: another one's are of other adapters.
    """
    last, latest = _collect_latest(history)
    return {client: report for client, (number, report) in latest.items() if number == last}


def describe_left_out(history: list[dict[str, Any]]) -> Iterator[str]:
    """Yield which clients' last figures are of an earlier round than the others'."""
    last, latest = _collect_latest(history)
    for client, (number, _) in sorted(latest.items()):
        if number < last:
            yield (
                f"{client} reports last of round {number}, and is left out of what is said of all "
                f"clients in round {last}."
            )


def _collect_latest(
    history: list[dict[str, Any]],
) -> tuple[int, dict[str, tuple[int, dict[str, Any]]]]:
    """Return the last evaluated round, and each client's one with its and the base's figures."""
    latest: dict[str, tuple[int, dict[str, Any]]] = {}
    for entry in history:
        scores = {k: v for k, v in entry["metrics"].items() if k.count("/") == 2}
        if entry["phase"] == "evaluate" and scores:
            number, before = latest.get(entry["client"], (entry["round"], {}))
            if number != entry["round"]:
                before = {k: v for k, v in before.items() if k.startswith(f"{BASE}/")}
            latest[entry["client"]] = (entry["round"], before | scores)
    return max((number for number, _ in latest.values()), default=0), latest


def find_reported_leading(reports: Reports, question_set: str) -> Measure:
    """Return what a question set is judged by first; exact match in histories of old."""
    num_open = num_asked = 0
    for report in reports.values():
        name = next((k for k in report if k.endswith(f"/{question_set}/n_open")), None)
        if name is not None:
            num_open += report[name]
            num_asked += report.get(f"{name.removesuffix('n_open')}n", 0)
    return leading_measure(num_open, num_asked)


def judge_conflicts(
    reports: Reports, label: str, measure: Measure = EXACT_MATCH
) -> dict[int, bool]:
    """Return by conflict record whether every client gave its own answer.

    Questions that fewer than two clients have an answer for (-1 for the others) do not count; a
    client without any conflict question takes nothing from the others. Empty unless those that
    have some reported on the same records.
    """
    key = f"{label}/{CONFLICT}/{measure.reported_each}"
    columns = [report[key] for report in reports.values() if key in report]
    if len({len(column) for column in columns}) != 1:
        return {}
    rows = ([value for value in row if value >= 0] for row in zip(*columns, strict=True))
    return {record: all(row) for record, row in enumerate(rows) if len(row) > 1}


def sort_labels(reports: Reports) -> list[str]:
    """Return the adapters that there are results for, in the order of tables."""
    return sorted(_labels(reports), key=lambda label: list(ANSWERERS).index(own_answerer(label)))


def _labels(reports: Reports) -> dict[str, None]:
    """Return the adapters that there are results for, in their order of appearance."""
    names = (name for report in reports.values() for name in report)
    return dict.fromkeys(name.split("/")[0] for name in names if name.count("/") == 2)


def _key(label: str, question_set: str, measure: Measure = EXACT_MATCH) -> str:
    return f"{label}/{question_set}/{measure.reported}"


def _beside(leads: Measure) -> list[Measure]:
    """Return the measures to show: what leads, and exact match beside a ranking."""
    return list(dict.fromkeys((leads, EXACT_MATCH)))


def _means(reports: Reports, label: str, name: str, leads: Measure) -> list[str]:
    """Return a question set's means over all answers by each measure to show."""
    found = []
    for measure in _beside(leads):
        key, count = _key(label, name, measure), f"{label}/{name}/{COUNTS[measure.name]}"
        counted = [(r[key], r.get(count, 1)) for r in reports.values() if key in r]
        if total := sum(n for _, n in counted):
            mean = sum(value * n for value, n in counted) / total
            found.append(format_fraction(mean))
    return found


def _join(figures: Sequence[str], leads: Measure, by_chance: str) -> str:
    """Return "0.75", or "0.95 ranked first (chance 33 %; 0.00 exact)"."""
    if leads is EXACT_MATCH:
        return figures[0]
    return f"{figures[0]} ranked first ({by_chance}{figures[1]} exact)"


def _cell(report: Mapping[str, Any], label: str, name: str, leads: Measure) -> str:
    figures = [report.get(_key(label, name, measure)) for measure in _beside(leads)]
    first, *exact = (format_percent(figure, unit=" %") for figure in figures)
    return f"{first} ({exact[0]})" if exact and first else first
