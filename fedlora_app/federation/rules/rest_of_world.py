"""FedALT (Bian et al. 2025, https://arxiv.org/abs/2503.11880): each client gets the others' mean.

With W_k what client k has trained, it receives G_k = sum_{j != k} n_j W_j / sum_{j != k} n_j for
the next round and never its own share of a mean, which its own adapters hold already. The
server's own adapter is the mean of all W_k; it is what a client gets that sent nothing.

The server keeps what each client starts from, so its memory grows with the clients.
"""

from __future__ import annotations

from fedlora_app.config.schema import Config
from fedlora_app.federation.rules.base import AggregationRule
from fedlora_app.federation.weighted_mean import WeightedMean
from fedlora_app.model.adapter_state import AdapterState

SEPARATOR = "/"


class RestOfWorld(AggregationRule):
    """A mean of all the others for each client."""

    def __init__(self, config: Config) -> None:
        self._own: dict[str, AdapterState] = {}
        super().__init__(config)

    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round; each client starts from what the last one has left it."""
        self._state = state
        self._trained: dict[str, tuple[AdapterState, int]] = {}
        self._mean = WeightedMean({key: tensor.shape for key, tensor in state.items()})

    @property
    def num_updates(self) -> int:
        """Updates added in this round."""
        return self._mean.num_updates

    def add(self, client: str, update: AdapterState, weight: int) -> None:
        """Fold in one client's update.

        Raises:
            RejectedUpdateError: it is too large to sum.
        """
        received = self.state_for(client, self._state)
        trained = {key: received[key] + update[key] for key in update}
        self._mean.add(trained, weight)
        self._trained[client] = (trained, weight)

    def result(self) -> AdapterState:
        """Return the mean of all, fp32, and keep each client's own for ``state_for``.

        Raises:
            RejectedUpdateError: there was no update.
        """
        mean = {key: self._mean.mean_of(key).float() for key in self._state}
        self._own = {
            client: {
                key: self._mean.mean_without(key, trained[key], weight).float() for key in mean
            }
            for client, (trained, weight) in self._trained.items()
            if len(self._trained) > 1
        }
        return mean

    def state_for(self, client: str, state: AdapterState) -> AdapterState:
        """Return the others' mean; to a client that sent nothing all are others."""
        return self._own.get(client, state)

    @property
    def memory(self) -> AdapterState:
        """Each client's start, its name before the tensors'."""
        return {
            f"{client}{SEPARATOR}{key}": tensor
            for client, state in sorted(self._own.items())
            for key, tensor in state.items()
        }

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        self._own = {}
        for name, tensor in memory.items():
            client, _, key = name.partition(SEPARATOR)
            self._own.setdefault(client, {})[key] = tensor
