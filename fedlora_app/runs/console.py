"""What a run prints: a block at its start and a table at its end."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora_app.config.rounds import plan_round, training_clients
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.foundation.progress import format_duration

WIDTH = 100
COLUMNS = {
    "universal": "universal",
    "universal_unseen": "never seen",
    "local": "local",
    "conflict": "conflict",
}
LABELS = {
    "base": "base model",
    "global": "global alone",
    "local": "local alone",
    "global+local": "global + own local",
}

Reports = dict[str, dict[str, Any]]
"""Each client's metrics."""


def describe_start(
    config: Config,
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    clients: dict[str, dict[str, Any]],
) -> str:
    """Return the block that opens a run."""
    federated, training, plan = config.federated, config.training, plan_round(config, 1)
    sizes = {name: sum(map(math.prod, shape.values())) for name, shape in shapes.items()}
    lines = [
        f"{config.experiment.name}: {federated.mode}, {federated.num_rounds} rounds, "
        f"seed {config.experiment.seed}, base {config.model.name}",
        f"  global adapter  rank {config.adapters.global_.rank}, {sizes[GLOBAL]:,} parameters",
        f"  local adapter   rank {config.adapters.local.rank}, {sizes[LOCAL]:,} parameters"
        + ("" if LOCAL in plan.evaluated else " (not used in this mode)"),
        f"  travels         {_describe_traffic(config, sizes[GLOBAL])}",
        f"  training        {training.schedule}, learning rate {training.learning_rate:g}, "
        f"batch {training.batch_size} x {training.gradient_accumulation_steps}",
        "  server          no model, no device",
    ]
    for client, report in clients.items():
        counts = f"{report['universal_examples']} universal, {report['local_examples']} local"
        lines.append(f"  {client:<15} {counts} examples; {report['device']}")
        lines += [f"  {'':<15} {note}" for note in _notes(report, training.max_seq_length)]
    return "\n".join(lines)


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
    for name, heading in COLUMNS.items():
        values = [r[k] for r in reports.values() if (k := f"{label}/{name}/exact_match") in r]
        if values:
            parts.append(f"{heading} {sum(values) / len(values):.2f}")
    passed = conflict_passes(reports, label)
    if passed:
        parts.append(f"every client right {sum(passed)}/{len(passed)}")
    figures = ", ".join(parts) or "no question sets"
    return f"round {server_round}/{num_rounds} [{label}] {figures} {time_used})"


def describe_run(history: list[dict[str, Any]]) -> str:
    """Return the closing table: exact match by adapters and client, the last of each."""
    reports = collect_reports(history)
    labels = sorted(_labels(reports), key=list(LABELS).index)
    keys = {name: f"{name}/exact_match" for name in COLUMNS}
    shown = [
        name
        for name, key in keys.items()
        if any(f"{label}/{key}" in r for label in labels for r in reports.values())
    ]
    table = Table(
        "adapters",
        "client",
        title="Greedy answers to held-out paraphrases that match exactly",
        title_justify="left",
    )
    for name in shown:
        table.add_column(COLUMNS[name], justify="right")
    for label in labels:
        for client, report in sorted(reports.items()):
            cells = (_percent(report.get(f"{label}/{keys[name]}")) for name in shown)
            table.add_row(LABELS[label], client, *cells)
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    lines = [console.file.getvalue().rstrip()]
    for label in labels:
        passed = conflict_passes(reports, label)
        if passed:
            lines.append(
                f"{LABELS[label]}: {sum(passed)} of {len(passed)} conflict questions answered in "
                "its own way by every client"
            )
    return "\n".join(lines)


def collect_reports(history: list[dict[str, Any]]) -> Reports:
    """Return each client's evaluation metrics, the last of each name."""
    reports: Reports = {}
    for entry in history:
        if entry["phase"] == "evaluate":
            scores = {k: v for k, v in entry["metrics"].items() if k.count("/") == 2}
            reports.setdefault(entry["client"], {}).update(scores)
    return reports


def conflict_passes(
    reports: Reports, label: str | None, measure: str = "exact_match"
) -> list[bool]:
    """Tell for each conflict question whether every client gave its own answer.

    By its greedy answer, or with ``ranked_first`` by the candidates' likelihoods. Questions that
    fewer than two clients have an answer for (-1 for the others) do not count. Empty unless all
    clients reported on the same records.
    """
    key = f"{label}/conflict/{measure}_each"
    columns = [report[key] for report in reports.values() if key in report]
    if not columns or len(columns) < len(reports) or len({len(c) for c in columns}) > 1:
        return []
    rows = ([value for value in row if value >= 0] for row in zip(*columns, strict=True))
    return [all(row) for row in rows if len(row) > 1]


def _labels(reports: Reports) -> dict[str, None]:
    """Return the adapters that there are results for, in their order of appearance."""
    names = (name for report in reports.values() for name in report)
    return dict.fromkeys(name.split("/")[0] for name in names if name.count("/") == 2)


def _describe_traffic(config: Config, num_parameters: int) -> str:
    if plan_round(config, 1).train is None:
        return "nothing but metrics leaves a client"
    up = num_parameters * (2 if config.federated.upload_dtype == "bfloat16" else 4)
    down = num_parameters * 4
    senders = len(training_clients(config))
    return (
        f"the global adapter's update up ({up / 1e6:.2f} MB per round from each of {senders}), "
        f"the adapter down ({down / 1e6:.2f} MB); local adapters never"
    )


def _notes(report: dict[str, Any], max_seq_length: int) -> Iterable[str]:
    for name in ("universal", "local"):
        if report[f"{name}_truncated"]:
            yield (
                f"{report[f'{name}_truncated']} of {report[f'{name}_examples']} {name} examples "
                f"were cut at {max_seq_length} tokens"
            )
        if report[f"{name}_dropped"]:
            yield f"{report[f'{name}_dropped']} {name} examples were dropped as too long"
    if report["findings"]:
        yield (
            f"{len(report['findings'])} findings about its question sets; fedlora check tells them"
        )
    if report["unscored_conflicts"]:
        yield f"{report['unscored_conflicts']} conflict records have no answer of it to score"
    if report["skipped_records"]:
        yield f"{report['skipped_records']} invalid records were skipped"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
