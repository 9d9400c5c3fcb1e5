"""An evaluation as text for the terminal: the figures, the swap table, the scale, the controls."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora_app.evaluation.membership import describe_membership

WIDTH = 100
FIGURES = {
    "conflict_pass_rate": "conflict, every client right",
    "conflict_{}": "conflict, per client",
    "local_{}": "local",
    "universal_{}": "universal",
    "universal_unseen_{}": "universal, facts never seen",
    "leakage": "leakage, local (global - base)",
    "leakage_conflict": "leakage, conflict",
    "specificity": "specificity, local (own - foreign)",
    "specificity_conflict": "specificity, conflict",
}

Row = dict[str, Any]


def describe_evaluation(evaluation: Row) -> str:
    """Return the tables of an evaluation, 100 columns wide and without colour."""
    title = (
        f"{evaluation['run']}, round {evaluation['round']}: {evaluation['mode']}, clients answer "
        f"with {evaluation['answering']}"
    )
    blocks = [title, _render(_figure_table(evaluation["summary"], "Local adapter as trained"))]
    if evaluation["summary_chosen_scale"]:
        scales = ", ".join(f"{c} {e['chosen']:g}" for c, e in evaluation["scales"].items())
        heading = f"Local adapter at the scale chosen on validation questions ({scales})"
        blocks.append(_render(_figure_table(evaluation["summary_chosen_scale"], heading)))
    blocks.append(_render(_swap_table(evaluation["swap_table"])))
    if evaluation["scales"]:
        blocks.append(_render(_scale_table(evaluation["scales"])))
    if evaluation["controls"]:
        blocks.append(_render(_control_table(evaluation["controls"])))
    if evaluation["membership"]:
        blocks.append(describe_membership(evaluation["membership"]))
    lines = [f"Note: {note}" for note in evaluation["notes"]]
    if evaluation["warnings"]:
        lines.append(f"{len(evaluation['warnings'])} findings about the question sets:")
        lines += [f"  {warning}" for warning in evaluation["warnings"]]
    return "\n\n".join([*blocks, *(["\n".join(lines)] if lines else [])])


def _figure_table(summary: dict[str, Row], title: str) -> Table:
    table = Table(title=f"{title}: %, 95 % interval, n", title_justify="left")
    for heading in ("", "ranked first", "greedy answer exact", "per byte", "PMI", "n"):
        table.add_column(heading, justify="left" if not heading else "right")
    for key, heading in FIGURES.items():
        names = _figure_names(key)
        found = [summary.get(name) for name in names]
        if not any(entry and entry["n"] for entry in found):
            continue
        first = next(entry for entry in found if entry and entry["n"])
        short = [_percent(entry and entry["value"]) for entry in found[2:]]
        table.add_row(heading, *map(_interval, found[:2]), *short, str(first["n"]))
    rule = summary["keyword_pass_rate"]
    if rule["n"]:
        table.add_row("keyword rule", _interval(rule), "", "", "", str(rule["n"]))
    ceiling, plain = summary["keyword_ceiling"], summary["keyword_ceiling_plain"]
    if ceiling["n"]:
        table.add_row("  its ceiling on gold answers", _interval(ceiling), n := "", n, n)
        table.add_row("  plain substring rule's ceiling", _interval(plain), n, n, n)
    return table


def _figure_names(key: str) -> list[str]:
    """Return a figure's names by ranking, exact match, per byte and PMI."""
    if "{}" in key:
        suffixes = ("accuracy", "exact_match", "accuracy_per_byte", "accuracy_pmi")
        return [key.format(suffix) for suffix in suffixes]
    return [key, f"{key}_exact_match", f"{key}_per_byte", f"{key}_pmi"]


def _swap_table(rows: Iterable[Row]) -> Table:
    """Return question sets by adapters: ranked first / exact, in percent."""
    rows = [row for row in rows if row["scale"] == 1.0]
    choices = dict.fromkeys(row["adapters"] for row in rows)
    table = Table(title="Swap table: ranked first / greedy answer exact, %", title_justify="left")
    table.add_column("questions of")
    sets = dict.fromkeys((row["client"], row["question_set"], row["n_generated"]) for row in rows)
    found = {(row["client"], row["question_set"], row["adapters"]): row for row in rows}
    names = dict.fromkeys(name for _, name, _ in sets)
    for name in names:
        table.add_column(name, justify="right")
    for client in dict.fromkeys(client for client, _, _ in sets):
        for choice in choices:
            cells = [_pair(found.get((client, name, choice))) for name in names]
            if any(cells):
                table.add_row(f"{client}: {choice}", *cells)
        table.add_section()
    return table


def _scale_table(scales: dict[str, Row]) -> Table:
    title = "Scale of the local adapter on validation questions: ranked first / exact, %"
    table = Table(title=title, title_justify="left")
    table.add_column("client, scale")
    names = [name for name in ("universal", "local", "conflict") if _has(scales, name)]
    for name in names:
        table.add_column(name, justify="right")
    for client, entry in scales.items():
        for row in entry["curve"]:
            mark = "  <- chosen" if row["scale"] == entry["chosen"] else ""
            cells = [f"{_percent(row[n])} / {_percent(row[f'{n}_exact_match'])}" for n in names]
            table.add_row(f"{client}, {row['scale']:g}{mark}", *cells)
        table.add_section()
    return table


def _control_table(rows: Iterable[Row]) -> Table:
    table = Table(title="Controls: other system prompts", title_justify="left")
    for heading in ("client", "prompt", "adapters", "questions", "ranked first / exact, %", "n"):
        table.add_column(heading, justify="right" if heading[0] in "rn" else "left")
    for row in rows:
        cells = [row[key] for key in ("client", "prompt", "adapters", "question_set")]
        table.add_row(*cells, _pair(row), str(row["n_generated"]))
    return table


def _has(scales: dict[str, Row], name: str) -> bool:
    return any(name in row for entry in scales.values() for row in entry["curve"])


def _pair(row: Row | None) -> str:
    return "" if row is None else f"{_percent(row['accuracy'])} / {_percent(row['exact_match'])}"


def _interval(entry: Row | None) -> str:
    if not entry or entry["value"] is None:
        return ""
    low, high = _percent(entry["low"]), _percent(entry["high"])
    return f"{_percent(entry['value'])} [{low}, {high}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()
