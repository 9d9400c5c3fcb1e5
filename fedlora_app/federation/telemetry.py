"""What a round's updates have in common, and how far they move the global adapter.

Neither needs two updates at once: with unit updates e_k = d_k / ||d_k|| the mean cosine between two
clients is (||sum_k e_k||^2 - K) / (K (K - 1)), since ||sum_k e_k||^2 = K + sum_{j != k} e_j e_k.
"""

from __future__ import annotations

import torch

from fedlora_app.federation.weighted_mean import RejectedUpdateError, WeightedMean
from fedlora_app.model.adapter_state import AdapterState, compute_norm
from fedlora_app.model.ranks import pad_ranks, rank_axis


class UpdateTelemetry:
    """Watches one round.

    Args:
        shapes: of an update of full rank; lower ranks count as filled with zeros.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self._shapes = shapes
        self._rank = next(shape[rank_axis(key)] for key, shape in shapes.items())
        self._units = WeightedMean(shapes)

    def add(self, update: AdapterState) -> None:
        """See one client's update."""
        norm = compute_norm(update)
        if norm == 0:
            return
        unit = {key: tensor / norm for key, tensor in update.items()}
        if any(unit[key].shape != shape for key, shape in self._shapes.items()):
            unit = pad_ranks(unit, self._rank)
        try:
            self._units.add(unit, 1)
        except RejectedUpdateError:  # more clients than its sums have room for
            return

    def figures(self, received: AdapterState, new: AdapterState) -> dict[str, float]:
        """Return the mean cosine between clients, and how far the adapter has moved.

        Args:
            received: the server's adapter before the round.
            new: and after it.
        """
        moved = {key: new[key].double() - received[key].double() for key in new}
        figures = {"global_step_norm": compute_norm(moved), "global_norm": compute_norm(new)}
        count = self._units.num_updates
        if count > 1:
            summed = count * compute_norm({key: self._units.mean_of(key) for key in self._shapes})
            figures["update_cosine"] = (summed**2 - count) / (count * (count - 1))
        return figures
