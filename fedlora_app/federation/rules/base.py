"""What the strategy asks of a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedlora_app.config.schema import Config
from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.model.adapter_state import AdapterState


class AggregationRule(ABC):
    """Makes a new global adapter of the clients' updates, round after round.

    Weights are whole numbers, so that their sums do not depend on the order of arrival.
    """

    errors: ProductErrors | None = None
    """After ``result``: of every module ||M - B A|| and ||B A||, where B A is what the new adapter
    does and M what it should do; None where the rule does not compute it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.figures: dict[str, float] = {}
        """What ``result`` has measured beside it."""
        self.begin({}, 1)

    @abstractmethod
    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round from the server's global adapter, fp32 tensors."""

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """Updates added in this round."""

    @abstractmethod
    def add(self, client: str, update: AdapterState, weight: int) -> None:
        """Fold in one client's update (what it trained minus what it received, fp32).

        Names and shapes have been checked: of the factors that travel (``config.sharing``), with
        the client's rank.

        Raises:
            RejectedUpdateError: it cannot be used; the rule is as it was before.
        """

    @abstractmethod
    def result(self) -> AdapterState:
        """Return the new global adapter, fp32, with the names and shapes of the old one.

        It must not depend on the order in which the updates came.

        Raises:
            RejectedUpdateError: there was no update.
        """

    def state_for(self, client: str, state: AdapterState) -> AdapterState:
        """Return the global adapter that a client gets, where ``state`` is the server's own."""
        return state

    @property
    def memory(self) -> AdapterState:
        """What the rule needs in the rounds to come beside the adapter; kept with the run."""
        return {}

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        assert not memory, "a rule without memory was given one"
