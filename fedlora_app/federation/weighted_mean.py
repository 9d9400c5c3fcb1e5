"""A running weighted mean of tensors that does not depend on the order of arrival.

The sum is kept in 64-bit fixed point. Integer addition is associative, so the order in
which clients are served changes no bit of the result, and the server holds one
accumulator however many clients there are.
"""

from __future__ import annotations

import torch

from fedlora_app.model.adapter_state import AdapterState

FRACTION_BITS = 36  # resolution 1.5e-11 of the weighted sum, room up to 2**27
LIMIT = 2.0 ** (63 - FRACTION_BITS - 1)


class RejectedUpdateError(ValueError):
    """An update cannot be used, or there is none."""


class WeightedMean:
    """A running mean of adapter updates, weighted by numbers of examples."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self._sums = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in shapes.items()}
        self._bound = 0.0
        self.num_updates = 0
        self.num_examples = 0

    def add(self, update: AdapterState, num_examples: int) -> None:
        """Fold in one client's update; its names and shapes must have been checked.

        Raises:
            RejectedUpdateError: the sum could leave the range of the fixed-point numbers.
        """
        largest = max(abs(end.item()) for key in update for end in update[key].aminmax())
        bound = self._bound + largest * num_examples
        if not bound < LIMIT:
            raise RejectedUpdateError(
                f"An update of {largest:.3g} weighted by {num_examples} examples is too large to "
                f"sum (limit {LIMIT:.3g}). The client's training has probably diverged."
            )
        self._bound = bound
        for key, total in self._sums.items():
            total += _to_fixed(update[key], num_examples)
        self.num_updates += 1
        self.num_examples += num_examples

    @property
    def resolution(self) -> float:
        """The largest rounding error of an entry of the mean."""
        return 0.5 * self.num_updates / self._divisor

    def mean_of(self, key: str) -> torch.Tensor:
        """Return the mean of one tensor, fp64."""
        return self._sums[key].double() / self._divisor

    def mean_without(self, key: str, tensor: torch.Tensor, num_examples: int) -> torch.Tensor:
        """Return the mean of all others' tensors, fp64, without one that was added."""
        rest = self._sums[key] - _to_fixed(tensor, num_examples)
        return rest.double() / ((self.num_examples - num_examples) * 2.0**FRACTION_BITS)

    def apply_to(self, state: AdapterState) -> AdapterState:
        """Return ``state`` plus the mean update of its tensors, fp32."""
        return {key: (state[key].double() + self.mean_of(key)).float() for key in state}

    @property
    def _divisor(self) -> float:
        if self.num_examples == 0:
            raise RejectedUpdateError("No update was added, so there is nothing to average.")
        return self.num_examples * 2.0**FRACTION_BITS


def _to_fixed(tensor: torch.Tensor, num_examples: int) -> torch.Tensor:
    return (tensor.double() * (num_examples * 2.0**FRACTION_BITS)).round_().to(torch.int64)
