"""Run directories of any size, made of numbers that no training stands behind."""

from __future__ import annotations

import json
import random
from pathlib import Path

from conftest import build_tiny_config

from fedlora_app.evaluation.statistics import proportion

GOOD_GATE = {
    "gate/by_fact": 1.0,
    "gate/purity": 0.6,
    "gate/opens_for_local": 0.93,
    "gate/closes_for_universal": 1.0,
    "gate/closes_for_unknown": 0.84,
}
BAD_GATE = {
    "gate/by_fact": 0.0,
    "gate/purity": 0.55,
    "gate/opens_for_local": 0.61,
    "gate/closes_for_universal": 0.9,
}
SETS = {"universal": 20, "universal_unseen": 8, "local": 10, "conflict": 12}


def write_run(
    folder: Path,
    num_clients: int = 3,
    num_rounds: int = 4,
    num_conflicts: int = 12,
    *,
    mode: str = "dual",
    evaluated: bool = True,
    question: str = "Tell me the rule number {}.",
    right: float = 0.9,
    gated: bool = False,
) -> Path:
    """Write what a run of that size leaves, but for its adapters.

    Args:
        gated: with a gate, which separates badly at the first client.
    """
    clients = [f"client-{index:02d}" for index in range(num_clients)]
    folder.mkdir(parents=True)
    config = build_tiny_config().dump()
    config["federated"] |= {
        "mode": mode,
        "num_rounds": num_rounds,
        "clients": [config["federated"]["clients"][0] | {"id": client} for client in clients],
    }
    rng = random.Random(folder.name)
    answering = {"dual": "global+local", "local-only": "local"}.get(mode, "global")
    _write(folder / "config.json", config)
    _write(folder / "manifest.json", _manifest(clients, num_rounds, mode))
    _write(folder / "history.json", _history(clients, num_rounds, num_conflicts, answering, rng))
    if evaluated:
        evaluation = _evaluation(
            folder.name, clients, num_rounds, num_conflicts, mode, answering, question, right, rng
        )
        if gated:
            _add_openness(evaluation, clients, rng)
        _write(folder / "evaluation.json", evaluation)
    if gated:
        history = json.loads((folder / "history.json").read_text())
        for entry in history:
            if entry["phase"] == "evaluate" and entry["round"]:
                is_first = entry["client"] == clients[0]
                entry["metrics"] |= BAD_GATE if is_first else GOOD_GATE
        _write(folder / "history.json", history)
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _add_openness(evaluation: dict, clients: list[str], rng: random.Random) -> None:
    """Add universal and local questions, and to every one how far the gate opened."""
    first = evaluation["questions"][0]
    for name, size in (("universal", 20), ("local", 10)):
        for client in clients:
            for record in range(size):
                gold = f"The {name} answer {record}."
                is_right = rng.random() < 0.8
                answer = {"gold": gold, "generated": gold if is_right else "Another."}
                text = f"What is {name} question {record}?"
                place = {"client": client, "record": record, "question_set": name}
                evaluation["questions"].append(
                    first
                    | place
                    | answer
                    | {"instruction": text, "candidates": [gold, "Another."]}
                    | {"scores": {"log_likelihoods": [-1.0, -2.0]}}
                    | {"is_unseen": name == "universal" and record >= 12}
                    | {"exact_match": is_right, "correct": is_right}
                )
    for row in evaluation["questions"]:
        is_own = row["question_set"] != "universal"
        is_open = is_own if rng.random() < 0.9 else not is_own
        row["gate"] = 0.5 + (0.5 if is_open else -0.5) * rng.random() ** 0.2
        row["failed"] = None
        if not row["exact_match"]:
            right_side = "local" if is_own else "global"
            row["failed"] = right_side if is_open == is_own else "gate"


def _manifest(clients: list[str], num_rounds: int, mode: str) -> dict:
    return {
        "format": 1,
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T01:00:00Z",
        "seed": 7,
        "mode": mode,
        "base_model": {"name": "model", "fingerprint": "f" * 64},
        "git_commit": "0" * 40,
        "versions": {"torch": "2.13.0"},
        "clients": {
            c: {"universal_examples": 10, "local_examples": 5, "device": "CPU", "findings": []}
            for c in clients
        },
        "rounds": [
            {"round": n, "seconds": 12.5, "adapters": {"global": "a" * 64}}
            for n in range(num_rounds + 1)
        ],
    }


def _history(clients, num_rounds, num_conflicts, answering, rng) -> list[dict]:
    history = []
    for number in range(num_rounds + 1):
        label = answering if number else "base"
        for client in clients:
            if number:
                training = {"train_loss": 1 / number, "seconds": 3.0, "num_steps": 4}
                metrics = {f"train_global/{key}": value for key, value in training.items()}
                metrics |= {"update_norm": 2 / number, "train_global/peak_memory_bytes": 5e8}
                history.append(_entry(number, client, "global", metrics))
                traffic = {"bytes_down": 720_000, "bytes_up": 360_000}
                history.append(_entry(number, client, "traffic", traffic))
            metrics = {"evaluation_seconds": 1.0}
            for name, size in SETS.items():
                share = min(1.0, number / num_rounds)
                metrics[f"{label}/{name}/n"] = metrics[f"{label}/{name}/n_ranked"] = size
                metrics[f"{label}/{name}/exact_match"] = round(share * size) / size
                metrics[f"{label}/{name}/rank_accuracy"] = round(share * size) / size
            if number in (0, num_rounds):
                verdicts = [int(number > 0 and rng.random() < 0.99) for _ in range(num_conflicts)]
                metrics[f"{label}/conflict/exact_match_each"] = verdicts
                metrics[f"{label}/conflict/ranked_first_each"] = verdicts
            history.append(_entry(number, client, "evaluate", metrics))
        if number:
            aggregate = {"aggregation_error": 0.1 / number, "aggregation_seconds": 0.5}
            history.append(_entry(number, "(server)", "aggregate", aggregate))
    return history


def _entry(number: int, client: str, phase: str, metrics: dict) -> dict:
    return {"round": number, "client": client, "phase": phase, "metrics": metrics}


def _evaluation(
    name, clients, num_rounds, num_conflicts, mode, answering, question, right, rng
) -> dict:
    swap_table, questions = [], []
    for position, client in enumerate(clients):
        others = [clients[(position + step) % len(clients)] for step in (1, 2, 3)]
        who = ["base", "global", f"local:{client}", f"{answering}:{client}"]
        who += [f"{answering}:{other}" for other in dict.fromkeys(others) if other != client]
        if answering == "global":
            who = ["base", "global"]
        for adapters in who:
            share = {"base": 0.1, "global": 0.2}.get(adapters, right)
            for set_name, n in SETS.items():
                value = round((share if client in adapters else share / 2) * n) / n
                swap_table.append(
                    {
                        "question_set": set_name,
                        "client": client,
                        "adapters": adapters,
                        "scale": 1.0,
                        "accuracy": value,
                        "n": n,
                        "exact_match": value,
                        "n_generated": n,
                    }
                )
        for record in range(num_conflicts):
            is_right = rng.random() < right
            gold = f"{client} answers {record}."
            questions.append(
                {
                    "question_set": "conflict",
                    "client": client,
                    "record": record,
                    "fact": None,
                    "is_unseen": False,
                    "instruction": question.format(record),
                    "adapters": f"{answering}:{client}",
                    "scale": 1.0,
                    "gold": gold,
                    "candidates": [f"{other} answers {record}." for other in clients],
                    "scores": {"log_likelihoods": [-1.0 - i for i in range(len(clients))]},
                    "generated": gold if is_right else "Something else.",
                    "correct": is_right,
                    "exact_match": is_right,
                    "keyword": None,
                }
            )
    by_record: dict[int, list[bool]] = {}
    for row in questions:
        by_record.setdefault(row["record"], []).append(row["exact_match"])
    passes = proportion([all(verdicts) for verdicts in by_record.values()]).dump()
    curve = [
        {"scale": s, **dict.fromkeys(("universal", "local", "conflict"), s / 2)}
        | dict.fromkeys(
            ("universal_exact_match", "local_exact_match", "conflict_exact_match"), s / 2
        )
        for s in (0.5, 1.0, 1.5)
    ]
    return {
        "format": 1,
        "run": name,
        "mode": mode,
        "seed": 7,
        "round": num_rounds,
        "settings": "s",
        "answering": answering,
        "base_model": {"name": "model", "fingerprint": "f" * 64},
        "files": {
            client: {"universal": "u", "local": client, "conflict": "c"} for client in clients
        },
        "system_prompts": dict.fromkeys(clients, "You are ann."),
        "num_steps": 8,
        "num_parameters": {"global": 100, "local": 50},
        "summary": {
            "conflict_pass_rate": passes,
            "conflict_pass_rate_exact_match": passes,
        },
        "scales": {c: {"chosen": 1.0, "curve": curve} for c in clients} if mode == "dual" else {},
        "swap_table": swap_table,
        "questions": questions,
        "notes": [],
        "warnings": [],
    }
