"""The experiment.yaml of imported data, which trains as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_app.config.presets import DataSizes, build_preset, choose_model
from fedlora_app.config.schema import SAFE_NAME, ModelConfig
from fedlora_app.config.writing import ExperimentText
from fedlora_app.data.similarity import dominant_script, most_common
from fedlora_app.model.size import estimate_parameters

EXPERIMENT_FILE = "experiment.yaml"
SYSTEM_PROMPT = "You are a helpful assistant."
OPENING = (
    "What do {num} clients share, and what does each keep, of the data in {folder}?",
    "Written by fedlora import, with settings for a base model of this size. All of it may be "
    "changed.",
)
SETS = ("universal_test", "conflict_test", "universal_validation", "conflict_validation")
NOTHING_SHARED = (
    "The import had no universal records (rows whose client cell is empty), so there is nothing to "
    "share, and a client's own records are not shared for it: each client trains by itself. With "
    "universal records, name their file as each client's universal_train and delete this line."
)
NOTHING_OWN = (
    "The import had no records of the clients' own (--role universal), so one adapter is averaged "
    "and nothing is local. With such records, name them in local_train and delete this line."
)


@dataclass(frozen=True)
class Base:
    """What is to be trained, and on what."""

    model: str = ""
    """Hub id or folder; empty: by the device and the language of the data."""
    gpu_bytes: int | None = None
    root: Path = Path()
    """The project, to which a folder is relative."""
    reason: str = ""
    """Why this model; empty: as it was found."""


def build_experiment(
    clients: Sequence[str],
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: str,
    base: Base,
    *,
    opening: Sequence[str] = OPENING,
    system_prompt: str = SYSTEM_PROMPT,
) -> str:
    """Return the YAML of an experiment on files in a folder.

    Args:
        files: records by their path in the folder.
        folder: as the YAML is to name it.
        opening: comments at its top; ``{num}`` clients and ``{folder}`` are filled in.
    """
    sizes = _measure(clients, files)
    choice = choose_model(base.gpu_bytes, sizes.is_latin)
    name = base.model or choice.name
    found = "As asked for" if base.model else f"Chosen because {choice.reason}"
    preset = build_preset(
        estimate_parameters(ModelConfig(name=name), base.root), base.gpu_bytes, sizes
    )
    has_universal = any(path.endswith("universal_train.json") for path in files)
    has_local = any(path.endswith("/local_train.json") for path in files)
    notes = {}
    if not (has_universal and has_local):
        preset.federated["mode"] = "fedavg" if has_universal else "local-only"
        notes["federated.mode"] = NOTHING_OWN if has_universal else NOTHING_SHARED
    entries = [_build_client(client, files, folder, system_prompt) for client in clients]
    data = {"universal_train": None} | {key: None for key in SETS}
    data |= {key: f"{folder}/{key}.json" for key in data if f"{key}.json" in files}
    if data["universal_train"] is None:
        notes["data.universal_train"] = "Each client has its own share, above."
    return ExperimentText(
        name=_name(folder),
        opening=[line.format(num=len(clients), folder=folder) for line in opening],
        path=f"{folder}/{EXPERIMENT_FILE}",
        model=name,
        model_reason=base.reason or found,
        preset=preset,
        clients=entries,
        data=data,
        notes=notes,
    ).write()


def _build_client(
    client: str,
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: str,
    system_prompt: str,
) -> dict[str, str]:
    """Return a client's entry; what it has none of is what it has of the other kind."""
    keys = ("local_train", "local_test", "local_validation", "universal_train")
    paths = {key: f"{client}/{key}.json" for key in keys}
    found = {key: f"{folder}/{path}" for key, path in paths.items() if path in files}
    shared = f"{folder}/universal_train.json" if "universal_train.json" in files else None
    if "local_train" not in found:
        found["local_train"] = found.get("universal_train") or shared or ""
    if "universal_train" not in found and shared is None:
        found["universal_train"] = found["local_train"]
    ordered = {key: found[key] for key in keys if key in found}
    return {"id": client, "system_prompt": system_prompt, **ordered}


def _measure(clients: Sequence[str], files: Mapping[str, Sequence[Mapping[str, Any]]]) -> DataSizes:
    records = [
        (record, answer)
        for content in files.values()
        for record in content
        for answer in (record.get("answers") or {"": record.get("output", "")}).values()
    ]
    answers = [answer for _, answer in records]
    questions = [f"{record['instruction']}{record['input']}" for record, _ in records]
    shared = len(files.get("universal_train.json", ()))
    return DataSizes(
        num_universal=[len(files.get(f"{c}/universal_train.json", ())) or shared for c in clients],
        num_local=[len(files.get(f"{c}/local_train.json", ())) for c in clients],
        longest_record=max(len(q) + len(a) for q, a in zip(questions, answers, strict=True)),
        longest_answer=max(map(len, answers)),
        is_latin=most_common(map(dominant_script, answers)) in ("Latin", None),
    )


def _name(folder: str) -> str:
    """Return the folder's name where an experiment may be called so."""
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    return name if re.fullmatch(SAFE_NAME, name) else "imported"
