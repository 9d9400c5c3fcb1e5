"""The sections of a run's report: what each shows, or why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from fedlora_app.config.run_config import format_run_config
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    OWN_SETS,
    QUESTION_SETS,
    relative_label,
    shown_measures,
)
from fedlora_app.evaluation.reported import (
    collect_reports,
    describe_left_out,
    find_reported_leading,
)
from fedlora_app.foundation.terminal import shell
from fedlora_app.report import plots
from fedlora_app.report.attack import show_attack
from fedlora_app.report.gate import show_gate
from fedlora_app.report.parts import SHAPE_ERRORS, Plotter, Section, Table
from fedlora_app.report.questions import show_conflicts
from fedlora_app.runs.history import load_history
from fedlora_app.runs.manifest import FORGOTTEN
from fedlora_app.runs.partial import PartialRun
from fedlora_app.runs.paths import RunDirectoryError


def build_sections(run: PartialRun, plotter: Plotter) -> list[Section]:
    """Return all sections of one run's report."""
    makers = (_show_answers, show_gate, show_attack, _show_training, _show_privacy, show_conflicts)
    makers += (_show_costs, _show_data, _show_provenance)
    sections = [_guard(make, run, plotter) for make in makers]
    return [section for section in sections if section is not None]


def _guard(
    make: Callable[[PartialRun, Plotter], Section | None], run: PartialRun, plotter: Plotter
) -> Section | None:
    try:
        return make(run, plotter)
    except (*SHAPE_ERRORS, RunDirectoryError) as error:
        name = make.__name__.rpartition("show_")[2]
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
    leading = {name: find_leading(evaluation, name) for name in QUESTION_SETS}
    ranks = ACCURACY in leading.values()
    ranked = "Right answers that are ranked first, which count where most are long or free; g"
    section.text.append(
        f"{ranked if ranks else 'G'}reedy answers that match exactly, in percent. Knowledge sits "
        "in an adapter when answers come with it and go without it."
    )
    for measure in (m for m in shown_measures() if ranks or m is not ACCURACY):
        name = "swap_table" if measure is EXACT_MATCH else f"swap_table_{measure.name}"
        draw = partial(plots.plot_swap_table, evaluation, measure.name)
        section.plots.append(plotter.draw(name, draw))
    for name in OWN_SETS:
        rows = [row for row in evaluation["swap_table"] if row["question_set"] == name]
        if any(relative_label(row).endswith(":foreign") for row in rows):
            section.plots.append(
                plotter.draw(
                    f"foreign_adapters_{name}",
                    partial(plots.plot_foreign_adapters, evaluation, name, leading[name].name),
                    "Everything beside the diagonal is another client's adapter in its place.",
                )
            )
    if "local" in evaluation["answering"]:
        measure = ACCURACY if ranks else EXACT_MATCH
        draw = partial(plots.plot_local_scale, evaluation, measure.name)
        section.plots.append(plotter.draw("local_scale", draw))
    section.text += list(evaluation.get("notes", []))
    return section


def _show_training(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("training", "Training")
    history = load_history(run.path)
    if sample := (run.config.get("evaluation") or {}).get("sample"):
        section.text.append(
            f"Before the last round at most {sample} questions of each set were asked, the same "
            "ones every time."
        )
    scored = [
        name
        for name in QUESTION_SETS
        if history["metric"].str.endswith(f"/{name}/{EXACT_MATCH.reported}").any()
    ]
    reports = collect_reports(run.history)
    section.text += describe_left_out(run.history)
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
    if run.mode not in ("local-only", "adapted"):  # where nothing is averaged
        for make in (
            plots.plot_update_norm,
            plots.plot_update_cosine,
            plots.plot_aggregation_error,
        ):
            name = make.__name__.removeprefix("plot_")
            section.plots.append(plotter.draw(name, lambda make=make: make(history)))
    return section


def _show_privacy(run: PartialRun, plotter: Plotter) -> Section | None:
    if (run.config.get("privacy") or {}).get("unit", "none") == "none":
        return None
    from fedlora_app.report.privacy import show_privacy  # its words are the accountant's, with flwr

    return show_privacy(run, plotter)


def _show_costs(run: PartialRun, plotter: Plotter) -> Section:
    section = Section("costs", "What it cost")
    history = load_history(run.path)
    captions = {
        plots.plot_seconds: "Sums over the clients: a round's time where they take turns.",
        plots.plot_traffic: "Contents of all messages; local adapters are in none of them.",
        plots.plot_memory: "Allocated on the GPU, or on a CPU the process's high-water mark.",
    }
    for make, caption in captions.items():
        name = make.__name__.removeprefix("plot_")
        section.plots.append(plotter.draw(name, lambda make=make: make(history), caption))
    return section


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
    found = _merge_findings(reported)
    warnings = list((run.evaluation or {}).get("warnings", []))
    if warnings:  # which say what registration found, in words
        rows = [(warning,) for warning in warnings]
        section.tables.append(Table(("finding",), rows, "Findings about the question sets"))
    elif found:
        headings = ("severity", "rule", "file", "clients", "number", "first record")
        title = "Findings at registration; fedlora check CONFIG quotes records"
        section.tables.append(Table(headings, found, title))
    if reported and not found and not warnings:
        who = "fedlora check" if run.evaluation is not None else "Registration"
        section.text.append(f"{who} found nothing wrong with the question sets.")
    return section


def _merge_findings(reported: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row for each rule and file, which several clients may have reported."""
    merged: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for client, report in sorted(reported.items()):
        for finding in report.get("findings") or []:
            place = tuple(str(finding.get(key) or "") for key in ("severity", "rule", "file"))
            merged.setdefault(place, {}).setdefault(client, []).append(finding.get("record"))
    return [
        (*place, ", ".join(by), max(map(len, by.values())), next(iter(by.values()))[0] or "")
        for place, by in merged.items()
    ]


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
    if run.mode == "adapted":
        origin = run.manifest.get("adapted_from") or {}
        earlier = (origin.get("local_adapters") or {}).get("run")
        command = f"fedlora adapt {shell(origin.get('run', 'RUN'))} --config "
        command += shell(config.as_posix())
        return command + (f" --only-scale {shell(earlier)}" if earlier else "")
    if forgotten := run.manifest.get(FORGOTTEN):
        origin = forgotten.get("run", "RUN")
        return f"fedlora forget {shell(origin)} --client {forgotten.get('client')}"
    federation = f'--federation-config "num-supernodes={len(run.clients)}"'
    given = format_run_config({"config": config.as_posix()})
    return f"flwr run . --stream {federation} --run-config {shell(given)}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if entry is None else str(entry)
