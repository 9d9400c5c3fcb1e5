"""Federated averaging (McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

With updates d_k and n_k examples the new state is G + (sum_k n_k d_k) / (sum_k n_k). A and B are
averaged separately, which is not the average of their products; ``aggregation_error`` measures
the difference. The server keeps one sum, however many clients there are.
"""

from __future__ import annotations

from fedlora_app.config.sharing import of_factors, travelling_factors
from fedlora_app.federation.rules.base import AggregationRule
from fedlora_app.federation.weighted_mean import WeightedMean
from fedlora_app.model.adapter_state import AdapterState


class FedAvg(AggregationRule):
    """The weighted mean of the updates of the factors that travel."""

    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round from the server's global adapter."""
        self._state = state
        self._sent = of_factors(state, travelling_factors(self.config, server_round))
        self.mean = WeightedMean({key: tensor.shape for key, tensor in self._sent.items()})

    @property
    def num_updates(self) -> int:
        """Updates added in this round."""
        return self.mean.num_updates

    def add(self, client: str, update: AdapterState, weight: int) -> None:
        """Fold in one client's update.

        Raises:
            RejectedUpdateError: it is too large to sum.
        """
        self.mean.add(update, weight)

    def result(self) -> AdapterState:
        """Return the received adapter plus the mean update, fp32."""
        return self._state | self.mean.apply_to(self._sent)
