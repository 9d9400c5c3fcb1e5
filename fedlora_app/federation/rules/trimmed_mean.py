"""The coordinate-wise trimmed mean (Yin et al. 2018, https://arxiv.org/abs/1803.01498, def. 2).

Of each entry the largest and the smallest ``federated.trim_share`` of the clients' values are
left out, rounded down, and the others averaged, every client alike. scipy's trim_mean is the one
after which Flower's FedTrimmedAvg is made.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import trim_mean

from fedlora_app.federation.rules.collecting import CollectingRule, Factors, Module


class TrimmedMean(CollectingRule):
    """The mean of the middle values of each entry of A and of B."""

    def combine(self, module: Module) -> Factors:
        """Return the trimmed means."""
        share = self.config.federated.trim_share
        stacks = (np.sort(stack, axis=0) for stack in module.by_client)
        a, b = (torch.from_numpy(trim_mean(stack, share, axis=0)) for stack in stacks)
        return a, b
