"""What the server saw in a round: the global adapter that went out, and each update that came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fedlora_app.config.schema import AVERAGING_MODES, GLOBAL, Config
from fedlora_app.config.sharing import of_factors, travelling_factors
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, state_shapes
from fedlora_app.model.ranks import fit_client, resize_ranks, widen_from_client
from fedlora_app.runs.reading import SavedRun
from fedlora_app.runs.resuming import describe_changed_data, find_changed_data
from fedlora_app.runs.uploads import load_upload, read_upload_hashes


class AttackError(UserError):
    """A run has nothing that could be attacked."""


@dataclass(frozen=True)
class Observed:
    """One round as the server saw it.

    Args:
        before: the global adapter that the clients started from, with the ranks of all clients.
        updates: by client, as they came.
        reached: by client, the global adapter that its update leads to, alone.
        average: the global adapter after the round.
    """

    server_round: int
    before: AdapterState
    updates: dict[str, AdapterState]
    reached: dict[str, AdapterState]
    average: AdapterState

    @property
    def mean_update(self) -> AdapterState:
        """What the round changed in the global adapter."""
        return {key: self.average[key] - self.before[key] for key in self.before}

    def moved(self, client: str) -> AdapterState:
        """Return what a client's update changes in the adapter, in the adapter's shapes."""
        return {key: self.reached[client][key] - self.before[key] for key in self.before}


def require_uploads(run: SavedRun) -> None:
    """Raise ``AttackError`` where a run has kept no updates."""
    federated = run.config.federated
    if federated.mode not in AVERAGING_MODES:
        raise AttackError(
            f"{run.path} is of mode {federated.mode}, in which clients send a server no updates: "
            "there is nothing to attack."
        )
    if not federated.keep_uploads:
        raise AttackError(
            f"{run.path} has not kept what its clients sent, so there is nothing to attack. Train "
            "with federated.keep_uploads: true. What the global adapter alone tells: fedlora "
            "evaluate RUN --membership"
        )


def require_same_data(run: SavedRun, files: Mapping[str, ClientFiles]) -> None:
    """Raise ``AttackError`` where data are not those that the run was trained on.

    They would judge the guesses by what nobody has sent anything of.
    """
    faults = [
        describe_changed_data(run.config, client, changed)
        for client, own in files.items()
        if (changed := find_changed_data(run.manifest["clients"].get(client, {}), own.hashes))
    ]
    if faults:
        raise AttackError("\n".join(faults))


def observe(run: SavedRun, model: AdaptedModel, server_round: int) -> Observed:
    """Read what the server saw of a round.

    Args:
        model: the base with its adapters; it may have no weights.

    Raises:
        AdapterError, RunDirectoryError: a file is missing or was changed.
    """
    saved = [SavedModel(run, number, run.path) for number in (server_round - 1, server_round)]
    before, average = (one.read_state(None, model) for one in saved)
    entry = next(e for e in run.manifest["rounds"] if e["round"] == server_round)
    updates = {
        client: load_upload(run.paths, client, server_round, sha256, shapes)
        for client, sha256 in read_upload_hashes(entry).items()
        for shapes in [_upload_shapes(run.config, model, client, server_round)]
    }
    reached = {
        client: apply_update(run.config, client, before, update)
        for client, update in updates.items()
    }
    return Observed(server_round, before, updates, reached, average)


def observed_rounds(run: SavedRun) -> Iterator[int]:
    """Yield the rounds of which there are updates."""
    for entry in run.manifest["rounds"]:
        if read_upload_hashes(entry):
            yield entry["round"]


def apply_update(
    config: Config, client: str, before: AdapterState, update: AdapterState
) -> AdapterState:
    """Return the global adapter that a client had trained, with the ranks of all clients.

    An update has the factors that travel and the ranks that the client trains, the first ones.
    """
    trained = {key: tensor.clone() for key, tensor in fit_client(config, client, before).items()}
    for key, change in update.items():
        rows, columns = change.shape
        trained[key][:rows, :columns] += change
    return widen_from_client(config, client, trained)


def _upload_shapes(
    config: Config, model: AdaptedModel, client: str, server_round: int
) -> dict[str, torch.Size]:
    rank = config.adapters_of(client).global_.rank
    shapes = resize_ranks(state_shapes(model, GLOBAL), rank)
    return of_factors(shapes, travelling_factors(config, server_round))
