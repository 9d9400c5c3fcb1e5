"""FedEx-LoRA (Singhal et al. 2024, https://arxiv.org/abs/2410.09432): the mean, and what it misses.

A and B are averaged apart, and the residual sum_k p_k B_k A_k - B_mean A_mean is added beside
them. The paper adds it to the base model's weights; here it goes to the frozen part of the global
adapter, of ``adapters.global.frozen_rank``, so that the base stays as it is, quantised or not,
and the part can be taken away again. The part of earlier rounds, F, stays in it: it is the best
of its rank for F + residual, by SVD of the factors, and exact where that rank suffices.
"""

from __future__ import annotations

import torch

from fedlora_app.federation.rules.collecting import Factors, Module
from fedlora_app.federation.rules.svd import CuttingRule, compress


class FrozenPartRule(CuttingRule):
    """A rule that keeps a part of what clients did in ranks that they do not train."""

    @property
    def learning_rank(self) -> int:
        """Ranks that clients train, which come first."""
        return self.config.adapters.global_.rank

    def split(self, module: Module) -> tuple[Factors, Factors]:
        """Return what clients received to train, and the frozen part beside it."""
        a, b = module.received
        rank = self.learning_rank
        return (a[:rank], b[:, :rank]), (a[rank:], b[:, rank:])

    def target(self, module: Module) -> Factors:
        """Return the mean of what clients have trained, and what was frozen before beside it."""
        _, (frozen_a, frozen_b) = self.split(module)
        a, b = module.stacked
        return torch.cat([frozen_a, a]), torch.cat([frozen_b, b], 1)

    def freeze(self, a: torch.Tensor, b: torch.Tensor) -> Factors:
        """Return the best factors of the frozen part's rank for a product."""
        a, b, singular = compress(a, b)
        size = self.config.adapters.global_.frozen_rank
        self.note_energy(singular, size)
        missing = max(0, size - len(singular))
        padding_a, padding_b = a.new_zeros(missing, a.shape[1]), b.new_zeros(b.shape[0], missing)
        return torch.cat([a[:size], padding_a]), torch.cat([b[:, :size], padding_b], 1)


class Residual(FrozenPartRule):
    """The means of A and B, and beside them the residual."""

    def combine(self, module: Module) -> Factors:
        """Return means, and the frozen part with what they miss."""
        (wanted_a, wanted_b), (mean_a, mean_b) = self.target(module), module.mean
        a, b = self.freeze(torch.cat([wanted_a, mean_a]), torch.cat([wanted_b, -mean_b], 1))
        return torch.cat([mean_a, a]), torch.cat([mean_b, b], 1)
