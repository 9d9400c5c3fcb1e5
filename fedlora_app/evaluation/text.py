"""An evaluation as text for the terminal: the figures, the swap table, the scale, the controls."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora_app.evaluation.membership import describe_membership

WIDTH = 100
MAX_CLIENTS = 4  # more are shown as their mean; evaluation.json has them all
SET_HEADINGS = {
    "universal": "universal",
    "universal_unseen": "never seen",
    "local": "local",
    "conflict": "conflict",
}
FIGURES = {
    "conflict_pass_rate": "conflict, every client right",
    "conflict_{}": "conflict, per client",
    "local_{}": "local",
    "universal_{}": "universal",
    "universal_unseen_{}": "universal, facts never seen",
    "leakage": "leakage, local",
    "leakage_conflict": "leakage, conflict",
    "specificity": "specificity, local",
    "specificity_conflict": "specificity, conflict",
}

LEGEND = """\
Ranked first: the right answer is the most likely candidate (raw; per byte; relative to its
likelihood without the question, which says little where answers repeat the question's topic).
Leakage: global alone minus the base model. Specificity: own minus foreign local adapter."""

Row = dict[str, Any]


def describe_evaluation(evaluation: Row) -> str:
    """Return the tables of an evaluation, 100 columns wide and without colour."""
    title = (
        f"{evaluation['run']}, round {evaluation['round']}: {evaluation['mode']}, clients answer "
        f"with {evaluation['answering']}"
    )
    blocks = [title, _render(_figure_table(evaluation["summary"], "Local adapter as trained"))]
    chosen = {client: entry["chosen"] for client, entry in evaluation["scales"].items()}
    if chosen and set(chosen.values()) == {1.0}:
        blocks.append("The scale chosen on the validation questions is 1 for every client.")
    elif chosen:
        scales = ", ".join(f"{client} {scale:g}" for client, scale in chosen.items())
        heading = f"At the scale chosen on validation questions ({scales})"
        blocks.append(_render(_figure_table(evaluation["summary_chosen_scale"], heading)))
    blocks.append(LEGEND)
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
    table = Table(title="Swap table: ranked first / greedy answer exact, %", title_justify="left")
    table.add_column("questions of")
    table.add_column("answered by")
    cells, clients = _gather([row for row in rows if row["scale"] == 1.0], ("adapters",))
    names = dict.fromkeys(name for _, _, name in cells)
    for name in names:
        table.add_column(SET_HEADINGS[name], justify="right")
    for client in clients:
        for who in sorted({who for c, who, _ in cells if c == client}, key=_place):
            pairs = (_pair(cells.get((client, who, name))) for name in names)
            table.add_row(client, who[0], *pairs)
        table.add_section()
    return table


def _gather(
    rows: Iterable[Row], keys: Sequence[str]
) -> tuple[dict[tuple[str, tuple[str, ...], str], list[Row]], list[str]]:
    """Return rows by client, by ``keys`` and by question set; many clients become one."""
    rows = list(rows)
    clients = list(dict.fromkeys(row["client"] for row in rows))
    are_many = len(clients) > MAX_CLIENTS
    cells: dict[tuple[str, tuple[str, ...], str], list[Row]] = {}
    for row in rows:
        labelled = row | {"adapters": _describe_adapters(row, name_others=not are_many)}
        client = f"mean of {len(clients)}" if are_many else row["client"]
        key = (client, tuple(labelled[key] for key in keys), row["question_set"])
        cells.setdefault(key, []).append(row)
    return cells, list(dict.fromkeys(client for client, _, _ in cells))


def _describe_adapters(row: Row, *, name_others: bool) -> str:
    """Return who answers as seen from the client that is asked."""
    adapters, _, owner = row["adapters"].partition(":")
    if not owner:
        return {"base": "base model", "global": "global alone"}[adapters]
    whose = f"{owner}'s" if name_others else "a foreign"
    whose = "own" if owner == row["client"] else whose
    return f"global + {whose} local" if adapters.startswith("global") else f"{whose} local alone"


def _place(who: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Return where a choice of adapters stands in a table: the base first, foreign ones last."""
    order = ("base model", "global alone", "own local alone", "global + own local")
    return (order.index(who[-1]) if who[-1] in order else len(order), who)


def _scale_table(scales: dict[str, Row]) -> Table:
    title = "Scale of the local adapter on validation questions: ranked first / exact, %"
    table = Table(title=title, title_justify="left")
    table.add_column("client, scale")
    names = [name for name in ("universal", "local", "conflict") if _has(scales, name)]
    for name in names:
        table.add_column(name, justify="right")
    shown = list(scales.items())[:MAX_CLIENTS]
    for client, entry in shown:
        for row in entry["curve"]:
            mark = "  <- chosen" if row["scale"] == entry["chosen"] else ""
            pairs = ((row.get(name), row.get(f"{name}_exact_match")) for name in names)
            cells = (" / ".join(map(_percent, pair)).strip(" /") for pair in pairs)
            table.add_row(f"{client}, {row['scale']:g}{mark}", *cells)
        table.add_section()
    if len(shown) < len(scales):
        table.caption = f"and {len(scales) - len(shown)} more clients in evaluation.json"
    return table


def _control_table(rows: Iterable[Row]) -> Table:
    title = "Controls, other system prompts: ranked first / greedy answer exact, %"
    table = Table(title=title, title_justify="left")
    cells, clients = _gather(rows, ("prompt", "adapters"))
    names = dict.fromkeys(name for _, _, name in cells)
    for heading in ("questions of", "prompt", "answered by"):
        table.add_column(heading)
    for name in names:
        table.add_column(SET_HEADINGS[name], justify="right")
    for client in clients:
        for who in dict.fromkeys(who for c, who, _ in cells if c == client):
            table.add_row(client, *who, *(_pair(cells.get((client, who, n))) for n in names))
        table.add_section()
    return table


def _has(scales: dict[str, Row], name: str) -> bool:
    return any(name in row for entry in scales.values() for row in entry["curve"])


def _pair(rows: list[Row] | None) -> str:
    """Return the means of several rows' ranking and exact match."""
    if not rows:
        return ""
    values = []
    for key in ("accuracy", "exact_match"):
        present = [row[key] for row in rows if row[key] is not None]
        values.append(_percent(fmean(present) if present else None))
    return " / ".join(values)


def _interval(entry: Row | None) -> str:
    if not entry or entry["value"] is None:
        return ""
    low, high = _percent(entry["low"]), _percent(entry["high"])
    return f"{_percent(entry['value'])} [{low}, {high}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}".replace("100.0", "100")


def _render(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()
