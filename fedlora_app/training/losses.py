"""The loss at answer positions, with few rows of logits in memory at a time.

Logits for a whole batch would need gigabytes with Qwen's 152,064 tokens. So the head is applied at
answer positions only and in chunks; and where it is frozen, as it nearly always is, each chunk's
gradient is taken in the forward pass and its logits are let go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel, scaled_local
from fedlora_app.model.head import Head, find_head
from fedlora_app.training.kept_states import KeptStates
from fedlora_app.training.layout import Batch, Layout, compute_hidden_states, pad

LOGIT_ROWS = 256  # 156 MB in fp32 with a vocabulary of 152,064


def answer_log_likelihoods(model: AdaptedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Return each example's log-likelihoods, one per answer token, fp32."""
    hidden, batch = _answer_states(model, examples, pad)
    losses = token_losses(find_head(model.get_base_model()), hidden, batch.targets)
    return list((-losses).split(batch.counts))


def compute_example_losses(
    model: AdaptedModel,
    examples: Sequence[Example],
    lay_out: Layout,
    kept: KeptStates | None = None,
) -> tuple[torch.Tensor, list[slice]]:
    """Return each example's mean loss over its own answer (E,), and its rows among all tokens'.

    No example's loss depends on which others lie beside it. Arguments as for ``compute_losses``.
    """
    hidden, batch = _answer_states(model, examples, lay_out, kept)
    losses = token_losses(find_head(model.get_base_model()), hidden, batch.targets)
    return torch.stack([part.mean() for part in losses.split(batch.counts)]), batch.spans


def compute_losses(
    model: AdaptedModel,
    examples: Sequence[Example],
    penalised: TrainingConfig | None,
    lay_out: Layout,
    kept: KeptStates | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of every answer token, and how far others' ones are from global alone.

    The latter is KL(global || global + local) at every answer token of the replayed and the public
    examples, or None where it has no weight; the reference is the same model with the local adapter
    at scale 0. Public ones have no loss.

    Args:
        lay_out: how the examples lie; ``pack`` within ``packed_attention`` only.
        kept: fills itself with the examples' states and gives those that it has.
    """
    head = find_head(model.get_base_model())
    hidden, batch = _answer_states(model, examples, lay_out, kept)
    targets, counts = batch.targets, batch.counts
    learnt = _find_tokens(counts, [not example.is_public for example in examples])
    if len(learnt) == len(hidden):
        losses = token_losses(head, hidden, targets)
    else:
        learnt = learnt.to(hidden.device)
        losses = token_losses(head, hidden[learnt], targets[learnt])
    others = [example for example in examples if not example.is_own]
    if penalised is None or penalised.local_kl_weight == 0 or not others:
        return losses, None
    with torch.no_grad(), scaled_local(model, 0.0):
        # The local adapter's layers are those that learn, so that kept states are global alone's.
        reference, _ = _answer_states(model, others, lay_out, kept)
    places = _find_tokens(counts, [not example.is_own for example in examples])
    return losses, _token_divergences(head, hidden[places.to(hidden.device)], reference)


def _find_tokens(counts: Sequence[int], chosen: Sequence[bool]) -> torch.Tensor:
    """Return the places of the chosen examples' answer tokens among those of all examples."""
    return torch.tensor(chosen).repeat_interleave(torch.tensor(counts)).nonzero()[:, 0]


def token_losses(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every position, fp32, holding few rows of logits at a time.

    Args:
        hidden: (N, D), targets: (N,) token ids.
    """
    if type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return _FrozenHeadLosses.apply(hidden, head.weight, head.bias, targets)

    def losses(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(rows).float(), wanted, reduction="none")

    parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


class _FrozenHeadLosses(torch.autograd.Function):
    """Cross-entropy behind a frozen head, whose gradient to the hidden states is kept at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            wanted = targets[rows, None]
            logits = functional.linear(hidden[rows], weight, bias).float()  # (rows, V)
            logits -= logits.amax(-1, keepdim=True)
            losses[rows] = -logits.gather(1, wanted)[:, 0]
            total = logits.exp_().sum(-1, keepdim=True)
            losses[rows] += total.log()[:, 0]
            if gradients is not None:
                probabilities = logits.div_(total)
                probabilities.scatter_add_(1, wanted, -torch.ones_like(total))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradients[rows])
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (weights[:, None] * gradients).to(gradients.dtype), None, None, None


def _token_divergences(head: Head, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model) at every position, fp32, few rows of logits at a time."""

    def divergences(rows: torch.Tensor, reference_rows: torch.Tensor) -> torch.Tensor:
        log_probs = head(rows).float().log_softmax(-1)
        reference_log_probs = head(reference_rows).float().log_softmax(-1)
        losses = functional.kl_div(
            log_probs, reference_log_probs, log_target=True, reduction="none"
        )
        return losses.sum(-1)

    parts = zip(hidden.split(LOGIT_ROWS), reference.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(divergences, *part, use_reentrant=False) for part in parts])


def _answer_states(
    model: AdaptedModel,
    examples: Sequence[Example],
    lay_out: Layout,
    kept: KeptStates | None = None,
) -> tuple[torch.Tensor, Batch]:
    """Return the hidden states that predict answer tokens (N, D), and how all examples lie."""
    batch = lay_out(examples, model.device)
    if kept is None:
        hidden = compute_hidden_states(model.get_base_model(), batch)
    else:
        hidden = kept.compute_hidden_states(batch, examples)
    return hidden.index_select(0, batch.predicting), batch
