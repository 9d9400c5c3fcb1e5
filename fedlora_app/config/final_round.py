"""Why a run cannot choose its final round by validation, on raw data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora_app.config.private import is_bare

SETS = ("universal_validation", "conflict_validation")


def has_validation(raw: Mapping[str, Any]) -> bool:
    """Return whether there are validation questions, or may be some at a client's own place."""
    federated, data = (
        raw[name] if isinstance(raw.get(name), Mapping) else {} for name in ("federated", "data")
    )
    clients = federated.get("clients")
    clients = [c for c in clients if isinstance(c, Mapping)] if isinstance(clients, list) else []
    has_own = any(c.get("local_validation") is not None or is_bare(c) for c in clients)
    return has_own or any(data.get(name) is not None for name in SETS)


def find_final_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """Find what ``federated.final: best`` cannot be had with."""
    federated, training, evaluation = (
        raw[name] if isinstance(raw.get(name), Mapping) else {}
        for name in ("federated", "training", "evaluation")
    )
    if federated.get("final") != "best":
        return
    if not has_validation(raw):
        yield (
            "federated.final: best is chosen on validation questions, and there are none. Name a "
            "file in data.universal_validation, data.conflict_validation or a client's "
            "local_validation, or set it to last."
        )
    if evaluation.get("interval") == 0:
        yield (
            "federated.final: best is one of the rounds that are evaluated, and with "
            "evaluation.interval 0 none is. Set that to 1 or more, or federated.final to last."
        )
    keep_rounds, num_rounds = federated.get("keep_rounds"), federated.get("num_rounds", 5)
    if isinstance(keep_rounds, int) and isinstance(num_rounds, int) and keep_rounds < num_rounds:
        yield (
            f"federated.final: best may be any round's adapters, and federated.keep_rounds keeps "
            f"those of {keep_rounds} of {num_rounds}. Set that to null, or federated.final to last."
        )
    mode = federated.get("mode", "dual")
    is_joint = mode == "dual" and training.get("schedule") == "joint"
    if mode == "finetuned" or is_joint:
        what = "training.schedule joint" if is_joint else "mode finetuned"
        yield (
            f"federated.final: best needs rounds with adapters to answer with, and in {what} the "
            "local ones are fitted to a global one in the last round alone. Set it to last."
        )
