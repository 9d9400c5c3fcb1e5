"""The section on what a server can tell from the updates that it has kept. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedlora_app.attacks.results import (
    ALL_ROUNDS,
    FACTS,
    FORMAT,
    HEADLINES,
    RECORD_ATTACKS,
    SETS,
    SOURCES,
    TEXT_SOURCES,
    TOKEN_ATTACKS,
    UPDATE,
    WHOSE,
    choose_headline,
    describe_limit,
    group,
    show_auc,
)
from fedlora_app.foundation.percent import format_percent
from fedlora_app.report.drawing import (
    INK,
    SERIES,
    SIZE,
    Drawing,
    NothingToPlotError,
    styled,
)
from fedlora_app.report.parts import Plotter, Section, Table
from fedlora_app.runs.partial import PartialRun
from fedlora_app.runs.paths import RunPaths
from fedlora_app.runs.reading import read_object

PURPOSE = (
    "What whoever runs the server can tell of one client from what it sent; beside it, as a "
    "control, from what the other clients sent, and from the average, which all clients get. 50 % "
    "is chance. Facts are told from those that the others sent, so that their updates lie below."
)
MOST_CLIENTS = 8  # with a row of panels each


def show_attack(run: PartialRun, plotter: Plotter) -> Section | None:
    """Return the section; None where the run's updates were not attacked.

    Raises:
        RunDirectoryError: ``attack.json`` cannot be read.
    """
    path = RunPaths(run.path).attack
    keeps = (run.config.get("federated") or {}).get("keep_uploads")
    if not path.exists():
        if not keeps:
            return None
        text = f"What the updates give away stands here after: fedlora attack {run.reference}"
        return Section("attack", "What an update gives away", [text])
    found = read_object(path)
    if found.get("format") != FORMAT:
        text = (
            f"attack.json has another format. Write it again with: fedlora attack {run.reference}"
        )
        return Section("attack", "What an update gives away", [text])
    section = Section("attack", "What an update gives away", [PURPOSE])
    if limit := describe_limit(found):
        section.text.append(limit)
    section.plots.append(plotter.draw("attack", lambda: plot_attack(found)))
    section.tables.append(_list_records(found["records"]))
    section.tables.append(_list_texts(found["texts"]))
    section.tables.append(_list_tokens(found["tokens"]))
    if found.get("canaries"):
        section.tables.append(_list_canaries(found["canaries"]))
    else:
        section.text.append("No canaries were planted (fedlora check CONFIG --plant N).")
    section.text += [f"Assumed: {text}" for text in found["assumptions"]]
    section.text += [f"Not tried: {text}" for text in found["not_tried"]]
    return section


@styled
def plot_attack(found: Mapping[str, Any]) -> Figure:
    """Draw how well each set's chosen attack tells it apart, by source, with intervals.

    Args:
        found: what ``attack.json`` holds.
    """
    panels = {
        name: [
            (client, best)
            for (client,), rows in group(those, "client").items()
            if (best := choose_headline(rows, HEADLINES[name]))
        ]
        for (name,), those in group(found["records"], "set").items()
    }
    panels = {name: panels[name] for name in SETS if panels.get(name)}
    if not panels:
        raise NothingToPlotError("attack.json has no set of which both sides have records.")
    clients = max(len(entries) for entries in panels.values())
    height = 0.6 + len(panels) * (0.45 + 0.2 * min(clients, MOST_CLIENTS))
    figure = Drawing(figsize=(SIZE[0], height), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, entries) in zip(all_axes, panels.items(), strict=True):
        _draw_set(axes, name, entries[:MOST_CLIENTS])
    all_axes[-1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    all_axes[-1].set_xlabel("AUC of the attack chosen for each; dotted: chance")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _draw_set(axes: Any, name: str, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    for shift, (source, label) in zip((-0.25, 0.0, 0.25), SOURCES.items(), strict=True):
        places, values, below, above = [], [], [], []
        for place, (_, best) in enumerate(entries):
            auc = best[source]["auc"] if source in best else {"value": None}
            if auc["value"] is None:
                continue
            places.append(place + shift)
            values.append(auc["value"])
            below.append(auc["value"] - auc["low"])
            above.append(auc["high"] - auc["value"])
        colour = SERIES[list(SOURCES).index(source)]
        errors = [below, above]
        axes.errorbar(values, places, xerr=errors, fmt="o", color=colour, label=label, elinewidth=1)
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.02)
    axes.set_yticks(range(len(entries)), [client for client, _ in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    trained = next(iter(entries[0][1].values()))["was_trained"]
    title = SETS[name] + ("" if trained else ": never in an update")
    axes.set_title(title, fontsize=8.5, fontweight="normal")


def _list_records(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return all attacks, over all rounds and in each."""
    headings = ("client", "what", "attack", "rounds", *SOURCES.values(), "members", "others")
    lines = [
        (
            client,
            SETS[name] + ("" if those[0]["was_trained"] else " (never in an update)"),
            RECORD_ATTACKS[attack],
            str(rounds),
            *(show_auc(_of(those, source)) for source in SOURCES),
            those[0]["n_members"],
            those[0]["n_nonmembers"],
        )
        for (client, name, attack, rounds), those in group(
            _newest(rows), "client", "set", "attack", "rounds"
        ).items()
    ]
    title = (
        "Told apart, AUC in % with 95 % intervals by fact: training records from held-out ones of "
        f"the same facts, {SETS[FACTS]} from those of others, local answers from wrong ones"
    )
    return Table(headings, lines, title)


def _list_texts(rows: Sequence[Mapping[str, Any]]) -> Table:
    headings = ("client", "round", "whose answers", "asked", *TEXT_SOURCES.values(), "n")
    lines = [
        (
            client,
            str(rounds),
            WHOSE[whose],
            prompt,
            *(_share(_of(those, source)) for source in TEXT_SOURCES),
            those[0]["n"],
        )
        for (client, rounds, whose, prompt), those in group(
            rows, "client", "rounds", "whose", "prompt"
        ).items()
    ]
    return Table(headings, lines, "Answers given back word by word, in %")


def _list_tokens(rows: Sequence[Mapping[str, Any]]) -> Table:
    headings = ("client", "attack", "beside", "rounds", *SOURCES.values(), "found", "by chance")
    lines = [
        (
            client,
            TOKEN_ATTACKS[attack],
            among,
            str(rounds),
            *(show_auc(_of(those, source)) for source in SOURCES),
            _precision(_of(those, UPDATE), "precision"),
            _precision(_of(those, UPDATE), "chance"),
        )
        for (client, attack, among, rounds), those in group(
            _newest(rows), "client", "attack", "among", "rounds"
        ).items()
    ]
    title = "Tokens of the client's texts, AUC in %, beside the vocabulary or other such texts"
    return Table(headings, lines, title)


def _list_canaries(rows: Sequence[Mapping[str, Any]]) -> Table:
    headings = ("client", "file", "round", "who is asked", "exposure", "ranked first", "p")
    lines = [
        (
            row["client"],
            row["role"],
            str(row["rounds"]),
            TEXT_SOURCES.get(row["source"], row["source"]),
            "{value:.1f} [{low:.1f}, {high:.1f}]".format(**row["mean"]),
            format_percent(row["ranked_first"]["value"], digits=0),
            f"{row['p_value']:.2g}",
        )
        for row in rows
    ]
    first = rows[0]
    title = (
        f"Exposure of canaries in bits; {first['chance']:.2f} is chance, {first['maximum']:.2f} "
        "all of it"
    )
    return Table(headings, lines, title)


def _newest(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield what is over all rounds and in the first and the last one."""
    numbers = [row["rounds"] for row in rows if row["rounds"] != ALL_ROUNDS]
    kept = {ALL_ROUNDS, *((min(numbers), max(numbers)) if numbers else ())}
    yield from (row for row in rows if row["rounds"] in kept)


def _of(rows: Sequence[Mapping[str, Any]], source: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["source"] == source), None)


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    found = row["verbatim"]
    return format_percent(found["value"], found["low"], found["high"], digits=0)


def _precision(row: Mapping[str, Any] | None, key: str) -> str:
    value = None if row is None else row.get(key)
    value = value["value"] if isinstance(value, Mapping) else value
    return format_percent(value, digits=0)
