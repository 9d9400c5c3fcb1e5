"""Run the demo in several modes and seeds, and print the README's table.

    python -m fedlora_app.demo.study [--seeds 42 43 44] [--modes dual fedavg local-only]

Each run is an ordinary ``flwr run``; finished ones of the same configuration are not repeated,
so that the study can be stopped and started again. Figures are means over the cities, then
over the seeds, with the 95 % interval of the seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from fedlora_app.config import Config
from fedlora_app.config_file import load_config
from fedlora_app.project import find_project_root
from fedlora_app.summary import collect_reports, conflict_passes

QUESTION_SETS = ("universal", "universal_unseen", "local", "conflict")
HEADINGS = ("universal", "facts never seen", "local", "conflict", "conflict, every city right")
EVALUATED = {
    "dual": ("base", "global", "global+local"),
    "fedavg": ("global",),
    "local-only": ("local",),
    "centralized": ("global",),
}


def run_once(root: Path, mode: str, seed: int) -> Path:
    """Run one mode and seed, unless its run directory is there, finished and up to date."""
    name = f"study-{mode}-seed{seed}"
    run_dir = root / "results" / name
    overrides = f"experiment.seed={seed}"
    config = load_config(root / "conf" / "demo.yaml", overrides, federated__mode=mode)
    if is_finished(run_dir, config):
        return run_dir
    if run_dir.exists():
        print(f"{run_dir} is unfinished or of another configuration and is run anew.", flush=True)
        shutil.rmtree(run_dir)
    settings = f"mode='{mode}' run-name='{name}' overrides='{overrides}'"
    command = ["flwr", "run", str(root), "--stream", "--run-config", settings]
    subprocess.run(command, check=True)
    if not is_finished(run_dir, config):
        sys.exit(f"{run_dir} was not finished; its log stands above.")
    return run_dir


def is_finished(run_dir: Path, config: Config) -> bool:
    """Tell whether a run of this configuration reached its end."""
    try:
        manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
        recorded = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest.get("finished")) and recorded == config.dump()


def measure(run_dir: Path) -> dict[str, list[float]]:
    """Return a run's figures: adapters to one value per heading, nan where there is none."""
    history = json.loads((run_dir / "history.json").read_text(encoding="utf-8"))
    reports = collect_reports(history)
    figures = {}
    for label in sorted({name.split("/")[0] for r in reports.values() for name in r}):
        keys = [f"{label}/{name}/exact_match" for name in QUESTION_SETS]
        means = [_mean([r[key] for r in reports.values() if key in r]) for key in keys]
        figures[label] = [*means, _mean(conflict_passes(reports, label))]
    return figures


def measure_minutes(run_dir: Path) -> float:
    """Return how long the rounds of a run took."""
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    return sum(entry["seconds"] for entry in manifest["rounds"]) / 60


def tabulate(runs: dict[tuple[str, int], Path], modes: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| mode | answers with | " + " | ".join(HEADINGS) + " |"
    yield "|---" * (2 + len(HEADINGS)) + "|"
    for mode in modes:
        figures = [measure(path) for (name, _), path in sorted(runs.items()) if name == mode]
        for label in EVALUATED[mode]:
            columns = zip(*(figure[label] for figure in figures), strict=True)
            cells = " | ".join(describe_interval(column) for column in columns)
            yield f"| {mode} | {label} | {cells} |"


def describe_interval(values: Sequence[float]) -> str:
    """Return "97.2 ± 1.3" in percent; the half-width needs two seeds and is 95 %."""
    if any(math.isnan(value) for value in values):
        return ""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    error = 100 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {error * stats.t.ppf(0.975, len(values) - 1):.1f}"


def _mean(values: Sequence[Any]) -> float:
    return statistics.fmean(values) if values else math.nan


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument(
        "--modes", nargs="+", choices=EVALUATED, default=["dual", "fedavg", "local-only"]
    )
    arguments = parser.parse_args()
    root = find_project_root()
    runs = {
        (mode, seed): run_once(root, mode, seed)
        for seed in arguments.seeds
        for mode in arguments.modes
    }
    print("\n".join(tabulate(runs, arguments.modes)))
    minutes = [measure_minutes(path) for path in runs.values()]
    print(
        f"\n{len(runs)} runs, seeds {', '.join(map(str, arguments.seeds))}; the rounds of a run "
        f"took {min(minutes):.1f} to {max(minutes):.1f} minutes."
    )


if __name__ == "__main__":
    main()
