"""What a round takes beside its training steps, and what loading anew would take instead.

First: a real federation whose clients train for a given time in each phase. From its history, for
every round but the first: the round's time less what the clients' phases and evaluations took.
Evaluated is only before the first round and after the last one.

Second, in turn: what the project does before a phase (the resident base, both adapters' weights set
anew) against a template that loads base and tokenizer and rebuilds the adapters.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.turns import compute_ratio, describe_ratio, take_turns, timed
from benchmarks.two_processes import build_project, federate, start_client_process
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.model.adapters import (
    AdaptedModel,
    attach_adapters,
    attach_once,
    get_state,
    set_state,
)
from fedlora_app.model.base import load_base_model
from fedlora_app.runs.history import read_history

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "max_position_embeddings": 256,
}
NEVER = 10**6
RESIDENT, ANEW = "resident base", "loaded anew"


def measure(
    phase_seconds: float = 20.0,
    num_rounds: int = 3,
    num_turns: int = 5,
    copies: int = 50,
    rank: int = 16,
    **sizes: int,
) -> dict[str, Any]:
    """Run the federation, and then the two ways to prepare a phase in turn.

    Args:
        phase_seconds: about how long a client is to train in each phase.
        num_rounds: at least 2; the first one does not count.
        copies: of the four training records.
    """
    adapter = {"rank": rank, "alpha": 2 * rank}
    settings = {"batch_size": 16, "gradient_accumulation_steps": 1, "learning_rate": 1e-4}
    with tempfile.TemporaryDirectory() as folder, start_client_process(folder) as (pipe, _):
        project = Path(folder)

        def build(rounds: int, epochs: tuple[int, int]) -> Config:
            return build_project(
                project,
                copies=copies,
                model=MODEL | sizes,
                adapters={"global": adapter, "local": adapter},
                training=settings | {"global_epochs": epochs[0], "local_epochs": epochs[1]},
                federated={"num_rounds": rounds},
                evaluation={"interval": NEVER, "batch_size": 8, "max_new_tokens": 8},
            )

        trial = read_history(federate(project, build(2, (1, 1)), pipe, name="trial"))
        one_epoch = [
            statistics.mean(_values(trial, f"train_{name}/seconds", from_round=2))
            for name in (GLOBAL, LOCAL)
        ]
        epochs = [math.ceil(phase_seconds / seconds) for seconds in one_epoch]
        config = build(num_rounds, tuple(epochs))
        history = read_history(federate(project, config, pipe, name="long"))
        seconds = take_turns(_ways_to_prepare(project, config), num_turns)
    rounds = [_split_round(history, number) for number in range(2, num_rounds + 1)]
    saved = [anew - kept for anew, kept in zip(seconds[ANEW], seconds[RESIDENT], strict=True)]
    return {
        "compared": "a round's seconds with those of its clients' phases and evaluations",
        "num_clients": len(config.federated.clients),
        "num_rounds": num_rounds,
        "first_round_counted": 2,
        "mean_phase_seconds": round(statistics.mean(r["mean_phase_seconds"] for r in rounds), 2),
        "adapter_bytes": _values(history, "adapter_bytes_up", from_round=1)[0],
        "overhead_share": {
            "value": round(statistics.median(r["overhead_share"] for r in rounds), 5),
            "low": round(min(r["overhead_share"] for r in rounds), 5),
            "high": round(max(r["overhead_share"] for r in rounds), 5),
            "n": len(rounds),
        },
        "overhead_seconds_per_client": round(
            statistics.median(r["overhead_seconds_per_client"] for r in rounds), 4
        ),
        "rounds": rounds,
        "prepare_milliseconds": {
            name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()
        },
        "loaded_anew_to_resident": compute_ratio(seconds[ANEW], seconds[RESIDENT]),
        "seconds_saved_per_client_and_round": round(statistics.median(saved), 4),
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the shares and the two ways as tables."""
    share = figures["overhead_share"]
    prepare = figures["prepare_milliseconds"]
    ratio = describe_ratio(figures["loaded_anew_to_resident"])
    lines = [
        f"{figures['num_clients']} clients, phases of {figures['mean_phase_seconds']:.1f} s each, "
        "rounds after the first",
        "",
        "| round | seconds | phases | evaluation | neither |",
        "|---|---|---|---|---|",
        *(
            f"| {r['round']} | {r['round_seconds']:.2f} | {r['phase_seconds']:.2f} "
            f"| {r['evaluation_seconds']:.2f} | {r['overhead_share']:.2%} |"
            for r in figures["rounds"]
        ),
        "",
        f"Beside training and evaluation: {share['value']:.2%} [{share['low']:.2%}, "
        f"{share['high']:.2%}] of a round, {figures['overhead_seconds_per_client']:.2f} s a "
        "client.",
        "",
        "| before each message with an adapter | ms |",
        "|---|---|",
        f"| {RESIDENT}, adapters set | {prepare[RESIDENT]:.1f} |",
        f"| base, tokenizer and adapters {ANEW} | {prepare[ANEW]:.1f}, {ratio} times |",
    ]
    return "\n".join(lines)


def _values(history: list[dict[str, Any]], metric: str, from_round: int) -> list[float]:
    return [
        entry["metrics"][metric]
        for entry in history
        if entry["round"] >= from_round and metric in entry["metrics"]
    ]


def _split_round(history: list[dict[str, Any]], number: int) -> dict[str, float]:
    entries = [entry for entry in history if entry["round"] == number]
    phases = [
        seconds
        for name in (GLOBAL, LOCAL)
        for seconds in _values(entries, f"train_{name}/seconds", number)
    ]
    evaluation = sum(_values(entries, "evaluation_seconds", number))
    (total,) = _values(entries, "round_seconds", number)
    num_clients = len(_values(entries, "evaluation_seconds", number))
    overhead = total - sum(phases) - evaluation
    return {
        "round": number,
        "round_seconds": total,
        "phase_seconds": sum(phases),
        "mean_phase_seconds": statistics.mean(phases),
        "evaluation_seconds": evaluation,
        "overhead_share": overhead / total,
        "overhead_seconds_per_client": overhead / num_clients,
    }


def _ways_to_prepare(project: Path, config: Config) -> dict[str, Any]:
    loaded = load_base_model(config.model, project)
    model = attach_once(loaded, config.adapters)
    states = {name: get_state(model, name) for name in (GLOBAL, LOCAL)}

    def fill(adapted: AdaptedModel) -> None:
        for name, state in states.items():
            set_state(adapted, name, state)

    def prepare_resident() -> None:
        fill(attach_once(load_base_model(config.model, project), config.adapters))

    def prepare_anew() -> None:
        folder = project / config.model.name
        base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        AutoTokenizer.from_pretrained(folder)
        fill(attach_adapters(base, config.adapters))

    return {RESIDENT: timed(prepare_resident), ANEW: timed(prepare_anew)}
