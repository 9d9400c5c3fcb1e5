"""What keeps the local adapter from spoiling what the global one knows, tried in turn.

    python -m fedlora_app.demo.ablation RUN [RUN ...] [--variants NAME ...]

In the phased schedule the global adapters do not depend on the local ones, so each variant of
the local phase is trained against the global adapters that a finished run kept, round by round
and in the same way as in the run itself, at a third of its cost. Each variant is judged on
the validation questions; the test questions are scored beside them. Results go to
``ablation.json`` beside the run, and what stands there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import transformers

from fedlora_app.client import Client
from fedlora_app.config.loading import parse_config, parse_overrides, set_dotted
from fedlora_app.config.rounds import BOTH, adapters_label
from fedlora_app.config.schema import GLOBAL, Config, ConfigError
from fedlora_app.evaluation.client_round import Metrics
from fedlora_app.evaluation.names import EXACT_MATCH, QUESTION_SETS
from fedlora_app.foundation.files import write_json
from fedlora_app.foundation.project import find_project_root
from fedlora_app.model.adapter_files import load_adapter
from fedlora_app.model.adapters import AdapterState, attach_adapters
from fedlora_app.model.base import build_empty_model
from fedlora_app.runs.paths import RunPaths
from fedlora_app.study import describe_percent

VARIANTS = {
    "none": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2",
    "replay 0.25": "training.replay=0.25 training.local_weight_decay=0 training.local_epochs=2",
    "replay 0.5": "training.replay=0.5 training.local_weight_decay=0",
    "replay 1": "training.replay=1 training.local_weight_decay=0",
    "weight decay 5": "training.replay=0 training.local_weight_decay=5 training.local_epochs=2",
    "weight decay 10": "training.replay=0 training.local_weight_decay=10 training.local_epochs=2",
    "orthogonality 1": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2 "
    "training.local_orthogonality=1",
    "orthogonality 30": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2 "
    "training.local_orthogonality=30",
    "rank 2": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2 "
    "adapters.local.rank=2 adapters.local.alpha=4",
    "scale 0.5": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2 "
    "adapters.local.alpha=4",
    "gate": "training.replay=0 training.local_weight_decay=0 training.local_epochs=2 "
    "adapters.gate=prompt",
    "replay 1, KL 1": "training.replay=1 training.local_weight_decay=0 training.local_kl_weight=1",
    "replay 1, KL 5": "training.replay=1 training.local_weight_decay=0 training.local_kl_weight=5",
    "replay 1, rank 2": "training.replay=1 training.local_weight_decay=0 "
    "adapters.local.rank=2 adapters.local.alpha=4",
    "replay 1, scale 0.5": "training.replay=1 training.local_weight_decay=0 adapters.local.alpha=4",
    "replay 1, weight decay 5": "training.replay=1 training.local_weight_decay=5",
    "replay 1, weight decay 10": "training.replay=1 training.local_weight_decay=10",
    "replay 1, weight decay 10, KL 1": "training.replay=1 training.local_weight_decay=10 "
    "training.local_kl_weight=1",
    "replay 1, weight decay 10, orthogonality 1": "training.replay=1 "
    "training.local_weight_decay=10 training.local_orthogonality=1",
}
Figures = dict[str, float]


def ablate(run_dir: Path, root: Path, overrides: str) -> Figures:
    """Train every client's local adapter again with ``overrides`` and return its figures.

    Returns:
        Exact match in [0, 1] under ``<validation or test>/<question set>``, means over the
        clients, and the number of steps of a round's local phase.
    """
    recorded = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    changes, faults = parse_overrides(overrides)
    assert not faults, faults
    # The variants speak of the decay itself, whatever the run was told to keep.
    for key, value in ({"training.local_kept_share": None} | changes).items():
        set_dotted(recorded, key, value)
    config = parse_config(recorded, source=str(run_dir))
    if config.federated.mode != "dual" or config.training.schedule != "phased":
        raise ConfigError(f"{run_dir} is not a phased run of mode dual. Expected only such runs.")
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"interval": 10**6})}
    )
    states = load_global_states(run_dir, config, root)
    work_dir = run_dir / "ablation"
    shutil.rmtree(work_dir, ignore_errors=True)
    sums: dict[str, list[float]] = {}
    for client_id in config.client_ids:
        asked = Client(use_validation_files(config), client_id, work_dir, root)
        chosen_by = retrain(asked, states)
        sums.setdefault("steps", []).append(chosen_by["train_local/num_steps"])
        tested = Client(config, client_id, work_dir, root)
        reported = tested.evaluate(states[-1], config.federated.num_rounds)
        for part, metrics in (("validation", chosen_by), ("test", reported)):
            for name in QUESTION_SETS:
                value = metrics[f"{adapters_label(BOTH)}/{name}/{EXACT_MATCH.reported}"]
                sums.setdefault(f"{part}/{name}", []).append(value)
    shutil.rmtree(work_dir)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def retrain(client: Client, states: Sequence[AdapterState]) -> Metrics:
    """Train a client's local adapter from scratch against the global one of every round.

    Args:
        states: the global adapter after every round, the initial one first.

    Returns:
        The last round's metrics.
    """
    metrics: Metrics = {}
    for server_round, state in enumerate(states[1:], start=1):
        local_round = server_round - 1 if server_round > 1 else -1  # -1: a fresh one
        metrics, _ = client.personalise(server_round, state, local_round)
    return metrics


def load_global_states(run_dir: Path, config: Config, root: Path) -> list[AdapterState]:
    """Return the global adapter after every round, the initial one first."""
    model = attach_adapters(build_empty_model(config.model, root), config.adapters)
    num_rounds = config.federated.num_rounds
    folders = [RunPaths(run_dir).global_adapter(n) for n in range(num_rounds + 1)]
    return [load_adapter(folder, model, GLOBAL, config.model.name) for folder in folders]


def use_validation_files(config: Config) -> Config:
    """Return the experiment with its validation questions in the place of its test questions."""
    raw = config.dump()
    raw["data"]["universal_test"] = raw["data"]["universal_validation"]
    raw["data"]["conflict_test"] = raw["data"]["conflict_validation"]
    for client in raw["federated"]["clients"]:
        client["local_test"] = client["local_validation"]
    return parse_config(raw)


def tabulate(results: dict[str, dict[str, Figures]]) -> Iterator[str]:
    """Yield a Markdown table: variant, steps, and each question set with its interval."""
    yield "| variant | steps a round | " + " | ".join(QUESTION_SETS) + " | mean (validation) |"
    yield "|---" * (3 + len(QUESTION_SETS)) + "|"
    for variant, by_run in results.items():
        runs = list(by_run.values())
        cells = [
            describe_percent([figures[f"test/{name}"] for figures in runs])
            for name in QUESTION_SETS
        ]
        validation = [
            sum(figures[f"validation/{name}"] for name in QUESTION_SETS) / len(QUESTION_SETS)
            for figures in runs
        ]
        steps = f"{runs[0]['steps']:.0f}"
        yield f"| {variant} | {steps} | {' | '.join(cells)} | {describe_percent(validation)} |"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished phased runs of mode dual")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    root = find_project_root()
    path = arguments.runs[0].parent / "ablation.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for variant in arguments.variants:
        by_run = results.setdefault(variant, {})
        for run_dir in arguments.runs:
            if run_dir.name not in by_run:
                by_run[run_dir.name] = ablate(run_dir, root, VARIANTS[variant])
                write_json(path, results)
                print(f"{variant}, {run_dir.name}: {by_run[run_dir.name]}", flush=True)
    print("\n".join(tabulate({name: results[name] for name in arguments.variants})))


if __name__ == "__main__":
    main()
