"""raFLoRA (Wu et al. 2026, https://arxiv.org/abs/2602.13486): each rank by those who have it.

With ``svd`` and clients of several ranks, what only the clients of high rank contribute is weighted
as if all did, round after round, so that the high ranks die out. Here rank i of the product is the
mean over the clients with r_k > i alone,

M = sum_i sum_{k: r_k > i} n_k / (sum_{j: r_j > i} n_j) b_ki a_ki',

with the columns b_ki of B_k and the rows a_ki of A_k; then M is cut and split as in ``svd``, which
it is where all ranks are equal.
"""

from __future__ import annotations

import torch

from fedlora_app.federation.rules.collecting import Factors, Module
from fedlora_app.federation.rules.svd import Svd


class RankPartitioned(Svd):
    """The best adapter of the rank for the mean over those who have each rank."""

    def target(self, module: Module) -> Factors:
        """Return A and B whose product is M."""
        ranks = torch.tensor([a.shape[0] for a, _ in module.trained])
        shares = torch.tensor(module.shares, dtype=torch.float64)
        weighted = []
        for (_, b), rank, share in zip(module.trained, ranks, shares, strict=True):
            totals = [shares[ranks > i].sum() for i in range(int(rank))]
            weighted.append(b * (share / torch.stack(totals)))
        return torch.cat([a for a, _ in module.trained]), torch.cat(weighted, dim=1)
