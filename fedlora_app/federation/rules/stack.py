"""FLoRA (Wang et al. 2024, https://arxiv.org/abs/2409.05976): the clients' adapters side by side.

[p_1 B_1, ..., p_K B_K] [A_1; ...; A_K] = sum_k p_k B_k A_k, whatever the clients' ranks. The
paper adds that product to the base model's weights and begins every round with a fresh adapter.
Here it goes to the frozen part of the global adapter, of ``adapters.global.frozen_rank``, beside
those of the rounds before, as in ``residual``; the ranks that clients train begin anew, with B
zero.
"""

from __future__ import annotations

import math

import torch

from fedlora_app.federation.rules.collecting import Factors, Module
from fedlora_app.federation.rules.residual import FrozenPartRule
from fedlora_app.foundation.seeds import derive_seed


class Stack(FrozenPartRule):
    """All that the clients did, frozen, and a fresh adapter beside it."""

    def combine(self, module: Module) -> Factors:
        """Return a fresh adapter, and the frozen part with the mean of the products."""
        (a, b), _ = self.split(module)
        new_a, new_b = self.freeze(*self.target(module))
        seed = derive_seed(self.config.experiment.seed, "fresh", self._round, module.name)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(a.shape[1])  # as in the first round
        fresh = torch.empty(a.shape).uniform_(-bound, bound, generator=generator).double()
        return torch.cat([fresh, new_a]), torch.cat([torch.zeros_like(b), new_b], 1)
