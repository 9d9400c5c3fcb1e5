"""FedProx: the global adapter is held near the one that was received while a client trains it.

Li et al. 2020, https://arxiv.org/abs/1812.06127, equation 2: a client minimises
F_k(w) + mu/2 ||w - w_t||^2 instead of its own F_k, w_t being what the server sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import Config


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


def describe_proximal(config: Config) -> Iterator[str]:
    """Yield a warning where ``training.proximal_mu`` is set and no global adapter is trained."""
    if config.training.proximal_mu > 0 and plan_round(config, 1).train is None:
        yield (
            f"Warning: training.proximal_mu {config.training.proximal_mu:g} has no effect: mode "
            f"{config.federated.mode} trains no global adapter."
        )
