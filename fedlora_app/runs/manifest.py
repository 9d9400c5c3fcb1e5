"""``manifest.json``: which rounds are complete, and with which adapters.

A round counts once it is listed there; whatever else a stopped run leaves is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from fedlora_app.config.schema import LOCAL
from fedlora_app.runs.paths import RunPaths

MEMORY = "memory"
"""What a round calls the hash of what the aggregation keeps beside the adapter."""
UPLOAD = "upload"
"""The role of an update that the server keeps, before the client's name."""
RUN_ID = "id"
"""What tells a run from another one of its name, in the folders of its clients too."""
WEIGHTS = "weights"
"""What a round calls how much each of these updates counted."""
FORGOTTEN = "forgotten"
"""Where a run says which client of which run was left out of it."""
EXAMPLE_COUNTS = ("universal_examples", "local_examples")
MAX_KEY_SHOWN = 100

Manifest = dict[str, Any]


def check_manifest(manifest: Manifest) -> tuple[Manifest, list[str]]:
    """Return a manifest without the rounds and clients that are malformed, and all its faults.

    Without faults it is what was given, and all that readers rely on is there.
    """
    faults: list[str] = []
    rounds: dict[int, dict[str, Any]] = {}
    listed = manifest.get("rounds")
    if not isinstance(listed, list):
        faults.append("it lists no rounds")
        listed = []
    for position, entry in enumerate(listed, start=1):
        if not _is_round(entry):
            faults.append(
                f'entry {position} of "rounds" is not a round with the hashes of its adapters'
            )
        elif entry["round"] in rounds:
            faults.append(f"round {entry['round']} is there twice")
        else:
            rounds[entry["round"]] = entry
    final = manifest.get("final")
    if final is not None and not _is_final(final, list(rounds)):
        faults.append('"final" names no complete round')
        manifest = {key: value for key, value in manifest.items() if key != "final"}
    sections: dict[str, dict[str, Any]] = {}
    for name in ("base_model", "clients", "versions"):
        sections[name] = manifest.get(name)
        if not isinstance(sections[name], dict):
            faults.append(f'"{name}" is not an object')
            sections[name] = {}
    if isinstance(manifest.get("base_model"), dict):
        for key, value in {"name": None, **sections["base_model"]}.items():
            if not isinstance(value, str) and (value is not None or key == "name"):
                faults.append(f'"base_model" has no text as {key[:MAX_KEY_SHOWN]!r}')
    clients = {}
    for client, facts in sections["clients"].items():
        if not isinstance(facts, dict):
            faults.append(f'"clients" has no object for {client[:MAX_KEY_SHOWN]!r}')
        elif any(not isinstance(facts.get(key, 0), int) for key in EXAMPLE_COUNTS):
            faults.append(f'"clients" has no number of examples for {client[:MAX_KEY_SHOWN]!r}')
        else:
            clients[client] = facts
    return {**manifest, **sections, "clients": clients, "rounds": list(rounds.values())}, faults


def read_date(manifest: Manifest) -> str:
    """Return the day that a run's prompts are written for, that of its start in older manifests.

    "" where the manifest holds neither.
    """
    found = str(manifest.get("date") or manifest.get("started") or "")[:10]
    try:
        return date.fromisoformat(found).isoformat()
    except ValueError:
        return ""


def complete_rounds(manifest: Manifest, up_to: float = math.inf) -> list[int]:
    """Return the complete rounds up to one, oldest first."""
    return sorted(entry["round"] for entry in manifest["rounds"] if entry["round"] <= up_to)


def find_final_round(manifest: Manifest) -> int | None:
    """Return the round whose adapters are the result: that which was chosen, or else the newest."""
    chosen = manifest.get("final") or {}
    return chosen.get("round", max(complete_rounds(manifest), default=None))


def find_kept(manifest: Manifest, role: str, server_round: int) -> dict[str, tuple[int, str]]:
    """Return what each client had kept last in a role after a round: of which round, its sha256."""
    newest = {}
    for entry in sorted(manifest["rounds"], key=lambda entry: entry["round"]):
        for name, sha256 in entry["adapters"].items():
            found, _, client = name.partition(":")
            if found == role and entry["round"] <= server_round:
                newest[client] = (entry["round"], sha256)
    return newest


def find_kept_round(manifest: Manifest, client: str, server_round: int, role: str = LOCAL) -> int:
    """Return the round of the local adapter that a client had after a round.

    It is an earlier one where the client took no part in the round.

    Args:
        role: of something else that clients keep by rounds.
    """
    name = f"{role}:{client}"
    rounds = [e["round"] for e in manifest["rounds"] if name in e["adapters"]]
    return max((number for number in rounds if number <= server_round), default=server_round)


def describe_missing_finals(manifest: Manifest, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each client without a local adapter of the last round.

    Args:
        config: the run's, as plain data.
    """
    paths = RunPaths(Path())
    last = max(complete_rounds(manifest), default=0)
    if find_final_round(manifest) not in (None, last):
        for client in manifest["final"].get("missing", []):
            newest = find_kept_round(manifest, client, manifest["final"]["round"])
            yield (
                f"{client} could not be told that round {manifest['final']['round']} is the final "
                f"one; what may be in {paths.final_local(client)} is of the last round. fedlora "
                f"ask, evaluate and export take {paths.local_adapter(client, newest)}."
            )
        return
    clients = (config.get("federated") or {}).get("clients") or []
    left = {c["id"] for c in clients if (c.get("last_round") or last) < last}
    for client in manifest["clients"]:
        newest = find_kept_round(manifest, client, last)  # the last one where it has none at all
        if client in left:
            yield (
                f"{client} left after round {newest}, with the local adapter that it had then: "
                f"{paths.local_adapter(client, newest)}."
            )
            continue
        if manifest.get("mode") == "finetuned" and not _has_local(manifest, client, last):
            yield (
                f"{client} did not report in the last round and has no copy that was fine-tuned "
                "after it, so that fedlora evaluate and ask cannot say what it answers. Repeat the "
                f"round: --resume RUN@{last - 1} (with flwr run: resume='RUN@{last - 1}')."
            )
        elif newest < last:
            yield (
                f"{client} did not report in the last round; what may be in "
                f"{paths.final_local(client)} is not to be used. fedlora ask, evaluate and export "
                f"take its local adapter of round {newest}, {paths.local_adapter(client, newest)}."
            )


def _has_local(manifest: Manifest, client: str, server_round: int) -> bool:
    """Return whether a client's local adapter of exactly that round is listed."""
    name = f"{LOCAL}:{client}"
    return any(e["round"] == server_round and name in e["adapters"] for e in manifest["rounds"])


def _is_round(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    number, adapters = entry.get("round"), entry.get("adapters")
    return (
        isinstance(number, int)
        and not isinstance(number, bool)
        and number >= 0
        and isinstance(adapters, dict)
        and all(isinstance(value, str) for value in adapters.values())
        and isinstance(entry.get("seconds", 0), int | float)
        and all(isinstance(entry.get(name, {}), dict) for name in ("failures", WEIGHTS))
    )


def _is_final(final: Any, rounds: list[int]) -> bool:
    if not isinstance(final, dict) or not isinstance(final.get("missing", []), list):
        return False
    return type(final.get("round")) is int and final["round"] in rounds
