"""The sum of all examples' gradients, each of them scaled down to a bound first.

No example's gradient is ever in memory, only one linear layer's part of one example at a time
("ghost clipping": Goodfellow 2015, https://arxiv.org/abs/1510.01799; Li et al. 2022,
https://arxiv.org/abs/2110.05679). A linear layer's gradient of an example is the sum over its
tokens of outer products: of what goes in and of the gradient of what comes out. So a first backward
pass adds up the squares of these sums, (r, in) or (out, r), which at a low rank take less work than
the products of all pairs of tokens. A second one over the same graph weighs each token's outer
product by min(1, C / norm) of its example. As the product is weighed and not the loss, what runs
back through the model is the same in both passes, so that in bf16 too the bound holds for what is
added up, and not for something that was rounded in another way.

Own code, because opacus 1.6 takes a row of a batch for an example, where here a row holds several;
refuses a layer that runs twice, as gradient checkpointing has it do; and wraps the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from fedlora_app.config.schema import GLOBAL
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapters import AdaptedModel, adapter_parameters, lora_layers

Take = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""From a layer's inputs and the gradient of its outputs to that of its weight."""
OTHERS = "Choose others by adapters.global.target_modules, or set privacy.unit to client."


class ClippingError(UserError):
    """What a single example adds to a gradient cannot be bounded."""


@contextmanager
def clipping_examples(model: AdaptedModel, clip_norm: float) -> Iterator[ClippedGradients]:
    """Have the global adapter's layers tell examples apart in backward passes of the block.

    Raises:
        ClippingError: something learns that is no linear layer of the global adapter.
    """
    linears = _find_linears(model)
    parameters = [p for p in adapter_parameters(model, GLOBAL) if p.requires_grad]
    gradients = ClippedGradients(parameters, clip_norm)
    for linear in linears:
        linear.forward = MethodType(gradients.forward, linear)
    try:
        yield gradients
    finally:
        for linear in linears:
            del linear.forward


class ClippedGradients:
    """What adds clipped gradients to ``grad``, one micro-batch after the other."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], clip_norm: float) -> None:
        self.parameters = list(parameters)
        self._clip_norm = clip_norm
        # Of the micro-batch at hand:
        self._spans: Sequence[slice] = ()
        self._squares = torch.zeros(0)  # (E,), of the norms, fp64
        self._weights: torch.Tensor | None = None  # (E,); None while norms are measured
        self._seen: set[torch.nn.Linear] = set()

    def add(self, losses: torch.Tensor, spans: Sequence[slice]) -> None:
        """Add every example's gradient to ``grad``, with an L2 norm of at most the bound.

        Args:
            losses: (E,), each of one example alone.
            spans: each example's rows among all that pass through the layers.

        Raises:
            ClippingError: a norm is not finite, or it is not known what belongs to an example.
        """
        norms = self.measure(losses, spans)
        if not norms.isfinite().all():
            raise ClippingError(
                "The gradient of an example is not finite, so it has no bound. Lower "
                "training.learning_rate."
            )
        self._weights = (self._clip_norm / norms).clamp(max=1)
        self._seen.clear()
        losses.sum().backward()

    def measure(self, losses: torch.Tensor, spans: Sequence[slice]) -> torch.Tensor:
        """Return the norms (E,) of the examples' gradients, fp64; the graph stays.

        Raises:
            ClippingError: as for ``add``.
        """
        self._spans, self._weights = spans, None
        self._squares = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        self._seen.clear()
        passed_by = torch.autograd.grad(
            losses.sum(), self.parameters, retain_graph=True, allow_unused=True
        )
        if any(gradient is not None for gradient in passed_by):
            raise ClippingError(
                "The global adapter learns by other ways than its linear layers, for which no "
                f"bound of a single record is known. {OTHERS}"
            )
        return self._squares.sqrt()

    def forward(self, linear: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        """Return what a linear layer does; its weight's gradient is then asked for here."""
        return _LinearByExample.apply(inputs, linear.weight, partial(self._take, linear))

    def _take(
        self, linear: torch.nn.Linear, inputs: torch.Tensor, gradients: torch.Tensor
    ) -> torch.Tensor | None:
        """Measure, or return the gradient of a layer's weight, of clipped examples.

        Args:
            inputs: (..., in), gradients: of its outputs (..., out).
        """
        self._require_known(linear, gradients)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        inputs = inputs.flatten(0, -2).to(dtype)
        gradients = gradients.flatten(0, -2).to(dtype)
        if self._weights is None:
            squares = [
                (gradients[span].T @ inputs[span]).square().sum(dtype=torch.float64)
                for span in self._spans
            ]
            self._squares += torch.stack(squares)
            return None
        lengths = torch.tensor([span.stop - span.start for span in self._spans])
        by_token = self._weights.repeat_interleave(lengths.to(gradients.device))
        weighed = gradients * by_token.to(dtype)[:, None]
        return (weighed.T @ inputs).to(linear.weight.dtype)

    def _require_known(self, linear: torch.nn.Linear, gradients: torch.Tensor) -> None:
        """Raise unless a layer is run once and on all tokens: else norms are not what they say.

        Whoever sends some tokens elsewhere, as a mixture does to its experts, has them in an order
        that is not known here.
        """
        num_rows = gradients.shape[:-1].numel()
        if linear in self._seen or num_rows != self._spans[-1].stop:
            raise ClippingError(
                "A layer of the base model that has the global adapter is run on a part of the "
                "tokens, or more than once, so that a single record's part in its gradient is not "
                f"known. {OTHERS}"
            )
        self._seen.add(linear)


class _LinearByExample(torch.autograd.Function):
    """A linear layer without bias that leaves its weight's gradient to ``ClippedGradients``.

    A function and no hooks: its backward pass runs once, however often a checkpoint runs the layer.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, take: Take) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.take = take
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(
        ctx: Any, gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        to_inputs = gradients @ weight if ctx.needs_input_grad[0] else None
        to_weight = ctx.take(inputs, gradients) if ctx.needs_input_grad[1] else None
        return to_inputs, to_weight, None


def _find_linears(model: AdaptedModel) -> list[torch.nn.Linear]:
    """Return the global adapter's linear layers; raise ``ClippingError`` where others learn too."""
    head = model.get_base_model().get_output_embeddings()
    layers = lora_layers(model, GLOBAL)
    linears = [part[GLOBAL] for layer in layers for part in (layer.lora_A, layer.lora_B)]
    are_plain = all(type(linear) is torch.nn.Linear and linear.bias is None for linear in linears)
    known = {id(linear.weight) for linear in linears}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if head in layers:
        others.append("the output layer, which is run on answers only")
    if not are_plain or others:
        what = ", ".join(others[:3]) or "a layer that is not linear"
        raise ClippingError(
            "With privacy.unit: record only linear layers of the global adapter may learn, and "
            f"here {what} would too. {OTHERS}"
        )
    return linears
