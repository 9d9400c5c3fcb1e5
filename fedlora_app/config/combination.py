"""How a client's global and local adapter can answer together, by name."""

from __future__ import annotations

from typing import Literal

from fedlora_app.config.schema import AdaptersConfig

Combination = Literal["scale", "gate", "instance", "search", "mixer"]
SCALE: Combination = "scale"
"""Both, the local one times the scale (lambda)."""
GATE: Combination = "gate"
"""A gate leaves to the global adapter what is not the client's own."""
INSTANCE: Combination = "instance"
"""Weights by how like each question is to local training questions (FedDPA)."""
SEARCH: Combination = "search"
"""Constant weights, searched for on validation questions (FDLoRA)."""
MIXER: Combination = "mixer"
"""Shares by layer and token, trained on the client's own data (FedALT)."""
COMBINATIONS = (SCALE, GATE, INSTANCE, SEARCH, MIXER)
SHARING = (INSTANCE, SEARCH, MIXER)
"""Those that weigh the global adapter too, so that the local one may be a copy of it."""


def as_configured(config: AdaptersConfig) -> Combination:
    """Return how pairs answer where nothing else is asked for."""
    return SCALE if config.gate == "none" else GATE
