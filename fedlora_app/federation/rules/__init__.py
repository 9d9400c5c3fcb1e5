"""Aggregation rules: what the server makes of the clients' updates, one rule per module.

A rule is an object that lives as long as the run. In every round it is told the global adapter that
the clients started from, gets their updates one by one as they arrive, and returns the new global
adapter. ``federated.aggregation`` names it. A new rule is one more module and one more entry
in ``RULES``; docs/extending.md has an example.
"""

from __future__ import annotations

from typing import Protocol

from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.model.adapters import AdapterState


class AggregationRule(Protocol):
    """What the strategy asks of a rule."""

    @property
    def num_updates(self) -> int:
        """Updates added in this round."""

    def begin(self, state: AdapterState) -> None:
        """Start a round from the global adapter that the clients received; fp32 tensors."""

    def add(self, update: AdapterState, num_examples: int) -> None:
        """Fold in one client's update (its adapter minus the received one, fp32).

        Its names and shapes have been checked. The rule must not keep a reference to it, so that
        the server's memory does not grow with the number of clients.

        Raises:
            RejectedUpdateError: it cannot be used; the rule is as it was before.
        """

    def result(self) -> AdapterState:
        """Return the new global adapter, fp32, with the names and shapes of the old one.

        It must not depend on the order in which the updates came.

        Raises:
            RejectedUpdateError: there was no update.
        """


RULES: dict[str, type[AggregationRule]] = {"fedavg": FedAvg}


def build_rule(name: str) -> AggregationRule:
    """Return a new rule by the name that ``federated.aggregation`` gives."""
    return RULES[name]()
