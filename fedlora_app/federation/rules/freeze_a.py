"""FFA-LoRA (Sun et al. 2024, https://arxiv.org/abs/2403.12313): A stays as it was drawn.

Clients train and send B alone, so that sum_k p_k B_k A = (sum_k p_k B_k) A: the mean is exact, and
half of the adapter travels.
"""

from __future__ import annotations

from fedlora_app.federation.rules.fedavg import FedAvg


class FreezeA(FedAvg):
    """The weighted mean of the updates of B."""
