"""FedProx: the global adapter is held near the one that was received while a client trains it.

Li et al. 2020, https://arxiv.org/abs/1812.06127, equation 2: a client minimises
F_k(w) + mu/2 ||w - w_t||^2 instead of its own F_k, w_t being what the server sent: the mean of
all clients' updates, from which one client's data would otherwise draw it away. Where nothing is
averaged there is no such w_t, and no term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlora_app.config.schema import AVERAGING_MODES, Config, TrainingConfig


class ProximalTerm:
    """mu/2 ||w - w_t||^2 over the global adapter's parameters, w_t being what they are now.

    The gradient mu (w - w_t) is added as it stands, and not by autograd, which would keep every
    difference until the backward pass.

    Args:
        parameters: the global adapter's, as they were received; a copy stays on their device.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], mu: float) -> None:
        self._mu = mu
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def add_gradient(self) -> float:
        """Add the term's gradient to what the loss has left in ``grad``; return the term.

        To be called once a step, after the last backward pass and before gradients are clipped: it
        belongs to what is minimised.
        """
        squares = torch.zeros((), device=self._pairs[0][0].device)
        for parameter, received in self._pairs:
            if parameter.grad is None:  # no part of any loss, so it has not moved either
                continue
            distance = parameter - received
            parameter.grad.add_(distance, alpha=self._mu)
            squares += distance.square().sum()
        return self._mu / 2 * squares.item()


def without_idle_term(config: Config) -> TrainingConfig:
    """Return the training's settings, without ``proximal_mu`` where it has no effect.

    In mode centralized one client has everybody's data and gets back what it sent: the term would
    hold each round near the end of the one before, and be no FedProx.
    """
    if config.federated.mode in AVERAGING_MODES:
        return config.training
    return config.training.model_copy(update={"proximal_mu": 0.0})
