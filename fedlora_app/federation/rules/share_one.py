"""FedSA-LoRA (Guo et al. 2024, https://arxiv.org/abs/2410.01463), and its mirror.

Clients train A and B; only the mean of A (share-a) or of B (share-b) is taken, and the other
factor stays with each client, which has a global adapter of its own: mean A, own B. Whether A or
B is what clients have in common the literature does not agree on. The server's own adapter has
the factor that does not travel as it began, so with share-a it adds nothing by itself.
"""

from __future__ import annotations

from fedlora_app.federation.rules.fedavg import FedAvg


class ShareA(FedAvg):
    """The weighted mean of the updates of A."""


class ShareB(FedAvg):
    """The weighted mean of the updates of B."""
