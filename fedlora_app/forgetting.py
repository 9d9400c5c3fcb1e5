"""A finished run without one of its clients, made of the updates that its server has kept.

Input: a run directory with ``federated.keep_uploads``, of which nothing is changed. From the global
adapter of round 0 every round is aggregated again, with the run's own rule, weights and server
optimizer, but without the client's updates. Output: a run directory beside it that every command
reads as it reads others.

An approximation of the run that would have been without the client: the others' updates are those
that they computed from global adapters with its share in them. FedEraser (Liu et al. 2021,
https://arxiv.org/abs/2012.13891) begins with the same replay and has the other clients calibrate
each update by some more training, for which they must all be there; here nobody need be.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedlora_app.config.combinations import LEAST_ROBUST, ROBUST
from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import AVERAGING_MODES, FEEDBACK, GLOBAL, LOCAL, Config
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.federation.accountant import noise_multiplier_for
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.privacy import Release
from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import make_private_dir, new_folder, write_json
from fedlora_app.foundation.quiet import quieted
from fedlora_app.model.adapter_files import load_adapter, save_adapter, save_tensors
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, state_shapes
from fedlora_app.runs.directory import SERVER, RunDirectory, begin_manifest
from fedlora_app.runs.history import read_history
from fedlora_app.runs.manifest import FORGOTTEN, MEMORY, UPLOAD, WEIGHTS
from fedlora_app.runs.paths import MAX_NAME_LENGTH, MEMORY_FILE
from fedlora_app.runs.reading import SavedRun
from fedlora_app.runs.secret_key import open_server_key
from fedlora_app.runs.spending import Spending
from fedlora_app.runs.uploads import load_upload

EPSILON = "epsilon"
APPROXIMATION = (
    "An approximation: the other clients' updates were trained from global adapters that held the "
    "forgotten client's share, and their local adapters are those that were fitted beside them."
)

Report = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


class ForgettingError(UserError):
    """A client cannot be taken out of a run."""


@dataclass(frozen=True)
class Replayed:
    """What the server makes of a round's updates."""

    server_round: int
    state: AdapterState
    memory: AdapterState
    metrics: dict[str, float]
    errors: ProductErrors | None
    """The relative aggregation error by module, as far as it is known."""
    release: Release | None = None
    """What of the clients' privacy it spends."""
    stands_still: bool = False
    """There was no update."""


def replay(
    run: SavedRun, config: Config, model: AdaptedModel, without: str | None = None
) -> Iterator[Replayed]:
    """Yield the global adapter of every round, from 0, made of the updates that are kept.

    Args:
        config: what the rule and the server optimizer go by.
        model: the base with its adapters, for their shapes; it may have no weights.
        without: a client whose updates are left out. A round of its update alone changes nothing.

    Raises:
        AdapterError: an update or the first adapter is missing or damaged.
        ForgettingError: a round does not say which updates counted, or one cannot be used.
    """
    key = open_server_key(config, run.paths)
    aggregation = Aggregation(config, state_shapes(model, GLOBAL), key)
    entries = {entry["round"]: entry for entry in run.manifest["rounds"]}
    state = _load_global(run, 0, model)
    yield Replayed(0, state, {}, {}, None)
    for server_round in range(1, run.config.federated.num_rounds + 1):
        hashes = _require_uploads(run, entries.get(server_round, {}), server_round)
        kept = {client: sha256 for client, sha256 in hashes.items() if client != without}
        _require_enough(config, len(kept), server_round)
        if not kept:
            yield Replayed(server_round, state, aggregation.memory, {}, None, stands_still=True)
            continue
        aggregation.begin(state, server_round)
        for client, sha256 in sorted(kept.items()):
            shapes = aggregation.update_shapes(client, server_round)
            update = load_upload(run.paths, client, server_round, sha256, shapes)
            try:
                aggregation.fold(client, update, entries[server_round][WEIGHTS][client])
            except MessageError as error:
                raise ForgettingError(f"{run.path}, round {server_round}: {error}") from None
        with quieted("flwr"):  # whose strategies optimise at the server
            state = aggregation.result()
        metrics, errors = dict(aggregation.metrics), aggregation.errors
        release = aggregation.release
        yield Replayed(server_round, state, aggregation.memory, metrics, errors, release)


def _require_uploads(run: SavedRun, entry: dict[str, Any], server_round: int) -> dict[str, str]:
    """Return the hash of every update that counted in a round, by client."""
    hashes = _of_role(entry.get("adapters", {}), UPLOAD)
    weights = entry.get(WEIGHTS, {})
    stood_still = run.manifest.get(FORGOTTEN, {}).get("rounds_without_update", ())
    if server_round in stood_still and not hashes and not weights:
        return {}
    counts = hashes.keys() == weights.keys() <= set(run.config.client_ids)
    if not hashes or not counts or not all(type(w) is int and w > 0 for w in weights.values()):
        raise ForgettingError(
            f"{run.paths.manifest} does not say of round {server_round} which updates counted and "
            "how much. Expected what a run with federated.keep_uploads writes. Restore it."
        )
    return hashes


def _require_enough(config: Config, num_updates: int, server_round: int) -> None:
    """Raise where a robust rule would be none of what is left of a round."""
    federated = config.federated
    trims = federated.rule != "trimmed-mean" or int(federated.trim_share * num_updates) > 0
    if federated.rule in ROBUST and num_updates > 0 and not (trims and num_updates >= LEAST_ROBUST):
        raise ForgettingError(
            f"In round {server_round} {num_updates} updates of others are left, of which "
            f"{federated.rule} leaves nothing out: the new run would be one of the plain mean. "
            "Train it again without the client."
        )


def _of_role(adapters: dict[str, str], role: str) -> dict[str, str]:
    """Return the hashes of a round's adapters in a role, by client."""
    parts = ((name.partition(":"), sha256) for name, sha256 in adapters.items())
    return {client: sha256 for (found, _, client), sha256 in parts if found == role and client}


def _load_global(run: SavedRun, server_round: int, model: AdaptedModel) -> AdapterState:
    sha256 = run.adapter_sha256(server_round)
    folder, name = run.adapter_folder(server_round), run.config.model.name
    return load_adapter(folder, model, GLOBAL, name, within=run.path, sha256=sha256)


def protects_clients(config: Config) -> bool:
    """Return whether the run's noise hides whole clients."""
    return config.privacy.unit == "client"


def default_name(run_name: str, client: str) -> str:
    """Return what the run without a client is called."""
    tail = f"-without-{client}"
    return run_name[: max(1, MAX_NAME_LENGTH - len(tail))] + tail


def configure_without(run: SavedRun, client: str) -> Config:
    """Return a run's configuration without a client.

    Its answers to conflict questions stay among the wrong ones, so that the questions are the same.

    Raises:
        ForgettingError, ConfigError: the client cannot be forgotten, with the reason.
    """
    path, federated = run.path, run.config.federated
    run.config.entry(client)  # raises
    if federated.mode not in AVERAGING_MODES:
        raise ForgettingError(
            f"{path} is of mode {federated.mode}, in which no server averages updates: there is "
            "nothing to take a client's share out of."
        )
    if federated.mode == "finetuned":
        raise ForgettingError(
            f"{path} is of mode finetuned: its clients answer with copies of the average that they "
            f"trained on, and what these hold of {client} cannot be taken out. Train it again "
            "without the client."
        )
    if federated.rule in PERSONAL:
        raise ForgettingError(
            f"{path} is of the aggregation rule {federated.rule}, which leaves each client a "
            "global adapter of its own; what that holds of others cannot be taken out. Train it "
            "again without the client."
        )
    if run.manifest.get("finished") is None:
        raise ForgettingError(
            f"{path} has not finished. Finish it first: fedlora train --resume {path}"
        )
    if not federated.keep_uploads:
        raise ForgettingError(
            f"{path} has not kept its clients' updates, without which nobody's share can be told. "
            "They are kept where federated.keep_uploads is true when a run begins."
        )
    raw = run.config.dump()
    others = [entry for entry in raw["federated"]["clients"] if entry["id"] != client]
    if not others:
        raise ForgettingError(f"{client} is the only client of {path}; without it nothing is left.")
    required = raw["federated"]["min_clients"]
    raw["federated"]["clients"] = others
    raw["federated"]["min_clients"] = required and min(required, len(others))
    if protects_clients(run.config):  # its noise is what it was, whoever is left
        multiplier = noise_multiplier_for(run.config)
        raw["privacy"] |= {"epsilon": None, "noise_multiplier": multiplier}
    raw["data"]["conflict_clients"] = [*run.config.data.conflict_clients, client]
    return parse_config(raw, source=f"Without {client} the configuration of {path}")


@dataclass(frozen=True)
class Forgetting:
    """A client that is taken out of a run.

    Args:
        config: the run's without the client.
        root: the project that the run lies in.
        model: the base with its adapters, without weights.
    """

    run: SavedRun
    client: str
    config: Config
    root: Path
    model: AdaptedModel

    @cached_property
    def _entries(self) -> dict[int, dict[str, Any]]:
        return {entry["round"]: entry for entry in self.run.manifest["rounds"]}

    def check(self, report: Report) -> None:
        """Replay the run with all of its updates, and compare every global adapter with its own.

        Raises:
            ForgettingError: one differs in a bit.
        """
        total = self.run.config.federated.num_rounds
        for replayed in replay(self.run, self.run.config, self.model):
            number = replayed.server_round
            recorded = _load_global(self.run, number, self.model)
            differing = [k for k in recorded if not _same_bits(replayed.state[k], recorded[k])]
            if differing:
                largest = max(
                    (replayed.state[k] - recorded[k]).abs().max().item() for k in differing
                )
                raise ForgettingError(
                    f"{self.run.path}: with all of its updates round {number} does not become the "
                    f"global adapter that the run has; they differ by up to {largest:.3g} in "
                    f"{len(differing)} of {len(recorded)} tensors. Expected the same bytes. The "
                    "run was made with other code, libraries or threads (see its manifest), or its "
                    "files were changed."
                )
            report("checking rounds", number, total)

    def write(self, target: Path, report: Report) -> dict[str, Any]:
        """Write the run without the client; return what its manifest says of that.

        The folder is whole or absent.

        Raises:
            RunDirectoryError: something is there already, or a local adapter was changed.
        """
        RunDirectory.require_absent(target)
        clients = {c: r for c, r in self.run.manifest["clients"].items() if c != self.client}
        with new_folder(target) as partial:
            partial.chmod(0o700)
            new = RunDirectory(partial)
            base = self.run.manifest["base_model"]
            date = self.run.date or None
            new.manifest = begin_manifest(self.config, self.root, clients, date, base_model=base)
            write_json(new.paths.config, self.config.dump())
            still = self._write_rounds(new, report)
            self._copy_others(new)
            about = self._describe(still)
            new.log_event("forgotten", **about)
            if (final := self.run.manifest.get("final")) is not None:
                missing = [c for c in final.get("missing", []) if c != self.client]
                chosen = {"why": f"final/ holds round {final['round']}, as in {self.run.name}."}
                chosen |= {"missing": missing} if missing else {}
                new.manifest["final"] = {"round": final["round"], **chosen}
            new.finish(**{FORGOTTEN: about})
        RunDirectory(target).point_latest()
        return about

    @property
    def absent(self) -> list[str]:
        """The other clients whose local adapters are not on this machine, to be copied."""
        paths, final = self.run.paths, self.run.final_round
        return [
            client
            for client in self.config.client_ids
            if any(client in _of_role(e["adapters"], LOCAL) for e in self._entries.values())
            and not paths.local_adapter(client, self.run.local_round(final, client)).exists()
        ]

    def describe(self, about: dict[str, Any]) -> Iterator[str]:
        """Yield what is to be known of the new run.

        Args:
            about: what its manifest says.
        """
        yield about["note"]
        if still := about["rounds_without_update"]:
            yield (
                f"In round {', '.join(map(str, still))} no other client trained the global "
                "adapter; it stands still there."
            )
        if self.absent:
            yield (
                f"Not on this machine, and so not in the new run: the local adapters of "
                f"{', '.join(self.absent)}."
            )
        yield (
            f"{self.run.path} still holds the updates of {self.client} and all that was made of "
            "them. Delete it where the client is to be forgotten."
        )

    def _describe(self, still: list[int]) -> dict[str, Any]:
        final, earlier = self.run.final_round, self.run.manifest.get(FORGOTTEN)
        return {
            "client": self.client,
            "run": self.run.name,
            "round": final,
            "global_adapter": self._entries[final]["adapters"][GLOBAL],
            "rounds_without_update": still,
            "note": APPROXIMATION,
            **self._limit,
            **({"earlier": earlier} if earlier else {}),
        }

    @property
    def _limit(self) -> dict[str, float]:
        """The epsilon that the run was to keep within: its noise stays, and no round may follow."""
        epsilon = self.run.config.privacy.epsilon if protects_clients(self.run.config) else None
        if epsilon is None:
            return {k: v for k, v in self.run.manifest.get(FORGOTTEN, {}).items() if k == EPSILON}
        return {EPSILON: epsilon}

    def _write_rounds(self, new: RunDirectory, report: Report) -> list[int]:
        """Write all rounds and the history; return the rounds in which nobody else trained."""
        history, still = list(self._kept_history()), []
        spending = self._copy_secrets(new)
        for replayed in replay(self.run, self.config, self.model, self.client):
            number = replayed.server_round
            new.manifest["rounds"].append(self._write_round(new, replayed))
            if replayed.release is not None:
                spending.note(replayed.release)
            if replayed.stands_still:
                still.append(number)
            elif number > 0:
                entry = {"round": number, "client": SERVER, "phase": "aggregate"}
                history.append({**entry, "metrics": replayed.metrics})
            report("rounds", number, self.config.federated.num_rounds)
        new.write_history(sorted(history, key=lambda entry: entry["round"]))
        return still

    def _write_round(self, new: RunDirectory, replayed: Replayed) -> dict[str, Any]:
        """Write what is the server's of a round; return the manifest's entry."""
        number, base = replayed.server_round, self.config.model.name
        before = self._entries[number]
        folder = new.paths.global_adapter(number)
        adapters = {GLOBAL: save_adapter(folder, self.model, GLOBAL, replayed.state, base)}
        if number == self.run.final_round:
            save_adapter(new.paths.final_global, self.model, GLOBAL, replayed.state, base)
        if replayed.memory:
            adapters[MEMORY] = save_tensors(folder / MEMORY_FILE, replayed.memory)
        if replayed.errors is not None:
            new.log_event("aggregation", round=number, relative_error=replayed.errors.by_module)
        for role in (LOCAL, UPLOAD, FEEDBACK):
            found = _of_role(before["adapters"], role).items()
            adapters |= {f"{role}:{c}": sha256 for c, sha256 in found if c != self.client}
        for client in _of_role(adapters, UPLOAD):  # whoever is forgotten next is left out of these
            new.paths.uploads(number).mkdir(exist_ok=True)
            shutil.copy2(self.run.paths.upload(client, number), new.paths.upload(client, number))
        facts = {
            name: {c: value for c, value in before[name].items() if c != self.client}
            for name in (WEIGHTS, "failures")
            if name in before
        }
        kept = {name: value for name, value in facts.items() if value}
        return {"round": number, "adapters": adapters, **kept}

    def _copy_secrets(self, new: RunDirectory) -> Spending:
        """Copy the secret of the server's noise, and what it has told: that is not taken back."""
        make_private_dir(new.paths.server)
        for name in ("server_key", "releases"):
            if (source := getattr(self.run.paths, name)).exists():
                shutil.copy2(source, getattr(new.paths, name))
        return Spending(self.config, new.paths)

    def _copy_others(self, new: RunDirectory) -> None:
        """Copy what the other clients have of their own, as far as it is on this machine."""
        for client in self.config.client_ids:
            ours, theirs = self.run.paths, new.paths
            pairs = [(ours.gate(client), theirs.gate(client))]  # it looks at the base model alone
            pairs.append((ours.final_local(client), theirs.final_local(client)))
            # What rounding has left to send is sent when rounds follow.
            pairs.append((ours.feedback(client, 0).parent, theirs.feedback(client, 0).parent))
            for number, entry in self._entries.items():
                folder = ours.local_adapter(client, number)
                if client in _of_role(entry["adapters"], LOCAL) and folder.exists():
                    self.run.adapter_sha256(number, client)  # raises where it was changed
                    pairs.append((folder, theirs.local_adapter(client, number)))
            for source, copy in pairs:
                if source.is_dir():
                    shutil.copytree(source, copy)

    def _kept_history(self) -> Iterator[dict[str, Any]]:
        """Yield what holds of the new run too: not what the old global adapters answered."""
        for entry in read_history(self.run.path):
            was_asked = entry["phase"] == "evaluate" and entry["round"] > 0
            if entry["client"] not in (self.client, SERVER) and not was_asked:
                yield entry


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
