"""What keeps the local adapter from spoiling what the global one knows, tried in turn.

    python -m fedlora_app.demo.ablation RUN [RUN ...] [--variants NAME ...] [--clients ID ...]
        [--public FILE]

In the phased schedule the global adapters do not depend on the local ones, so each variant of
the local phase is trained against the global adapters that a finished run kept, round by round
and with as many steps as in the run itself, at a third of its cost. Each variant is judged on
the validation questions; the test questions are scored beside them. Results go to
``ablation.json`` beside the run, and what stands there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from fedlora_app.client import Client
from fedlora_app.config.loading import join_overrides, parse_config, parse_overrides, set_dotted
from fedlora_app.config.rounds import BOTH, adapters_label
from fedlora_app.config.schema import GLOBAL, LOCAL, Config, ConfigError
from fedlora_app.evaluation.client_round import Metrics
from fedlora_app.evaluation.names import EXACT_MATCH, QUESTION_SETS
from fedlora_app.evaluation.scores import mean
from fedlora_app.federation.messages import Kept
from fedlora_app.foundation.files import hash_file, write_json
from fedlora_app.foundation.project import find_project_root
from fedlora_app.model.adapter_files import load_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import attach_adapters
from fedlora_app.model.base import build_empty_model, decoder_layers
from fedlora_app.runs.history import read_history
from fedlora_app.runs.manifest import RUN_ID
from fedlora_app.runs.paths import RunPaths
from fedlora_app.runs.reading import SavedRun, load_run
from fedlora_app.study import describe_percent

MLP = "[gate_proj,up_proj,down_proj]"
VARIANTS = {
    "nothing": "",
    "gate": "adapters.gate=prompt",
    "kept share 0.8": "training.local_kept_share=0.8",
    "kept share 0.5": "training.local_kept_share=0.5",
    "kept share 0.2": "training.local_kept_share=0.2",
    "replay 0.25": "training.replay=0.25",
    "replay 1": "training.replay=1",
    "replay 1, kept share 0.5": "training.replay=1 training.local_kept_share=0.5",
    "replay 1, KL 1": "training.replay=1 training.local_kl_weight=1",
    "replay 1, KL 5": "training.replay=1 training.local_kl_weight=5",
    "replay 1, kept share 0.5, KL 1": "training.replay=1 training.local_kept_share=0.5 "
    "training.local_kl_weight=1",
    "KL 1 on public records": "training.local_kl_weight=1 data.public={public}",
    "KL 5 on public records": "training.local_kl_weight=5 data.public={public}",
    "replay 1, kept share 0.5, KL 5 on public records": "training.replay=1 "
    "training.local_kept_share=0.5 training.local_kl_weight=5 data.public={public}",
    "orthogonality 30": "training.local_orthogonality=30",
    "rank 2": "adapters.local.rank=2 adapters.local.alpha={alpha_of_2}",
    "half the scale": "adapters.local.alpha={half_alpha}",
    "upper layers": "adapters.local.first_layer={upper_layer}",
    "MLP only": f"adapters.local.target_modules={MLP}",
    "replay 1, upper layers": "training.replay=1 adapters.local.first_layer={upper_layer}",
}
"""What each changes where nothing protects: no gate, no replay, no decay. Steps stay the same."""
UNPROTECTED = (
    "adapters.gate=none training.replay=0 training.max_replay_ratio=null "
    "training.local_kept_share=null training.local_weight_decay=null training.local_kl_weight=0 "
    "training.local_orthogonality=0 training.local_mixing_weight=null data.public=null"
)
UPPER = 5 / 6
"""Where the upper layers begin."""
Figures = dict[str, float]


def ablate(
    run_dir: Path, root: Path, variant: str, clients: Sequence[str] = (), public: str = ""
) -> Figures:
    """Train clients' local adapters again in another way and return their figures.

    Args:
        variant: one of ``VARIANTS``.
        clients: whose; empty: all.
        public: records that are nobody's, for the variants that use some.

    Returns:
        Exact match in [0, 1] under ``<validation or test>/<question set>``, means over the
        clients that are asked such questions, and the number of steps of a round's local phase.

    Raises:
        ConfigError: the run is not a phased one of mode dual, has no such client, or one that
            has no validation questions.
    """
    run = load_run(run_dir)
    if run.config.federated.mode != "dual" or run.config.training.schedule != "phased":
        raise ConfigError(f"{run_dir} is not a phased run of mode dual. Expected only such runs.")
    clients = clients or run.config.client_ids
    check_validation(run, clients)
    states: list[AdapterState] = []
    work_dir = run_dir / "ablation"
    shutil.rmtree(work_dir, ignore_errors=True)
    sums: dict[str, list[float]] = {}
    for client_id in clients:
        steps = count_local_steps(run, client_id)
        config = change(run, root, VARIANTS[variant], steps, public)
        states = states or load_global_states(run_dir, config, root)
        client = Client(config, client_id, work_dir, root, run.date)
        retrain(client, states)
        sums.setdefault("steps", []).append(steps)
        validated = Client(use_validation_files(config), client_id, work_dir, root, run.date)
        for part, asked in (("validation", validated), ("test", client)):
            metrics = asked.evaluate(states[-1], {LOCAL: Kept(config.federated.num_rounds)})
            for name in QUESTION_SETS:
                key = f"{adapters_label(BOTH)}/{name}/{EXACT_MATCH.reported}"
                if key in metrics:
                    sums.setdefault(f"{part}/{name}", []).append(metrics[key])
    shutil.rmtree(work_dir)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def check_validation(run: SavedRun, clients: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless all these clients are there and have validation questions."""
    data = run.config.data
    for client in map(run.config.client, clients):
        if not (data.universal_validation or data.conflict_validation or client.local_validation):
            raise ConfigError(
                f"Client {client.id} of {run.path} has no validation questions to judge a variant "
                "by: data.universal_validation, data.conflict_validation or its local_validation."
            )


def change(run: SavedRun, root: Path, overrides: str, steps: int, public: str = "") -> Config:
    """Return the run's configuration with one variant's settings, and ``steps`` in a phase."""
    local = run.config.adapters.local
    num_layers = len(decoder_layers(build_empty_model(run.config.model, root)))
    settings = overrides.format(
        half_alpha=local.alpha / 2,
        alpha_of_2=2 * local.alpha / local.rank,
        upper_layer=round(UPPER * num_layers),
        public=public,
    )
    # More epochs than there is room for: the limit on steps ends the phase.
    same = f"training.max_steps={steps} training.local_epochs={steps} evaluation.interval=0"
    changes, faults = parse_overrides(join_overrides(UNPROTECTED, settings, same))
    assert not faults, faults
    raw = run.config.dump()
    for key, value in changes.items():
        set_dotted(raw, key, value)
    return parse_config(raw, source=str(run.path))


def count_local_steps(run: SavedRun, client_id: str) -> int:
    """Return the steps of a client's local phase in the run itself."""
    for entry in read_history(run.path):
        name = "train_local/num_steps"
        if entry["client"] == client_id and name in entry["metrics"]:
            return int(entry["metrics"][name])
    raise ConfigError(f"{run.path} has no local phase of {client_id}. Expected a finished run.")


def retrain(client: Client, states: Sequence[AdapterState]) -> Metrics:
    """Train a client's local adapter from scratch against the global one of every round.

    Args:
        states: the global adapter after every round, the initial one first.

    Returns:
        The last round's metrics.
    """
    metrics: Metrics = {}
    for server_round, state in enumerate(states[1:], start=1):
        kept = {LOCAL: Kept(server_round - 1)} if server_round > 1 else {}  # a fresh one
        metrics, _ = client.personalise(server_round, state, kept)
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
            describe_percent([figures.get(f"test/{name}") for figures in runs])
            for name in QUESTION_SETS
        ]
        validation = [
            mean(figures.get(f"validation/{name}") for name in QUESTION_SETS) for figures in runs
        ]
        steps = f"{runs[0]['steps']:.0f}"
        yield f"| {variant} | {steps} | {' | '.join(cells)} | {describe_percent(validation)} |"


def name_run(run_dir: Path, folder: Path) -> str:
    """Return what tells a run's figures from another run's: its path from a folder, and its id."""
    place = os.path.relpath(run_dir, folder)
    run_id = load_run(run_dir).manifest.get(RUN_ID)  # which runs of old have not
    return f"{place}@{run_id[:12]}" if run_id else place


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished phased runs of mode dual")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="all of them")
    parser.add_argument("--public", default="", help="records that are nobody's, to take a KL on")
    parser.add_argument("--clients", nargs="+", default=[], help="whose adapters; all of them")
    arguments = parser.parse_args()
    usable = [name for name, text in VARIANTS.items() if arguments.public or "{public}" not in text]
    variants = arguments.variants or usable
    if missing := [name for name in variants if name not in usable]:
        parser.error(f"{', '.join(missing)}: name a file of records with --public")
    transformers.utils.logging.disable_progress_bar()
    root = find_project_root()
    path = arguments.runs[0].parent / "ablation.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    shown: dict[str, dict[str, Figures]] = {variant: {} for variant in variants}
    for variant in variants:
        is_public = "{public}" in VARIANTS[variant]
        of = [hash_file(root / arguments.public)[:12]] if is_public else []
        for run_dir in arguments.runs:
            by_run = results.setdefault(variant, {})
            name = ":".join([name_run(run_dir, path.parent), *arguments.clients, *of])
            if name not in by_run:
                by_run[name] = ablate(run_dir, root, variant, arguments.clients, arguments.public)
                write_json(path, results)
                print(f"{variant}, {name}: {by_run[name]}", flush=True)
            shown[variant][name] = by_run[name]
    print("\n".join(tabulate(shown)))


if __name__ == "__main__":
    main()
