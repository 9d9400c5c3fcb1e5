"""Federated averaging (McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

With updates d_k and n_k examples the new state is G + (sum_k n_k d_k) / (sum_k n_k). A and B are
averaged separately, which is not the average of their products; ``aggregation_error`` measures
the difference.
"""

from __future__ import annotations

from fedlora_app.federation.weighted_mean import WeightedMean
from fedlora_app.model.adapters import AdapterState


class FedAvg:
    """The mean of the updates, weighted by the examples of the global phase."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, state: AdapterState) -> None:
        """Start a round from the global adapter that the clients received."""
        self._state = state
        self.mean = WeightedMean({key: tensor.shape for key, tensor in state.items()})

    @property
    def num_updates(self) -> int:
        """Updates added in this round."""
        return self.mean.num_updates

    def add(self, update: AdapterState, num_examples: int) -> None:
        """Fold in one client's update.

        Raises:
            RejectedUpdateError: it is too large to sum.
        """
        self.mean.add(update, num_examples)

    def result(self) -> AdapterState:
        """Return the received adapter plus the mean update, fp32."""
        return self.mean.apply_to(self._state)
