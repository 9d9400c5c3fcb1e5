"""The coordinate-wise median (Yin et al. 2018, https://arxiv.org/abs/1803.01498, definition 1).

Of K clients fewer than half can send what they like without moving it far. It does not weight: a
client of many examples counts as one of few. It needs three clients; the median of two is their
mean. numpy's median is what Flower's FedMedian applies to whole models.
"""

from __future__ import annotations

import numpy as np
import torch

from fedlora_app.federation.rules.collecting import CollectingRule, Factors, Module


class Median(CollectingRule):
    """The median of each entry of A and of B."""

    def combine(self, module: Module) -> Factors:
        """Return the medians."""
        a, b = (torch.from_numpy(np.median(stack, axis=0)) for stack in module.by_client)
        return a, b
