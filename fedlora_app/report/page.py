"""The report: one page per run, and one that puts several runs side by side.

A page opens from disk without a network: style, script and plots are in it. Everything that comes
from data is escaped, and the page's policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from fedlora_app.data.questions import CONFLICT, LOCAL_SET
from fedlora_app.evaluation.chance import describe_chance
from fedlora_app.evaluation.comparison import compare_evaluations
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.learning import find_nothing_learned
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    FIGURES,
    LEAKAGE,
    OWN_PAIR,
    PASS_RATE,
    QUESTION_SETS,
    figure_key,
)
from fedlora_app.evaluation.reported import (
    collect_reports,
    describe_left_out,
    find_reported_leading,
)
from fedlora_app.evaluation.statistics import Estimate
from fedlora_app.foundation.files import make_private_dir, write_atomically
from fedlora_app.foundation.percent import format_n, format_percent
from fedlora_app.report import drawing, plots
from fedlora_app.report.gate import point_to_gate
from fedlora_app.report.numbers import EXACT, RANKED, Figures, measure_run
from fedlora_app.report.parts import SHAPE_ERRORS, Plotter, Section, Table
from fedlora_app.report.sections import build_sections
from fedlora_app.report.template import MACROS, PAGE, SCRIPT, STYLE
from fedlora_app.report.verdict import Verdict, format_p, judge_run, judge_runs
from fedlora_app.runs.history import load_history, name_runs
from fedlora_app.runs.manifest import FORGOTTEN
from fedlora_app.runs.partial import PartialRun, read_what_is_left
from fedlora_app.runs.paths import RunDirectoryError

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
FOOTER = (
    "Intervals are at 95 %: Wilson's, for as many questions as the answers are worth where "
    "paraphrases of one fact go the same way. A question that several clients answer counts once. "
    "Written by fedlora report."
)
PLOTS_FOLDER = "plots"
OWN_ALONE = "local:own"
ANSWERS_WITH = {
    "dual": OWN_PAIR,
    "adapted": OWN_PAIR,
    "finetuned": OWN_ALONE,
    "local-only": OWN_ALONE,
}
"""By mode; in the others with the global adapter."""
MEANS = {
    PASS_RATE: CONFLICT,
    **{name: name for name in reversed(QUESTION_SETS)},
    LEAKAGE: LOCAL_SET,
}
"""The figures of a table of means, and of which question set each is."""


def write_report(
    run_dir: Path, output: Path | None = None, reload_seconds: int | None = None
) -> Path:
    """Write one run's report, and its plots beside it, and return the page's path.

    Args:
        reload_seconds: after which a browser reloads the page; None: it does not.

    Raises:
        RunDirectoryError: there is nothing of a run in the folder.
    """
    run = read_what_is_left(run_dir.resolve())
    output, plots_dir = _place(output or run.path / REPORT_FILE)
    figures = _measure(run)
    schedule = (run.config.get("training") or {}).get("schedule")
    if run.mode == "adapted":  # the shared adapter is of another run
        origin = run.manifest.get("adapted_from") or {}
        schedule = origin.get("schedule") if origin.get("mode") == "dual" else None
    prompts = [client.get("system_prompt") for client in run.clients]
    nothing = None
    try:
        nothing = find_nothing_learned(run.result_history)
        verdict = judge_run(figures, prompts, schedule, nothing, kind=run.kind)
    except SHAPE_ERRORS as error:
        verdict = Verdict("No verdict.", f"The run cannot be judged: {error}")
    sections = build_sections(run, Plotter(plots_dir))
    _write_page(
        output,
        title=f"{run.name}: {verdict.headline}",
        kicker=_describe(run),
        reload_seconds=reload_seconds,
        written=time.strftime("%H:%M:%S"),
        verdict=verdict,
        table=_figure_table(
            figures.values(), "" if nothing else ANSWERS_WITH.get(run.mode, "global")
        ),
        facts=list(_facts(run)),
        problems=[*run.problems, *_tell_left_out(run), *point_to_gate(run)],
        sections=sections,
    )
    return output


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write a page on several runs, whose own reports are in their folders.

    Raises:
        RunDirectoryError: there is nothing of a run in one of the folders.
    """
    runs = [read_what_is_left(path, name) for path, name in name_runs(run_dirs).items()]
    output, plots_dir = _place(output)
    figures = {run.name: _measure(run) for run in runs}
    own = {
        run.name: found
        for run in runs
        if (found := figures[run.name].get(ANSWERS_WITH.get(run.mode, "global")))
    }
    evaluations = {run.name: run.evaluation for run in runs if run.evaluation is not None}
    try:
        verdict = judge_runs(own, {run.name: run.kind for run in runs}, evaluations)
    except SHAPE_ERRORS as error:
        verdict = Verdict("No verdict.", f"The runs cannot be compared: {error}")
    labels = {name: f"{_mode_of(runs, name)}: {name}" for name in own}
    _write_page(
        output,
        title=f"{len(runs)} runs: {verdict.headline}",
        kicker=f"{len(runs)} runs side by side",
        verdict=verdict,
        table=_figure_table(own.values(), "", labels=list(labels.values())),
        facts=[],
        problems=[
            f"{run.name}: {problem}"
            for run in runs
            for problem in [*run.problems, *_tell_left_out(run)]
        ],
        sections=[
            _show_runs(runs, output),
            *_show_differences(evaluations),
            *_show_curves(runs, Plotter(plots_dir)),
        ],
    )
    return output


def _place(output: Path) -> tuple[Path, Path]:
    """Return where a page goes, and its plots; a folder gets a page of the usual name."""
    if output.is_dir():
        output = output / REPORT_FILE
    make_private_dir(output.parent)
    is_usual = output.name == REPORT_FILE
    return output, output.parent / (PLOTS_FOLDER if is_usual else f"{output.stem}_{PLOTS_FOLDER}")


def _write_page(output: Path, **content: Any) -> None:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    for section in content["sections"]:
        section.plots = [
            {"svg": _inline(p.svg, p.name), "missing": p.missing, "caption": p.caption}
            for p in section.plots
        ]
    page = environment.from_string(MACROS + PAGE).render(
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(digest).decode(),
        footer=FOOTER,
        **content,
    )
    write_atomically(output, page.encode(errors="replace").decode())  # lone surrogates


def _inline(svg: str, name: str) -> Markup:
    """Return an SVG for the page: scaled to its column, in the page's own colours."""
    svg = svg[svg.index("<svg") :] if svg else ""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    label = f' role="img" aria-label="{name.replace("_", " ")}"'
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf"\1{label}", svg, count=1)
    for index, colour in enumerate(drawing.SERIES):
        svg = svg.replace(colour, f"var(--s{index})")
    svg = svg.replace(drawing.INK, "var(--ink)").replace(drawing.FAINT, "var(--line)")
    return Markup(svg)  # matplotlib escapes the texts in it


def _measure(run: PartialRun) -> dict[str, Figures]:
    try:
        return measure_run(run.result_history, run.evaluation)
    except SHAPE_ERRORS as error:
        run.problems.append(f"history.json or evaluation.json hold something unexpected: {error!r}")
        return {}


def _tell_left_out(run: PartialRun) -> list[str]:
    """Return whose figures are not in those that the run measured itself, where these count."""
    return [] if run.evaluation is not None else list(describe_left_out(run.result_history))


def _figure_table(
    figures: Sequence[Figures], best: str, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the table of the first screen: exact matches with interval, and ranking."""
    figures = list(figures)
    sets = reversed(QUESTION_SETS)  # what the method is for comes first
    columns = [n for n in sets if any(f.share(n).n for f in figures)]
    has_passes = any(f.passed().n for f in figures)
    rows = []
    for index, entry in enumerate(figures):
        chance = partial(describe_chance, entry.chances, lead=", ")
        cells = [_cell(entry.passed, entry.leads(), chance(PASS_RATE))] if has_passes else []
        cells += [_cell(partial(entry.share, n), entry.leads(n), chance(n)) for n in columns]
        label = labels[index] if labels else entry.label
        rows.append({"label": label, "cells": cells, "best": entry.who == best})
    headings = ["", *[FIGURES[PASS_RATE]] * has_passes, *(QUESTION_SETS[n].label for n in columns)]
    caption = (
        "Test questions answered word for word [95 % interval over facts] n questions/facts, and "
        "with the right answer ranked first among its candidates, beside how often a guess is. The "
        "ranking stands first where most right answers are long or free, so that few can match "
        "whatever was learnt"
    )
    return {"headings": headings, "rows": rows, "caption": caption}


def _cell(find: Callable[[str], Estimate], leads: str, chance: str) -> dict[str, str] | None:
    """Return a figure by the measure that leads, with its interval, and by the other one.

    Args:
        chance: follows the ranking.
    """
    other, word = (RANKED, "ranked") if leads == EXACT else (EXACT, "exact")
    first, beside = find(leads), find(other)
    if not first.n and not beside.n:
        return None
    main = interval = second = ""
    if first.n:
        main = "ranked " * (leads == RANKED) + format_percent(first.value, unit=" %")
        low, high = (format_percent(end, digits=0) for end in (first.low, first.high))
        ends = f"[{low}, {high}] " * (first.low is not None)
        interval = f"{ends}n {format_n(first.n, first.facts)}{chance * (leads == RANKED)}"
    if beside.n:
        second = f"{word} {format_percent(beside.value, unit=' %')}{chance * (leads == EXACT)}"
    return {"main": main, "interval": interval, "second": second}


def _describe(run: PartialRun) -> str:
    base = (run.config.get("model") or {}).get("name", "unknown base model")
    seed = (run.config.get("experiment") or {}).get("seed", "?")
    return (
        f"{run.name}: mode {run.mode}, {_count(run.num_rounds, 'round')}, "
        f"{_count(len(run.clients), 'client')}, seed {seed}, base {base}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _facts(run: PartialRun) -> Any:
    yield "complete rounds", _count_rounds(run)
    if why := (run.manifest.get("final") or {}).get("why"):
        yield "final round", str(why)
    if forgotten := run.manifest.get(FORGOTTEN):
        client, origin = forgotten.get("client"), forgotten.get("run")
        yield "made without", f"{client} of {origin}. {forgotten.get('note', '')}"
    seconds = sum(entry.get("seconds", 0) for entry in run.manifest.get("rounds", []))
    yield "time of all rounds", f"{seconds / 60:.1f} min"
    yield "started", str(run.manifest.get("started", "unknown"))
    yield "commit", str(run.manifest.get("git_commit") or "unknown")[:12]


def _count_rounds(run: PartialRun) -> str:
    done = "none" if run.last_round is None else run.last_round
    return f"{done} of {run.num_rounds}"


def _mode_of(runs: Sequence[PartialRun], name: str) -> str:
    return next(run.mode for run in runs if run.name == name)


def _show_runs(runs: Sequence[PartialRun], output: Path) -> Section:
    rows = []
    for run in runs:
        report = run.path / REPORT_FILE
        link: Any = run.name
        if report.exists():
            href = Path(os.path.relpath(report, output.parent)).as_posix()
            link = {"href": href, "text": run.name}
        seed = (run.config.get("experiment") or {}).get("seed", "")
        adapters = run.config.get("adapters") or {}
        ranks = "/".join(str((adapters.get(k) or {}).get("rank", "?")) for k in ("global", "local"))
        schedule = (run.config.get("training") or {}).get("schedule", "")
        rows.append((link, run.mode, schedule, ranks, seed, _count_rounds(run)))
    headings = ("run", "mode", "schedule", "ranks global/local", "seed", "rounds")
    return Section("runs", "The runs", tables=[Table(headings, rows)])


def _name_variant(run: PartialRun) -> str:
    """Return what like runs have in common: mode, schedule and ranks."""
    adapters = run.config.get("adapters") or {}
    schedule = (run.config.get("training") or {}).get("schedule", "phased")
    ranks = "/".join(str((adapters.get(k) or {}).get("rank", "?")) for k in ("global", "local"))
    how = f", {schedule}" if run.mode == "dual" and schedule != "phased" else ""
    return f"{run.mode}{how}, ranks {ranks}"


def _show_differences(evaluations: Mapping[str, dict[str, Any]]) -> list[Section]:
    """Return what ``fedlora compare`` shows, where two or more runs are evaluated."""
    if len(evaluations) < 2:
        return []
    section = Section("differences", "Differences")
    try:
        compared = compare_evaluations(evaluations)
        means = _choose_means(next(iter(evaluations.values())))
        reference = compared["runs"][0]["name"]
        rows = [
            (
                *(entry[key] for key in ("run", "topic", "scored_by")),
                _percent(entry["difference"], sign="+"),
                format_n(entry["n"], entry["facts"]),
                format_p(entry["p_value_holm"]),
            )
            for entry in compared["differences"]
        ]
        groups = [
            (
                group["label"],
                len(group["seeds"]),
                *(_percent(group["figures"].get(key) or {}) for key in means),
            )
            for group in compared["groups"]
        ]
        section.text += [*compared["not_comparable"], *compared["notes"]]
    except SHAPE_ERRORS as error:
        section.text.append(f"The runs cannot be compared: {error}")
        return [section]
    if groups:
        headings = ("alike", "seeds", *means.values())
        caption = (
            "Means over seeds of like runs, percent word for word where nothing else is said, with "
            "the wider of Student's t interval over the seeds and that over facts"
        )
        section.tables.append(Table(headings, groups, caption))
    if rows:
        headings = ("run", "questions", "scored by", "difference", "n/facts", "p (Holm)")
        caption = f"Run minus {reference}, percentage points with 95 % interval"
        section.tables.append(Table(headings, rows, caption))
    return [section]


def _percent(estimate: Mapping[str, float | None], **settings: str) -> str:
    ends = (estimate.get(key) for key in ("value", "low", "high"))
    return format_percent(*ends, **settings)


def _choose_means(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of a table of means by what leads in an evaluation, with headings."""
    leading = {figure: find_leading(evaluation, name) for figure, name in MEANS.items()}
    return {
        figure_key(figure, leads): FIGURES[figure] + f", {leads.label}" * (leads is ACCURACY)
        for figure, leads in leading.items()
    }


def _show_curves(runs: Sequence[PartialRun], plotter: Plotter) -> list[Section]:
    section = Section("curves", "Side by side", ["A line is the mean over a run's clients."])
    paths = [run.path for run in runs if run.history]
    try:
        history = load_history(*paths)
        reports = [collect_reports(run.history) for run in runs]
    except (*SHAPE_ERRORS, RunDirectoryError) as error:
        return [Section("curves", "Side by side", [f"The histories cannot be drawn: {error}"])]
    if len(paths) > plots.MOST_LINES:
        variants = {run.name: _name_variant(run) for run in runs}
        history["run"] = history["run"].map(variants)
        section.text = ["A line is the mean over like runs and their clients."]
    for name in QUESTION_SETS:
        leading = {find_reported_leading(report, name) for report in reports}
        measure = ACCURACY if ACCURACY in leading else EXACT_MATCH
        draw = partial(plots.plot_accuracy, history, name, measure.reported)
        section.plots.append(plotter.draw(f"accuracy_{name}", draw))
    for make in (plots.plot_seconds, plots.plot_traffic):
        name = make.__name__.removeprefix("plot_")
        section.plots.append(plotter.draw(name, lambda make=make: make(history)))
    return [section]
