"""Resuming a run that stopped: what it left, and whether that still fits.

A run resumes after its last complete round, with the configuration that it kept. Whatever would
make the rest differ from what an undisturbed run gives is refused before anything is loaded.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import parse_config
from fedlora_app.config.run_config import format_run_config
from fedlora_app.config.schema import GLOBAL, Config, ConfigError
from fedlora_app.foundation.project import hash_package
from fedlora_app.runs.history import read_rounds
from fedlora_app.runs.manifest import FORGOTTEN, MEMORY, complete_rounds, find_kept
from fedlora_app.runs.paths import RunDirectoryError, RunPaths, list_rounds
from fedlora_app.runs.reading import SavedRun, load_run

FRESH = -1
"""The round after which a run resumes that has not completed a single one."""
MAY_CHANGE = (
    *(f"federated.{k}" for k in ("num_rounds", "keep_rounds", "min_clients", "clients_at_once")),
    *(f"federated.{k}" for k in ("client_timeout_seconds", "reconnect_seconds", "share_gpu")),
    "experiment.track",
    "training.gradient_checkpointing",
    *(f"evaluation.{k}" for k in ("batch_size", "max_new_tokens", "interval", "protocol")),
    *("evaluation.local_scales", "evaluation.sample"),
)
"""Settings that change nothing of what the rounds to come train."""
DATA_HASH = "sha256/"


@dataclass(frozen=True)
class Resumption:
    """A stopped run, the round after which it resumes, and the configuration for that."""

    saved: SavedRun
    after_round: int
    config: Config

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The manifest's rounds that count."""
        return [e for e in self.saved.manifest["rounds"] if e["round"] <= self.after_round]

    def find_kept(self, role: str) -> dict[str, tuple[int, str]]:
        """Return what each client has kept last in a role: the round that it is of, its sha256."""
        return find_kept(self.saved.manifest, role, self.after_round)

    @property
    def evaluated_clients(self) -> set[str]:
        """Who evaluated the round after which the run resumes."""
        entries = read_rounds(self.saved.path, {self.after_round})
        return {entry["client"] for entry in entries if entry["phase"] == "evaluate"}

    def with_changes(self, given: Config, num_rounds: int | None) -> Resumption:
        """Return the resumption with what may change (``MAY_CHANGE``) taken from a configuration.

        Raises:
            ConfigError: something else differs, or a number of rounds that num-rounds does not say.
        """
        require_same_settings(self.config, given)
        rounds = given.federated.num_rounds
        if num_rounds is None and rounds != self.config.federated.num_rounds:
            raise ConfigError(
                f"resume: the run has {self.config.federated.num_rounds} rounds and {rounds} are "
                f"given. To change them: --rounds {rounds} (with flwr run: num-rounds={rounds})."
            )
        raw, values = self.config.dump(), given.dump()
        for section, name in (key.split(".") for key in MAY_CHANGE):
            raw[section][name] = values[section][name]
        raw["federated"]["num_rounds"] = self.config.federated.num_rounds
        return replace(self, config=parse_config(raw))

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What differs from the run's own settings: by name, what it was and what it is."""
        dumps = [config.dump() for config in (self.saved.config, self.config)]
        paths = {key: key.split(".") for key in MAY_CHANGE}
        values = {k: tuple(d[section][name] for d in dumps) for k, (section, name) in paths.items()}
        return {key: (before, now) for key, (before, now) in values.items() if before != now}

    @property
    def global_sha256(self) -> str:
        """The hash of the global adapter to resume from."""
        return self._adapters[GLOBAL]

    @property
    def memory_sha256(self) -> str | None:
        """The hash of what the aggregation has kept beside it, None where it needs nothing."""
        return self._adapters.get(MEMORY)

    @property
    def _adapters(self) -> dict[str, str]:
        return next(e for e in self.entries if e["round"] == self.after_round)["adapters"]


def find_resumption(given: str, places: list[Path], num_rounds: int | None) -> Resumption:
    """Return the stopped run that ``given`` means: a run, or ``<run>@<round>``.

    Args:
        places: the folders that a relative path or a name is looked for in.
        num_rounds: a new total, None for the run's own.

    Raises:
        RunDirectoryError: there is no such run or round, or its global adapter is damaged.
        ConfigError: nothing is left to do.
    """
    match = re.fullmatch("(?s)(.*)@([^@/]*)", given)  # a folder's name may hold an @ as well
    whole = any(os.path.isdir(place / given) for place in places)
    name, number = match.groups() if match and not whole else (given, "")
    tried = [place / name for place in places]
    path = next((path for path in tried if os.path.isdir(path)), None)
    if path is None:
        listing = " and no ".join(map(str, dict.fromkeys(tried)))
        raise RunDirectoryError(f"resume: there is no run {listing}.")
    saved = load_run(path)
    complete = complete_rounds(saved.manifest)
    after = complete[-1] if complete else FRESH
    if number:
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) not in complete:
            known = ", ".join(map(str, complete)) or "none"
            raise RunDirectoryError(
                f"resume: {saved.path} has no complete round {number!r}. Complete: {known}."
            )
        after = int(number)
    config = saved.config
    if num_rounds is not None:
        forgotten = saved.manifest.get(FORGOTTEN) or {}
        epsilon = config.privacy.epsilon or forgotten.get("epsilon")
        _require_same_budget(epsilon, config.federated.num_rounds, num_rounds)
        raw = config.dump()
        raw["federated"]["num_rounds"] = num_rounds
        config = parse_config(raw, source=f"{saved.path / 'config.json'} with num-rounds")
    total, planned = config.federated.num_rounds, saved.config.federated.num_rounds
    if after > total or after == total < planned:
        raise ConfigError(
            f"resume: {after} rounds are complete and num-rounds is {total}, so that no round is "
            f"left to end the run with. It was to have {planned}; more are possible."
        )
    if saved.manifest.get("finished") and after == total:
        raise ConfigError(
            f"resume: {saved.path} has finished its {total} rounds. For more of them, say how many "
            f"there are to be, above {total}: --rounds (with flwr run: num-rounds)."
        )
    if after > FRESH:
        _check_global(saved, after)
        _check_history(saved, after)
    return Resumption(saved, after, config)


def _check_global(saved: SavedRun, after: int) -> None:
    try:
        saved.adapter_sha256(after)
    except RunDirectoryError as error:
        raise RunDirectoryError(f"{error}{suggest_earlier(saved.path, after)}") from None


def _check_history(saved: SavedRun, after: int) -> None:
    rounds = complete_rounds(saved.manifest, after)
    try:
        read_rounds(saved.path, rounds)
    except RunDirectoryError as error:
        damaged = next(n for n in rounds if not _has_history(saved.path, n))
        hint = suggest_earlier(saved.path, damaged) if damaged > rounds[0] else ""
        raise RunDirectoryError(f"{error}{hint}") from None


def _has_history(path: Path, server_round: int) -> bool:
    try:
        return bool(read_rounds(path, {server_round}))
    except RunDirectoryError:
        return False


def suggest_earlier(run_dir: Path, after: int) -> str:
    """Return how to resume from the newest round before a damaged one that is still kept."""
    earlier = [number for number in list_rounds(RunPaths(run_dir).server) if number < after]
    if not earlier:
        return "\nNo earlier round is kept; start a new run."
    how = describe_resuming(f"{run_dir}@{max(earlier)}")
    return f"\nTo resume from the newest round before it: {how}"


def describe_resuming(run: Path | str) -> str:
    """Return the option that resumes a run, and what it is in ``--run-config``."""
    in_run_config = format_run_config({"resume": str(run)})
    return f"--resume {shlex.quote(str(run))} (with flwr run: {in_run_config})"


def _require_same_budget(epsilon: float | None, planned: int, num_rounds: int) -> None:
    """Raise where the noise was chosen for another number of rounds than there are to be."""
    if epsilon is not None and num_rounds != planned:
        raise ConfigError(
            f"resume: the run's noise keeps {planned} rounds within privacy.epsilon {epsilon:g}, "
            f"and num-rounds is {num_rounds}. Leave it at {planned}, or start a new run; one with "
            "privacy.noise_multiplier instead can have more rounds."
        )


def require_same_settings(kept: Config, given: Config) -> None:
    """Raise ``ConfigError`` where settings were given that differ from those of the run."""
    ours, theirs = (dict(_flatten(config.dump())) for config in (kept, given))
    different = [
        f"  {key}: {ours.get(key)!r} in the run, {theirs.get(key)!r} given"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key not in MAY_CHANGE
    ]
    if different:
        listing = "\n".join(different)
        raise ConfigError(
            f"resume: a run keeps the settings that it began with, and these differ:\n"
            f"{listing}\nLeave them out, or start a new run. What may change: "
            f"{', '.join(MAY_CHANGE)}."
        )


def require_same_data(manifest: Mapping[str, Any], reports: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless all clients' files are those that the run began with."""
    faults = []
    recorded = manifest.get("clients", {})
    for client, report in reports.items():
        changed = find_changed_data(recorded.get(client, {}), report)
        if changed:
            faults.append(f"  {client}: {', '.join(changed)}")
    if faults:
        listing = "\n".join(faults)
        raise ConfigError(
            f"resume: these files are not those that the run began with:\n{listing}\n"
            "Restore them, or start a new run."
        )


def find_changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the roles of the data files whose hashes differ between two reports of a client."""
    names = {key for key in before.keys() | now.keys() if key.startswith(DATA_HASH)}
    return sorted(key.removeprefix(DATA_HASH) for key in names if before.get(key) != now.get(key))


def describe_changed_data(config: Config, client: str, changed: list[str]) -> str:
    """Return the error for data files that are not those that a client registered with."""

    own = config.entry(client)

    def name_file(role: str) -> str:
        if own.is_bare:  # its own file names it
            return role
        sections, keys = (own, config.data), (role, f"{role}_test")
        paths = (getattr(section, key, None) for key in keys for section in sections)
        return f"{role} ({next(filter(None, paths), None)})"

    listing = ", ".join(map(name_file, changed))
    return (
        f"{client}: these data files are not those that the run began with: {listing}. Restore "
        "them and resume, or start a new run."
    )


def describe_other_software(
    manifest: Mapping[str, Any], reports: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line for all code and hardware that is not the run's; its bytes may then differ.

    Args:
        reports: what each client says at its registration now.
    """
    now = {"python": platform.python_version()}
    for name in manifest.get("versions", {}):
        try:
            now[name] = version(name)
        except PackageNotFoundError:
            now[name] = "none"
    before = {"python": manifest.get("python"), **manifest.get("versions", {})}
    code = "other code of this project, sha256"
    now[code] = hash_package()[:12]
    before[code] = str(manifest.get("package_sha256", now[code]))[:12]  # older runs have none
    for client, report in reports.items():
        name = f"{client} on"
        now[name] = report.get("device")
        before[name] = manifest.get("clients", {}).get(client, {}).get("device")
    for name, found in now.items():
        if before[name] != found:
            yield (
                f"Note: the run began with {name} {before[name]}, and this is {found}; what "
                "follows may differ from an undisturbed run."
            )


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and all(isinstance(e, Mapping) and "id" in e for e in value):
        for entry in value:
            yield from _flatten(entry, f"{prefix}.{entry['id']}")
    else:
        yield prefix, value
