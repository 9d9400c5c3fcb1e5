"""The sections of a run's report: what each shows, or why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    KEYWORD,
    OWN_SETS,
    QUESTION_SETS,
    Measure,
    shown_measures,
)
from fedlora_app.evaluation.reported import collect_reports, find_reported_leading
from fedlora_app.report import plots
from fedlora_app.runs.history import load_history
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import PartialRun

MOST_BYTES = 4_000_000  # of conflict questions on a page; the others stand in evaluation.json
MOST_CHARACTERS = 400  # of one answer
ROW_BYTES = 300  # of markup around the answers of one client
UNMEASURED = "unmeasured"
SHAPE_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What a file of another shape than expected raises when it is read."""


@dataclass(frozen=True)
class Plot:
    """A drawn figure, or why it is not there."""

    name: str
    svg: str = ""
    missing: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    caption: str = ""


@dataclass
class Section:
    """A part of the page; the lists of what it does not have stay empty."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


class Plotter:
    """Draws figures, keeps them as PNG and SVG in ``folder``, and hands out the SVG."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def draw(self, name: str, make: Callable[[], Figure], caption: str = "") -> Plot:
        """Return the figure that ``make`` draws, or what keeps it from being drawn."""
        try:
            figure = make()
        except plots.NothingToPlotError as error:
            return Plot(name, missing=str(error))
        except SHAPE_ERRORS as error:
            return Plot(
                name, missing=f"{name} cannot be drawn from what the files hold: {error!r}."
            )
        return Plot(name, plots.save_plot(figure, self.folder, name), caption=caption)


def build_sections(run: PartialRun, plotter: Plotter) -> list[Section]:
    """Return all sections of one run's report."""
    makers = (_show_answers, _show_training, _show_conflicts, _show_costs, _show_data)
    sections = [_guard(make, run, plotter) for make in (*makers, _show_provenance)]
    return [section for section in sections if section is not None]


def _guard(
    make: Callable[[PartialRun, Plotter], Section | None], run: PartialRun, plotter: Plotter
) -> Section | None:
    try:
        return make(run, plotter)
    except (*SHAPE_ERRORS, RunDirectoryError) as error:
        name = make.__name__.removeprefix("_show_")
        text = f"This part cannot be shown: the files hold something unexpected ({error!r})."
        return Section(name, name.capitalize(), [text])


def _show_answers(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("answers", "Who answers what")
    evaluation = run.evaluation
    if evaluation is None:
        section.text.append(
            "Which adapter carries which answer, how another client's local adapter does, and "
            "which scale of the local adapter is best, stands here after: "
            f"fedlora evaluate {run.reference}"
        )
        return section
    section.text.append(
        "Greedy answers that match exactly, in percent. Knowledge sits in an adapter when answers "
        "come with it and go without it."
    )
    for measure in (m for m in shown_measures() if m is not ACCURACY):
        name = "swap_table" if measure is EXACT_MATCH else f"swap_table_{measure.name}"
        draw = partial(plots.plot_swap_table, evaluation, measure.name)
        section.plots.append(plotter.draw(name, draw))
    for name in OWN_SETS:
        has = any(row["question_set"] == name for row in evaluation["swap_table"])
        if has and "local" in evaluation["answering"]:
            section.plots.append(
                plotter.draw(
                    f"foreign_adapters_{name}",
                    lambda name=name: plots.plot_foreign_adapters(evaluation, name),
                    "Everything beside the diagonal is another client's adapter in its place.",
                )
            )
    if "local" in evaluation["answering"]:
        section.plots.append(
            plotter.draw("local_scale", lambda: plots.plot_local_scale(evaluation))
        )
    section.text += list(evaluation.get("notes", []))
    return section


def _show_training(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("training", "Training")
    history = load_history(run.path)
    scored = [
        name
        for name in QUESTION_SETS
        if history["metric"].str.endswith(f"/{name}/{EXACT_MATCH.reported}").any()
    ]
    reports = collect_reports(run.history)
    for name in scored:
        leads = find_reported_leading(reports, name).reported
        draw = partial(plots.plot_accuracy, history, name, leads)
        section.plots.append(plotter.draw(f"accuracy_{name}", draw))
    for phase in plots.PHASES:
        if (history["metric"] == f"train_{phase}/train_loss").any():
            section.plots.append(
                plotter.draw(
                    f"loss_{phase.replace('+', '_')}",
                    lambda phase=phase: plots.plot_loss(history, phase),
                )
            )
    if run.mode != "local-only":
        for make in (plots.plot_update_norm, plots.plot_aggregation_error):
            name = make.__name__.removeprefix("plot_")
            section.plots.append(plotter.draw(name, lambda make=make: make(history)))
    return section


def _show_costs(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("costs", "What it cost")
    history = load_history(run.path)
    captions = {
        plots.plot_seconds: "Clients take turns on one device, so their times add up.",
        plots.plot_traffic: "Contents of all messages; local adapters are in none of them.",
        plots.plot_memory: "Allocated on the GPU, or on a CPU the process's high-water mark.",
    }
    for make, caption in captions.items():
        name = make.__name__.removeprefix("plot_")
        section.plots.append(plotter.draw(name, lambda make=make: make(history), caption))
    return section


def _show_conflicts(run: PartialRun, plotter: Plotter) -> Section | None:
    section = Section("conflicts", "Conflict questions")
    if run.evaluation is None:
        section.text.append(
            "Each question with every client's answer stands here after: "
            f"fedlora evaluate {run.reference}"
        )
        return section
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in run.evaluation["questions"]:
        if row["question_set"] == CONFLICT:
            rows.setdefault(row["record"], {}).setdefault(row["client"], row)
    if not rows:
        section.text.append("This run has no conflict questions.")
        return section
    leads = find_leading(run.evaluation, CONFLICT)
    questions = [_describe_question(by_client, leads) for by_client in rows.values()]
    questions.sort(key=lambda question: question["status"] == "passed")  # failed ones first
    section.questions = list(_take_what_fits(questions))
    num_shown = len(section.questions)
    section.clients = sorted({client for by_client in rows.values() for client in by_client})
    section.text.append(
        "One question, another right answer for each client. Log-likelihoods are sums over the "
        "answer's tokens. "
        + (
            "Passed is an own answer that is ranked first, as most right answers are long or free."
            if leads is ACCURACY
            else "Passed is a word-for-word answer; where none was generated or asked for, the "
            "keyword rule decides, and else the ranking."
        )
    )
    if len(questions) > num_shown:
        section.text.append(
            f"{num_shown} of {len(questions)} questions are shown, failed ones first; "
            "evaluation.json holds all of them."
        )
    return section


def _take_what_fits(questions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield questions while there is room on the page, and the first in any case."""
    room = MOST_BYTES
    for number, question in enumerate(questions):
        texts = (text for answer in question["answers"] for text in answer.values())
        room -= sum(len(text.encode(errors="replace")) for text in texts)
        room -= ROW_BYTES * len(question["answers"])
        if room < 0 and number:
            return
        yield question


def _describe_question(by_client: Mapping[str, dict[str, Any]], leads: Measure) -> dict[str, Any]:
    answers = [_describe_answer(client, row, leads) for client, row in sorted(by_client.items())]
    found = {answer["status"] for answer in answers}
    order = ("failed", UNMEASURED, "passed")
    status = next(status for status in order if status in found)
    return {
        "text": _cut(next(iter(by_client.values()))["instruction"]),
        "status": status,
        "mark": {UNMEASURED: "not measured"}.get(status, status),
        "answers": answers,
    }


def _describe_answer(client: str, row: Mapping[str, Any], leads: Measure) -> dict[str, Any]:
    order = (leads, EXACT_MATCH, KEYWORD, ACCURACY)
    candidates, values = row["candidates"], row["scores"]["log_likelihoods"]
    ranked = sorted(zip(values, candidates, strict=True), reverse=True)
    own = next((value for value, text in ranked if text == row["gold"]), None)
    other = next(((value, text) for value, text in ranked if text != row["gold"]), None)
    verdicts = (row[measure.row_key] for measure in dict.fromkeys(order))
    passed = next((verdict for verdict in verdicts if verdict is not None), None)
    return {
        "client": client,
        "status": {None: UNMEASURED, True: "passed", False: "failed"}[passed],
        "gold": _cut(row["gold"] or "(by keywords)"),
        "said": _cut(row["generated"] if row["generated"] is not None else "(not generated)"),
        "own": "" if own is None else f"{own:.2f}",
        "rival": "" if other is None else _cut(other[1]),
        "other": "" if other is None else f"{other[0]:.2f}",
    }


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."


def _show_data(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("data", "Data")
    reported = run.manifest.get("clients") or {}
    counts = ("universal_examples", "local_examples")
    rows = [
        (client, *(report.get(name, "") for name in counts), report.get("device", ""))
        for client, report in sorted(reported.items())
    ]
    headings = ("client", "universal examples", "local examples", "device")
    section.tables.append(Table(headings, rows, "What the clients trained on"))
    found = [
        (client, finding.get("severity"), finding.get("rule"), finding.get("file"), record)
        for client, report in sorted(reported.items())
        for finding in report.get("findings") or []
        for record in [finding.get("record", "")]
    ]
    if found:
        headings = ("client", "severity", "rule", "file", "record")
        section.tables.append(
            Table(headings, found, "Findings at registration; fedlora check CONFIG quotes records")
        )
    warnings = list((run.evaluation or {}).get("warnings", []))
    if warnings:
        rows = [(warning,) for warning in warnings]
        section.tables.append(Table(("warning",), rows, "Findings at the evaluation"))
    if not found and not warnings:
        section.text.append("fedlora check found nothing wrong with the question sets.")
    return section


def _show_provenance(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("provenance", "Provenance")
    commit = str(run.manifest.get("git_commit") or "unknown")
    if run.config:
        how = f"The same run again, in this project's folder at commit {commit}:"
        section.code.append((how, describe_command(run)))
    rows = list(_flatten({k: v for k, v in run.manifest.items() if k not in ("rounds", "clients")}))
    section.tables.append(Table(("manifest", ""), rows))
    section.details.append(("Configuration", json.dumps(run.config, indent=2, ensure_ascii=False)))
    hashes = json.dumps(run.manifest.get("rounds", []), indent=1, ensure_ascii=False)
    section.details.append(("Rounds with the hashes of their adapters", hashes))
    return section


def describe_command(run: PartialRun) -> str:
    """Return the command that repeats a run, from the configuration that it kept."""
    config = run.path / "config.json"
    if run.root is not None and config.is_relative_to(run.root):
        config = config.relative_to(run.root)
    federation = f'--federation-config "num-supernodes={len(run.clients)}"'
    return f"flwr run . --stream {federation} --run-config \"config='{config.as_posix()}'\""


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if entry is None else str(entry)
