"""The section on the gate: how well it separates, what it opens for, what errors are due to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora_app.data.questions import CONFLICT, UNIVERSAL
from fedlora_app.evaluation.gate_report import (
    BLAMED,
    SEPARATION,
    Figures,
    GatedSet,
    collect_gates,
    is_bad,
    read_gated_sets,
    warn_of_gates,
)
from fedlora_app.foundation.percent import format_percent
from fedlora_app.report import plots
from fedlora_app.report.parts import SHAPE_ERRORS, Plotter, Section, Table
from fedlora_app.report.questions import list_wrong
from fedlora_app.runs.partial import PartialRun

PURPOSE = (
    "The gate decides for every question whether the local adapter answers beside the global one. "
    "It should open for local and conflict questions, and stay closed for universal ones."
)
SEPARATES = (
    "How each client's gate separates its own training questions, cross-validated. One that "
    "compares facts is tried on held-out wordings, and for unknown questions on wordings whose "
    "fact was taken away; one that compares kinds on held-out facts. Where few of the facts "
    "nearest to each fact are of its kind, local and universal questions look alike"
)
DUE = (
    "What wrong answers are due to, all clients. To the gate: a local or conflict question that it "
    "stayed closed for, or a universal one that it opened for while the global adapter alone is "
    "right"
)
NO_GATE = "no gate"


def show_gate(run: PartialRun, plotter: Plotter) -> Section | None:
    """Return the section on the gate; None for a run that has none."""
    gates = collect_gates(run.result_history)
    sets = {} if run.evaluation is None else read_gated_sets(run.evaluation)
    if not gates and not sets:
        return None
    section = Section("gate", "Gate", [PURPOSE])
    if warning := warn_of_gates(gates):
        section.text.append(warning)
    if gates:
        section.tables.append(_list_separation(run, gates))
    if run.evaluation is None:
        section.text.append(
            "How far it opened for each question, and which part every wrong answer is due to, "
            f"stands here after: fedlora evaluate {run.reference}"
        )
        return section
    section.plots.append(plotter.draw("gate", lambda: plots.plot_gate(run.evaluation)))
    if sets:
        section.tables.append(_list_blame(sets))
    section.questions, num_wrong = list_wrong(run.evaluation, UNIVERSAL)
    if num_wrong:
        num_shown = sum(len(question["answers"]) for question in section.questions)
        cut = "" if num_shown == num_wrong else f" {num_shown} fit; evaluation.json has all."
        section.text.append(
            f"Below stand the {num_wrong} wrong answers to universal questions, those that a gate "
            f"is to blame for first.{cut}"
            + " Those to conflict questions stand further down."
            * (CONFLICT in sets)
        )
    return section


def point_to_gate(run: PartialRun) -> Iterator[str]:
    """Yield what the head of a page says of gates that separate badly."""
    try:
        warning = warn_of_gates(collect_gates(run.result_history))
    except SHAPE_ERRORS:
        return  # the section says it
    if warning:
        yield f"{warning.partition('. ')[0]}. The section Gate says what to do."


def _list_separation(run: PartialRun, gates: Mapping[str, Figures]) -> Table:
    clients = dict.fromkeys([*(str(client["id"]) for client in run.clients), *gates])
    rows = [_describe(client, gates.get(client)) for client in sorted(clients)]
    headings = ("client", "compares", "nearest facts of its kind", *SEPARATION.values())
    caption = SEPARATES
    if len(gates) < len(rows):
        caption += f". {NO_GATE.capitalize()}: it trained on one kind of question alone, "
        caption += "or has not told of one"
    return Table(headings, rows, caption)


def _describe(client: str, figures: Figures | None) -> tuple[Any, ...]:
    if figures is None:
        return (client, NO_GATE, "", *[""] * len(SEPARATION))
    shares = [
        _percent(share := figures.get(name)) + " (low)" * is_bad(share) for name in SEPARATION
    ]
    compared = "facts" if figures["by_fact"] else "kinds"
    return (client, compared, _percent(figures["purity"]), *shares)


def _list_blame(sets: Mapping[str, GatedSet]) -> Table:
    rows = [
        (
            gated.label,
            len(gated.values),
            _percent(gated.share_open()),
            gated.blamed.total(),
            *(gated.blamed[who] for who in BLAMED),
        )
        for gated in sets.values()
    ]
    due = (f"due to {part}" for part in BLAMED.values())
    headings = ("questions", "answers", "gate open", "wrong", *due)
    return Table(headings, rows, DUE)


def _percent(share: float | None) -> str:
    return format_percent(share, digits=None, unit=" %")
