"""FlexLoRA (Bai et al. 2024, https://arxiv.org/abs/2402.11505): the mean of what adapters do.

M = sum_k p_k B_k A_k is cut to its r largest singular values, M ~ U S V', and split evenly: B = U
sqrt(S), A = sqrt(S) V'. M itself is never formed: QR of the stacked factors [p_k B_k] and [A_k]'
leaves an SVD of (sum_k r_k)^2 numbers. Clients may have different ranks; each gets as many of the
singular directions, the largest first. With ``federated.svd_energy`` a module has no more of them
than hold that share of sum s_i^2 (FLoRIST, Ramesh et al. 2025, https://arxiv.org/abs/2506.09199).

A direction that carries nothing keeps the received row of A, with B zero, so that it can learn.
"""

from __future__ import annotations

import torch

from fedlora_app.federation.rules.collecting import CollectingRule, Factors, Module
from fedlora_app.model.adapter_state import AdapterState

NOTHING = 1e-12
"""Of the largest singular value: what rounding in fp64 leaves where there is nothing."""


class CuttingRule(CollectingRule):
    """A rule that cuts products to a rank, and says which share of their energy is left."""

    def begin(self, state: AdapterState, server_round: int) -> None:
        """Start a round without an update."""
        super().begin(state, server_round)
        self._kept = self._all = 0.0

    def result(self) -> AdapterState:
        """Return the new global adapter, and the share of all modules' energy that is kept.

        Raises:
            RejectedUpdateError: there was no update.
        """
        state = super().result()
        if self._all > 0:
            self.figures["captured_energy"] = self._kept / self._all
        return state

    def note_energy(self, singular: torch.Tensor, num_kept: int) -> None:
        """Take down a module's singular values, the largest first, of which so many are kept."""
        self._kept += singular[:num_kept].square().sum().item()
        self._all += singular.square().sum().item()


class Svd(CuttingRule):
    """The best adapter of the rank for the mean of the products."""

    def combine(self, module: Module) -> Factors:
        """Return the largest directions of M."""
        a, b, singular = compress(*self.target(module))
        rank = module.received[0].shape[0]
        carrying = min(rank, count_directions(singular, self.config.federated.svd_energy))
        self.note_energy(singular, carrying)
        new_a, new_b = module.received[0].clone(), torch.zeros_like(module.received[1])
        new_a[:carrying], new_b[:, :carrying] = a[:carrying], b[:, :carrying]
        return new_a, new_b


def compress(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A and B of the same product, with orthogonal rows and columns, and singular values.

    The largest come first; each is split evenly between A and B.
    """
    basis_b, triangle_b = torch.linalg.qr(b)
    basis_a, triangle_a = torch.linalg.qr(a.T)
    left, singular, right = torch.linalg.svd(triangle_b @ triangle_a.T, full_matrices=False)
    root = singular.sqrt()
    return (root[:, None] * right) @ basis_a.T, basis_b @ (left * root), singular


def count_directions(singular: torch.Tensor, energy: float | None = None) -> int:
    """Return how many singular values are not nothing, or the fewest with a share of the energy."""
    if len(singular) == 0 or singular[0] == 0:
        return 0
    carrying = int((singular > NOTHING * singular[0]).sum())
    if energy is None:
        return carrying
    shares = singular.square().cumsum(0) / singular.square().sum()
    return min(carrying, int((shares < energy).sum()) + 1)
