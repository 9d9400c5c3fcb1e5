"""Rules that need all updates of a round at once, so that their memory grows with the clients."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedlora_app.federation.product_errors import ProductErrors
from fedlora_app.federation.rules.base import AggregationRule
from fedlora_app.federation.weighted_mean import RejectedUpdateError
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.ranks import rank_axis

LARGEST_VALUE = 1e6
"""Of an update's entries; products of such stay far within double precision."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in) and B (out, rank) of one module, fp64."""


@dataclass(frozen=True)
class Module:
    """One module in one round."""

    name: str
    received: Factors
    trained: list[Factors]
    """Of each client that sent an update, in the order of their ids."""
    shares: list[float]
    """Their p_k = n_k / sum_k n_k."""

    @cached_property
    def stacked(self) -> Factors:
        """A and B whose product is sum_k p_k B_k A_k."""
        a = torch.cat([a for a, _ in self.trained])
        b = [share * b for (_, b), share in zip(self.trained, self.shares, strict=True)]
        return a, torch.cat(b, dim=1)

    @property
    def by_client(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B of all clients, each with a first axis of clients."""
        a, b = zip(*self.trained, strict=True)
        return torch.stack(a).numpy(), torch.stack(b).numpy()

    @property
    def mean(self) -> Factors:
        """The means of A and of B apart."""
        pairs = list(zip(self.trained, self.shares, strict=True))
        return sum(p * a for (a, _), p in pairs), sum(p * b for (_, b), p in pairs)


class CollectingRule(AggregationRule):
    """Keeps the updates until the round ends, and then makes one module after the other."""

    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round without an update."""
        self._state, self._round = state, server_round
        self._updates: dict[str, tuple[AdapterState, int]] = {}
        self.figures, self.errors = {}, None

    @property
    def num_updates(self) -> int:
        """Updates added in this round."""
        return len(self._updates)

    def add(self, client: str, update: AdapterState, weight: int) -> None:
        """Keep one client's update.

        Raises:
            RejectedUpdateError: it holds values that are too large to compute with.
        """
        largest = max(abs(end.item()) for key in update for end in update[key].aminmax())
        if not largest < LARGEST_VALUE:
            raise RejectedUpdateError(
                f"An update of {largest:.3g} is too large to compute with (limit "
                f"{LARGEST_VALUE:.3g}). The client's training has probably diverged."
            )
        self._updates[client] = ({key: t.clone() for key, t in update.items()}, weight)

    def result(self) -> AdapterState:
        """Return the new global adapter, and measure how far it is from the mean of the products.

        Raises:
            RejectedUpdateError: there was no update.
        """
        if not self._updates:
            raise RejectedUpdateError("No update was added, so there is nothing to average.")
        result, errors = {}, ProductErrors()
        for module, (key_a, key_b) in module_keys(self._state).items():
            found = self._read(module, key_a, key_b)
            a, b = self.combine(found)
            result[key_a], result[key_b] = a.float(), b.float()
            wanted_a, wanted_b = self.target(found)
            error = product_norm(torch.cat([wanted_a, a]), torch.cat([wanted_b, -b], 1))
            errors.note(module, error, product_norm(a, b))
        self.errors = errors
        return {key: result[key] for key in self._state}

    def target(self, module: Module) -> Factors:
        """Return A and B whose product is what the new adapter should do: the mean of all."""
        return module.stacked

    @abstractmethod
    def combine(self, module: Module) -> Factors:
        """Return a module's new A and B."""

    def _read(self, name: str, key_a: str, key_b: str) -> Module:
        updates = [self._updates[client] for client in sorted(self._updates)]
        total = sum(weight for _, weight in updates)
        return Module(
            name,
            (self._state[key_a].double(), self._state[key_b].double()),
            [
                (_add(self._state, update, key_a), _add(self._state, update, key_b))
                for update, _ in updates
            ],
            [weight / total for _, weight in updates],
        )


def module_keys(state: AdapterState) -> dict[str, tuple[str, str]]:
    """Return the keys of A and B of every module, by the module's name."""
    return {
        key.removeprefix("base_model.model.").split(".lora_A.")[0]: (
            key,
            key.replace(".lora_A.", ".lora_B."),
        )
        for key in state
        if ".lora_A." in key
    }


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return ||B A||, Frobenius, without forming it: of the triangular parts' product."""
    return (triangle(b) @ triangle(a.T).T).norm().item()


def triangle(matrix: torch.Tensor) -> torch.Tensor:
    """Return R of QR, which has the column's lengths and angles."""
    return torch.linalg.qr(matrix, mode="r").R


def _add(state: AdapterState, update: AdapterState, key: str) -> torch.Tensor:
    """Return what a client trained, fp64: it started from the first ranks of the state."""
    axis = rank_axis(key)
    received = state[key].narrow(axis, 0, update[key].shape[axis])
    return received.double() + update[key].double()
