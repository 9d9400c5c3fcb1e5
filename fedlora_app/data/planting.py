"""A copy of clients' training files with canaries in them, and an experiment that trains on it.

What comes out is a folder: for each client its files, ``canaries.json`` beside them, and an
``experiment.yaml`` that is the given one but for these paths. The originals are only read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import Config, ConfigError
from fedlora_app.data.canaries import (
    CANARIES_FILE,
    ROLES,
    Canary,
    describe_canaries,
    draw_canaries,
)
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
from fedlora_app.data.importing.folder import UNSEEN_BY_GIT, name_folder, refuse_taken
from fedlora_app.data.records import (
    FIELDS,
    DataError,
    RecordFile,
    parse_record,
    read_json_records,
    refuse_repeated_keys,
)
from fedlora_app.data.tokens import encode_example
from fedlora_app.foundation.files import hash_file, make_private_dir, new_folder, write_json
from fedlora_app.foundation.terminal import shell
from fedlora_app.model.pretrained import ModelNotHereError
from fedlora_app.model.tokenizer import load_tokenizer

OPENING = """\
# How much of made-up secrets does this experiment remember, and where?
#
#   fedlora train {path}
#   fedlora attack latest
#
# Written by fedlora check --plant from {source}: its clients train on copies of their files with
# {count} canaries in each, which {canaries} beside them lists.
"""
NO_UPLOADS = (
    "Updates are not kept, so that only the adapters can be asked: this experiment does not allow "
    "federated.keep_uploads."
)


@dataclass(frozen=True)
class Planted:
    """What was written."""

    path: Path
    """Of the experiment."""
    num_canaries: int
    note: str = ""


def plant_canaries(
    config: Config,
    root: Path,
    output: Path,
    count: int,
    *,
    clients: Sequence[str] = (),
    roles: Sequence[str] = ROLES,
    source: str = "",
) -> Planted:
    """Write copies of training files with ``count`` canaries at the end of each.

    Args:
        root: the project, to which paths in the experiment are relative where they lie in it.
        output: a folder that is empty or not there; it is whole afterwards, or absent.
        clients: whose files; none named: everybody's.
        roles: which of their files, local, universal or both.
        source: what the experiment was read from, for a comment.

    Raises:
        ConfigError: a client is not known, or its own settings are not here.
        DataError: a file is missing or has faults, holds canaries already, or the folder is taken.
    """
    chosen = [config.client(client).id for client in clients] or config.client_ids
    refuse_taken(output)
    found = load_all_files(config, root)
    folder, seed = name_folder(output, root), config.experiment.seed
    files: dict[tuple[str, str], RecordFile] = {
        (client, role): getattr(found[client], role)
        for client in dict.fromkeys(chosen)
        for role in ROLES
        if role in roles
    }
    canaries = {place: draw_canaries(seed, config.client_ids, *place, count) for place in files}
    for place, file in files.items():
        _require_unplanted(file, canaries[place])
    _require_room(config, root, canaries)
    changed, note = _change(config, files, folder)
    text = OPENING.format(
        path=shell(f"{folder}/{EXPERIMENT_FILE}"),
        source=source or config.experiment.name,
        count=count,
        canaries=CANARIES_FILE,
    )
    text += yaml.safe_dump(changed, allow_unicode=True, sort_keys=False)
    _write(output, seed, files, canaries, {EXPERIMENT_FILE: text, **UNSEEN_BY_GIT})
    return Planted(output / EXPERIMENT_FILE, sum(map(len, canaries.values())), note)


def _write(
    output: Path,
    seed: int,
    files: Mapping[tuple[str, str], RecordFile],
    canaries: Mapping[tuple[str, str], Sequence[Canary]],
    texts: Mapping[str, str],
) -> None:
    folder = output.resolve()
    make_private_dir(folder.parent)
    with new_folder(folder) as partial:
        partial.chmod(0o700)
        for client in dict.fromkeys(client for client, _ in files):
            place = partial / client
            make_private_dir(place)
            written = {}
            for role in (role for owner, role in files if owner == client):
                own = canaries[client, role]
                name = _name(role)
                write_json(place / name, _read_valid(files[client, role]) + _records(own))
                written[name] = (hash_file(place / name), own)
            write_json(place / CANARIES_FILE, describe_canaries(seed, written))
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def _change(
    config: Config, files: Mapping[tuple[str, str], RecordFile], folder: str
) -> tuple[dict[str, Any], str]:
    """Return the experiment on the copies, which keeps updates if it can, and what it cannot.

    What was left out of the given file is left out here too, and has its default.
    """
    raw = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for entry in raw["federated"]["clients"]:
        for client, role in files:
            if entry["id"] == client:
                entry[f"{role}_train"] = f"{folder}/{client}/{_name(role)}"
    keeping = raw | {"federated": raw["federated"] | {"keep_uploads": True}}
    try:
        parse_config(keeping)
    except ConfigError:
        return raw, NO_UPLOADS
    return keeping, ""


def _require_unplanted(file: RecordFile, canaries: Sequence[Canary]) -> None:
    """Raise ``DataError`` where a file asks about a case already."""
    asked = {canary.record.instruction for canary in canaries}
    for number, record in enumerate(file.records, start=1):
        if record.instruction in asked:
            raise DataError(
                f"{file.path}, record {number} asks what a canary would ask, so it seems to hold "
                "canaries already. Plant in the original file."
            )


def _require_room(
    config: Config, root: Path, canaries: Mapping[tuple[str, str], Sequence[Canary]]
) -> None:
    """Raise ``DataError`` where training would cut a secret off, if the tokenizer is here."""
    try:
        tokenizer = load_tokenizer(config.model, root)
    except ModelNotHereError:
        return
    limit = config.training.max_seq_length
    for (client, _), own in canaries.items():
        prompt = config.client(client).system_prompt
        longest = max(len(encode_example(tokenizer, prompt, c.record).input_ids) for c in own)
        if longest > limit:
            raise DataError(
                f"training.max_seq_length: a canary of {client} has {longest} tokens with its "
                f"system prompt, and training would cut it at {limit}. Raise it to {longest}."
            )


def _read_valid(file: RecordFile) -> list[Any]:
    """Return a file's records as they stand there, without those that training drops."""
    raw_records, _ = read_json_records(file.path)
    return [raw for raw in raw_records if _is_valid(raw)]


def _is_valid(raw: Any) -> bool:
    try:
        refuse_repeated_keys(raw, FIELDS)
        parse_record(raw)
    except (ValueError, AttributeError):  # the latter: it is no object
        return False
    return True


def _records(canaries: Sequence[Canary]) -> list[dict[str, str]]:
    fields = ("instruction", "input", "output")
    return [{name: asdict(canary.record)[name] for name in fields} for canary in canaries]


def _name(role: str) -> str:
    return f"{role}_train.json"
