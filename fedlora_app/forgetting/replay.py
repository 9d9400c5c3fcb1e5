"""Every round's global adapter once more, made of the updates that a run has kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedlora_app.config.combinations import LEAST_ROBUST, ROBUST
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.privacy import Release
from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.quiet import quieted
from fedlora_app.model.adapter_files import load_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, state_shapes
from fedlora_app.runs.manifest import FORGOTTEN, UPLOAD, WEIGHTS
from fedlora_app.runs.reading import SavedRun
from fedlora_app.runs.secret_key import open_server_key
from fedlora_app.runs.uploads import load_upload


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
    state = load_global(run, 0, model)
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
    hashes = of_role(entry.get("adapters", {}), UPLOAD)
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


def of_role(adapters: dict[str, str], role: str) -> dict[str, str]:
    """Return the hashes of a round's adapters in a role, by client."""
    parts = ((name.partition(":"), sha256) for name, sha256 in adapters.items())
    return {client: sha256 for (found, _, client), sha256 in parts if found == role and client}


def load_global(run: SavedRun, server_round: int, model: AdaptedModel) -> AdapterState:
    """Return the global adapter that a run has of a round.

    Raises:
        AdapterError: it is missing or damaged.
    """
    sha256 = run.adapter_sha256(server_round)
    folder, name = run.adapter_folder(server_round), run.config.model.name
    return load_adapter(folder, model, GLOBAL, name, within=run.path, sha256=sha256)
