"""RoLoRA (Chen et al. 2024, https://arxiv.org/abs/2409.02346): B in odd rounds, A in even ones.

Where only one factor learns in a round the other one is the same at all clients, and the mean is
exact: sum_k p_k B_k A = (sum_k p_k B_k) A, and B sum_k p_k A_k likewise. Half of the adapter
travels. B comes first, because it begins as zero, with which A has no gradient.
"""

from __future__ import annotations

from fedlora_app.federation.rules.fedavg import FedAvg


class Alternate(FedAvg):
    """The weighted mean of the updates of the factor that this round trains."""
