"""An evaluation as text for the terminal: figures, swap table, scale, controls, membership."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedlora_app.config.combination import SCALE
from fedlora_app.evaluation.chance import Chances, describe_chance, read_chances
from fedlora_app.evaluation.gate_report import BLAMED, GatedSet, read_gated_sets
from fedlora_app.evaluation.membership import ATTACKS, FALSE_POSITIVE_RATES
from fedlora_app.evaluation.names import (
    ACCURACY,
    ANSWERERS,
    ASKED_SETS,
    EXACT_MATCH,
    FIGURES,
    KEYWORD,
    QUESTION_SETS,
    Measure,
    figure_key,
    relative_label,
    shown_measures,
)
from fedlora_app.evaluation.scores import mean
from fedlora_app.foundation.percent import format_n, format_percent
from fedlora_app.foundation.terminal import render_table

MAX_CLIENTS = 4  # more are shown as their mean; evaluation.json has them all
LEGEND = """\
Ranked first: the right answer is the most likely candidate (raw; per byte; relative to its
likelihood without the question, which says little where answers repeat the question's topic).
Chance: how often guessing ranks it first.
Leakage: global alone minus the base model. Specificity: own minus foreign local adapter."""

SEMANTIC_LEGEND = """\
Meant: of all candidates the greedy answer is nearest in meaning to the right one, as {} finds."""

MEMBERSHIP_LEGEND = """\
AUC 0.5 and half of the pairs won: whoever holds the global adapter tells a record that was
trained on from a held-out paraphrase (local_answers: the client's own answer from a wrong one)
no better than a coin does. The base model has seen neither side: where "base alone" is not at
0.5 the sides differ before any training, and that set says nothing about training alone."""

Row = dict[str, Any]


def describe_evaluation(evaluation: Row) -> str:
    """Return the tables of an evaluation, 100 columns wide and without colour."""
    title = (
        f"{evaluation['run']}, round {evaluation['round']}: {evaluation['mode']}, clients answer "
        f"with {evaluation['answering']}{_describe_combination(evaluation)}"
    )
    chances = read_chances(evaluation)
    figures = _figure_table(evaluation["summary"], "Local adapter as trained", chances)
    blocks = [title, render_table(figures)]
    chosen = {client: entry["chosen"] for client, entry in evaluation["scales"].items()}
    if chosen and set(chosen.values()) == {1.0}:
        blocks.append("The scale chosen on the validation questions is 1 for every client.")
    elif chosen:
        scales = ", ".join(f"{client} {scale:g}" for client, scale in chosen.items())
        heading = f"At the scale chosen on validation questions ({scales})"
        figures = _figure_table(evaluation["summary_chosen_scale"], heading, chances)
        blocks.append(render_table(figures))
    blocks.append(LEGEND)
    if model := evaluation.get("semantic_model"):
        blocks.append(SEMANTIC_LEGEND.format(model))
    blocks.append(render_table(_swap_table(evaluation["swap_table"], chances)))
    if gated := read_gated_sets(evaluation):
        blocks.append(render_table(_gate_table(list(gated.values()))))
    if evaluation["scales"]:
        blocks.append(render_table(_scale_table(evaluation["scales"])))
    if evaluation["controls"]:
        blocks.append(render_table(_control_table(evaluation["controls"], chances)))
    if evaluation["membership"]:
        blocks.append(describe_membership(evaluation["membership"]))
    lines = [f"Note: {note}" for note in evaluation["notes"]]
    if evaluation["warnings"]:
        lines.append(f"{len(evaluation['warnings'])} findings about the question sets:")
        lines += [f"  {warning}" for warning in evaluation["warnings"]]
    return "\n\n".join([*blocks, *(["\n".join(lines)] if lines else [])])


def _describe_combination(evaluation: Row) -> str:
    name = evaluation.get("combination", SCALE)
    return "" if name == SCALE else f" by {name}"


def _figure_table(summary: dict[str, Row], title: str, chances: Chances) -> Table:
    table = Table("", title=f"{title}: %, 95 % interval over facts")
    shown = shown_measures(with_variants=True)
    taken = [m for m in shown if any(_find(summary, figure, m) for figure in FIGURES)]
    measures = sorted(taken, key=lambda measure: measure.is_variant)
    for heading in (*(measure.label for measure in measures), "n/facts"):
        table.add_column(heading, justify="right")
        if heading == ACCURACY.label:
            table.add_column("chance", justify="right")
    for key, heading in FIGURES.items():
        found = [_find(summary, key, measure) for measure in measures]
        if not any(found):
            continue
        cells = []
        for measure, entry in zip(measures, found, strict=True):
            only_value = _percent(entry and entry["value"])
            cells.append(only_value if measure.is_variant else _interval(entry))
            cells += [_percent(chances.get(key))] * (measure is ACCURACY)
        table.add_row(heading, *cells, _count(next(entry for entry in found if entry)))
    rule, left = summary["keyword_pass_rate"], [""] * (len(measures) - 1 + (ACCURACY in measures))
    if rule["n"]:
        table.add_row(KEYWORD.label, _interval(rule), *left, _count(rule))
    if summary["keyword_ceiling"]["n"]:
        plain = summary["keyword_ceiling_plain"]
        table.add_row("  its ceiling on gold answers", _interval(summary["keyword_ceiling"]))
        table.add_row("  plain substring rule's ceiling", _interval(plain))
    return table


def _find(summary: dict[str, Row], figure: str, measure: Measure) -> Row | None:
    """Return a figure by a measure, if it could be taken."""
    entry = summary.get(figure_key(figure, measure))
    return entry if entry and entry["n"] else None


def _swap_table(rows: Iterable[Row], chances: Chances) -> Table:
    """Return question sets by adapters: ranked first / exact, in percent."""
    table = Table("questions of", "answered by", title=f"Swap table: {_pair_label()}, %")
    cells, clients = _gather([row for row in rows if row["scale"] == 1.0], ("adapters",))
    names = dict.fromkeys(name for _, _, name in cells)
    for name in names:
        heading = QUESTION_SETS[name].heading + describe_chance(chances, name, lead="\n")
        table.add_column(heading, justify="right")
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
    who = ANSWERERS[relative_label(row)]
    owner = row["adapters"].partition(":")[2]
    return who.replace("foreign", f"{owner}'s") if name_others else who


def _place(who: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Return where a choice of adapters stands in a table: the base first, foreign ones last."""
    order = list(ANSWERERS.values())[:4]
    return (order.index(who[-1]) if who[-1] in order else len(order), who)


def _gate_table(sets: Sequence[GatedSet]) -> Table:
    """Return what share of a set's questions the gates open for, and what errors are due to."""
    title = "Gate: % that it opens for, and what wrong answers are due to"
    clients = list(dict.fromkeys(client for gated in sets for client in gated.openness))
    shown = clients if len(clients) <= MAX_CLIENTS else [None]
    table = Table("questions", title=title)
    names = (client or f"{len(clients)} clients" for client in shown)
    for heading in (*names, "wrong", *(f"due to\n{part}" for part in BLAMED)):
        table.add_column(heading, justify="right")
    for gated in sets:
        shares = (_percent(gated.share_open(client)) for client in shown)
        counts = (gated.blamed.total(), *(gated.blamed[who] for who in BLAMED))
        table.add_row(gated.label, *shares, *map(str, counts))
    return table


def _scale_table(scales: dict[str, Row]) -> Table:
    measures = (ACCURACY, EXACT_MATCH)  # what a scale is chosen by
    labels = " / ".join(measure.label for measure in measures)
    title = f"Scale of the local adapter on validation questions: {labels}, %"
    table = Table("client, scale", title=title)
    points = [point for entry in scales.values() for point in entry["curve"]]
    names = [name for name in ASKED_SETS if any(name in point for point in points)]
    for name in names:
        table.add_column(QUESTION_SETS[name].heading, justify="right")
    shown = list(scales.items())[:MAX_CLIENTS]
    for client, entry in shown:
        for row in entry["curve"]:
            mark = "  <- chosen" if row["scale"] == entry["chosen"] else ""
            pairs = ((row.get(measure.extend(name)) for measure in measures) for name in names)
            cells = (" / ".join(map(_percent, pair)).strip(" /") for pair in pairs)
            table.add_row(f"{client}, {row['scale']:g}{mark}", *cells)
        table.add_section()
    if len(shown) < len(scales):
        table.caption = f"and {len(scales) - len(shown)} more clients in evaluation.json"
    return table


def _control_table(rows: Iterable[Row], chances: Chances) -> Table:
    title = f"Controls, other system prompts: {_pair_label()}, %"
    table = Table("questions of", "prompt", "answered by", title=title)
    cells, clients = _gather(rows, ("prompt", "adapters"))
    names = dict.fromkeys(name for _, _, name in cells)
    for name in names:
        heading = QUESTION_SETS[name].heading + describe_chance(chances, name, lead="\n")
        table.add_column(heading, justify="right")
    for client in clients:
        for who in dict.fromkeys(who for c, who, _ in cells if c == client):
            table.add_row(client, *who, *(_pair(cells.get((client, who, n))) for n in names))
        table.add_section()
    return table


def _pair_label() -> str:
    return " / ".join(measure.label for measure in shown_measures())


def _pair(rows: list[Row] | None) -> str:
    """Return the means of several rows by each measure that tables show."""
    if not rows:
        return ""
    means = (mean(row.get(measure.name) for row in rows) for measure in shown_measures())
    return " / ".join(map(_percent, means))


def _count(entry: Row) -> str:
    return format_n(entry["n"], entry.get("facts"))


def _interval(entry: Row | None) -> str:
    return _percent(entry["value"], entry["low"], entry["high"]) if entry else ""


def _percent(*estimate: float | None) -> str:
    return format_percent(*estimate).replace("100.0", "100")  # the tables are narrow


def describe_membership(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what the attacks achieve, and what 0.5 means."""
    table = Table(
        "client", "set", "attack", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.title = "Membership inference against the global adapter"
    for heading in ("AUC", "95 %", "pairs\nwon", "95 %", "TPR at\n1 % FPR", "at\n10 %", "pairs"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["client"],
            row["set"],
            ATTACKS[row["attack"]],
            _decimal(row["auc"]["value"]),
            _decimals(row["auc_by_fact"]),
            _decimal(row["pairs_won"]["value"]),
            _decimals(row["pairs_won"]),
            *(_decimal(row["tpr_at_fpr"][str(rate)]) for rate in FALSE_POSITIVE_RATES),
            str(row["n_members"]),
            end_section=row["attack"] == list(ATTACKS)[-1],
        )
    return "\n".join([render_table(table), *_note_pairs(rows), MEMBERSHIP_LEGEND])


def _note_pairs(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for row in rows:
        where = f"{row['client']}, {row['set']}"
        if row["attack"] != next(iter(ATTACKS)):
            continue
        if row["n_dropped"]:
            yield f"{where}: {row['n_dropped']} records have no partner left and were not used"
        if row["n_by_length"]:
            yield f"{where}: {row['n_by_length']} pairs are of different facts"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _decimals(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return ""
    return f"{estimate['low']:.2f}-{estimate['high']:.2f}"
