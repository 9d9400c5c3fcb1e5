"""A round's aggregation: the rule that is configured, and what it costs measured beside it."""

from __future__ import annotations

import time

import torch

from fedlora_app.config.schema import Config
from fedlora_app.federation.aggregation_error import AggregationErrorObserver, ProductSketch
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.replies import Reply, require_update
from fedlora_app.federation.rules import build_rule
from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.federation.weighted_mean import RejectedUpdateError
from fedlora_app.model.adapters import AdapterState


class Aggregation:
    """Makes the new global adapter of the clients' updates, in one round after the other.

    After ``result``, ``metrics`` are the round's, and ``error_by_module`` is the relative error of
    averaging A and B separately, None for a rule that is not a kind of ``FedAvg``.

    Args:
        shapes: of the global adapter's tensors.
    """

    def __init__(self, config: Config, shapes: dict[str, torch.Size]) -> None:
        self._shapes = shapes
        self._dtype = config.federated.upload_dtype
        self._rule = build_rule(config.federated.aggregation)
        self._sketch = ProductSketch(shapes, config.experiment.seed)
        self.metrics: dict[str, float] = {}
        self.error_by_module: dict[str, float | None] | None = None

    def begin(self, state: AdapterState) -> None:
        """Start a round from the global adapter that the clients received."""
        self._rule.begin(state)
        self._observer = AggregationErrorObserver(self._sketch)
        self._seconds = 0.0
        self.metrics, self.error_by_module = {}, None

    def add(self, reply: Reply, num_examples: int) -> None:
        """Fold in the update in a reply.

        Raises:
            MessageError, AdapterError: there is none, or it cannot be used.
        """
        started = time.monotonic()
        update = require_update(reply, self._shapes, self._dtype)
        try:
            self._rule.add(update, num_examples)
        except RejectedUpdateError as error:
            raise MessageError(f"{reply.client_id}: {error}") from None
        self._observer.add(update, num_examples)
        self._seconds += time.monotonic() - started

    def result(self) -> AdapterState:
        """Return the new global adapter, and measure what it took.

        Raises:
            RejectedUpdateError: there was no update.
        """
        started = time.monotonic()
        state = self._rule.result()
        if isinstance(self._rule, FedAvg):
            self.error_by_module, error = self._observer.relative_errors(self._rule, state)
            if error is not None:
                self.metrics["aggregation_error"] = error
        self._seconds += time.monotonic() - started
        self.metrics["aggregation_seconds"] = self._seconds
        return state
