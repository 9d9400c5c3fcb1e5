"""A round's aggregation: the rule that is configured, and what it does measured beside it."""

from __future__ import annotations

import time

import torch

from fedlora_app.config.schema import Config
from fedlora_app.config.sharing import FACTORS, of_factors, travelling_factors
from fedlora_app.federation.aggregation_error import AggregationErrorObserver, ProductSketch
from fedlora_app.federation.bounds import NormBounds
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.privacy import Release, build_protection
from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.federation.replies import Reply, require_update
from fedlora_app.federation.rules import build_rule
from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.federation.server_optimizer import ServerOptimizer
from fedlora_app.federation.telemetry import UpdateTelemetry
from fedlora_app.federation.weighted_mean import RejectedUpdateError
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.ranks import fit_client, resize_ranks

ERROR = "aggregation_error"
OPTIMIZER = "optimizer:"
"""Before the names of what the server's optimizer keeps, beside what the rule does."""
BOUNDS = "bounds:"
"""The same of what the bounds on updates keep."""


class Aggregation:
    """Makes the new global adapter of the clients' updates, in one round after the other.

    After ``result``, ``metrics`` are the round's, and ``errors`` says how far each module's new
    product B A is from the mean of the clients' products, None where that has no meaning.

    Args:
        shapes: of the global adapter's tensors.
        key: the server's secret one, where it adds noise.
    """

    def __init__(
        self, config: Config, shapes: dict[str, torch.Size], key: bytes | None = None
    ) -> None:
        self._config = config
        self._shapes = shapes
        self._rule = build_rule(config)
        self._optimizer = ServerOptimizer(config.federated)
        self._protection = build_protection(config, key)
        self._bounds = NormBounds(config)
        self._sketch = ProductSketch(shapes, config.experiment.seed)
        self.metrics: dict[str, float] = {}
        self.errors: ProductErrors | None = None

    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round from the global adapter that the clients received."""
        self._state, self._round = state, server_round
        self._rule.begin(state, server_round)
        self._bounds.begin(server_round)
        self._observer = None
        if isinstance(self._rule, FedAvg) and self._means_both(server_round):
            self._observer = AggregationErrorObserver(self._sketch)
        self._telemetry = UpdateTelemetry(self.update_shapes(None, server_round))
        if self._protection is not None:
            self._protection.begin(server_round)
        self._seconds = 0.0
        self.metrics, self.errors = {}, None

    def add(self, reply: Reply, weight: int) -> AdapterState:
        """Fold in the update in a reply, and return it as it came.

        Raises:
            MessageError, AdapterError: there is none, or it cannot be used.
        """
        started = time.monotonic()
        shapes = self.update_shapes(reply.client_id, self._round)
        update = require_update(reply, shapes, self._config.federated.upload_dtype)
        self._bounds.require(reply.client_id, update)
        self._seconds += time.monotonic() - started
        self.fold(reply.client_id, update, weight)
        return update

    def fold(self, client: str, update: AdapterState, weight: int) -> None:
        """Fold in an update that was checked: fp32, with the shapes that ``update_shapes`` gives.

        Raises:
            MessageError: it cannot be used.
        """
        started = time.monotonic()
        received = update
        if self._protection is not None:
            update = self._protection.clip(received)
        try:
            self._rule.add(client, update, weight)
        except RejectedUpdateError as error:
            raise MessageError(f"{client}: {error}") from None
        if self._protection is not None:
            self._protection.note(client, received, update)
        self._bounds.note(received)
        if self._observer is not None:
            self._observer.add(update, weight)
        self._telemetry.add(update)
        self._seconds += time.monotonic() - started

    def result(self) -> AdapterState:
        """Return the new global adapter, and measure what it took.

        Raises:
            RejectedUpdateError: there was no update.
        """
        started = time.monotonic()
        average = mean = self._rule.result()
        if self._protection is not None:
            mean = self._protection.add_noise(self._state, mean)
        state = self._optimizer.step(self._state, mean)
        self.metrics = dict(self._rule.figures)
        if self._protection is not None:
            self.metrics |= self._protection.figures
        self.errors = self._rule.errors
        if self._observer is not None:
            self.errors = self._observer.measure(self._rule, average)
        if self.errors is not None:
            figures = {ERROR: self.errors.total}
            figures |= {f"{ERROR}/{kind}": e for kind, e in self.errors.by_group.items()}
            self.metrics |= {name: e for name, e in figures.items() if e is not None}
        self.metrics |= self._telemetry.figures(self._state, state)
        self._seconds += time.monotonic() - started
        self.metrics["aggregation_seconds"] = self._seconds
        return state

    @property
    def release(self) -> Release | None:
        """What of the clients' privacy the round has spent; None where the server adds no noise."""
        return self._protection.release if self._protection is not None else None

    def update_shapes(self, client: str | None, server_round: int) -> dict[str, torch.Size]:
        """Return the shapes of a client's update; with None those of one of full rank."""
        ours = self._config.adapters.global_
        rank = ours.rank if client is None else self._config.adapters_of(client).global_.rank
        shapes = resize_ranks(self._shapes, rank)
        return of_factors(shapes, travelling_factors(self._config, server_round))

    def state_for(self, client: str, state: AdapterState) -> AdapterState:
        """Return the global adapter that a client gets, where ``state`` is the server's own."""
        return fit_client(self._config, client, self._rule.state_for(client, state))

    def has_own_state(self, client: str) -> bool:
        """Return whether ``state_for`` gives a client something else than the server's own."""
        own = self._config.adapters_of(client) is not self._config.adapters
        return own or self._config.federated.rule == "rest-of-world"

    def _means_both(self, server_round: int) -> bool:
        """Return whether A and B are averaged apart, where the products' mean may differ."""
        return travelling_factors(self._config, server_round) == FACTORS

    @property
    def memory(self) -> AdapterState:
        """What the rounds to come need beside the adapter; kept with the run."""
        kept = {
            f"{prefix}{name}": tensor
            for prefix, part in self._remembering.items()
            for name, tensor in part.memory.items()
        }
        return self._rule.memory | kept

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        for prefix, part in self._remembering.items():
            names = [name for name in memory if name.startswith(prefix)]
            part.recall({name.removeprefix(prefix): memory[name] for name in names})
        prefixes = tuple(self._remembering)
        self._rule.recall({k: t for k, t in memory.items() if not k.startswith(prefixes)})

    @property
    def _remembering(self) -> dict[str, ServerOptimizer | NormBounds]:
        """What keeps something beside the rule, by what the names of it begin with."""
        return {OPTIMIZER: self._optimizer, BOUNDS: self._bounds}
