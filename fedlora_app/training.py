"""One phase of training: an explicit loop over answer tokens, in plain torch.

In go examples, which adapters are active and which of them learn, and where in the run the
phase lies; the adapters' weights change in place and the phase's figures come out.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora_app.adapters import AdaptedModel, activate, adapter_parameters
from fedlora_app.config import TrainingConfig
from fedlora_app.seeds import derive_seed
from fedlora_app.tokens import Example

# The optimizer starts afresh in every phase, because the server has moved what it tracks;
# the usual 0.999 would still be warming up when a short phase ends.
ADAM_BETAS = (0.9, 0.99)
LOGIT_ROWS = 512  # 311 MB in fp32 with a vocabulary of 152,064
CHECKPOINTING_THRESHOLD = 1_000_000_000  # parameters from which "auto" means on

Progress = Callable[[int, int, float], None]  # step, number of steps, loss


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because the loss is not finite."""


@dataclass(frozen=True)
class PhaseResult:
    """What one phase did. Losses are means over answer tokens, in nats."""

    num_steps: int
    num_examples: int
    num_answer_tokens: int
    train_loss: float
    final_train_loss: float
    seconds: float


def count_steps(num_examples: int, epochs: int, training: TrainingConfig) -> int:
    """Return the optimizer steps of ``epochs`` passes over ``num_examples`` examples."""
    per_step = training.batch_size * training.gradient_accumulation_steps
    return epochs * math.ceil(num_examples / per_step)


def train_phase(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    *,
    active: Sequence[str],
    trainable: Sequence[str],
    num_steps: int,
    run_span: tuple[float, float],
    weight_decays: dict[str, float],
    seed: int,
    pad_token_id: int,
    progress: Progress | None = None,
) -> PhaseResult:
    """Train the adapters ``trainable`` for ``num_steps`` optimizer steps.

    Args:
        run_span: where the phase begins and ends in the adapter's whole run, each in
            [0, 1]; the learning-rate schedule is read off there.
        seed: decides the order of examples and the dropout.

    Raises:
        TrainingError: the loss is not finite.
    """
    activate(model, active, trainable)
    torch.manual_seed(seed)
    _set_checkpointing(model, training)
    model.train()
    optimizer = _build_optimizer(model, training, {n: weight_decays[n] for n in trainable})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = next(model.parameters()).device
    losses: list[float] = []
    num_answer_tokens = 0
    started = time.monotonic()
    batches = islice(_step_batches(examples, training, seed), num_steps)
    for step, batch in enumerate(batches):
        position = run_span[0] + (run_span[1] - run_span[0]) * step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule_factor(position, training)
        num_tokens = sum(example.num_answer_tokens for example in batch)
        loss = 0.0
        for start in range(0, len(batch), training.batch_size):
            micro_batch = batch[start : start + training.batch_size]
            log_likelihoods = answer_log_likelihoods(model, micro_batch, pad_token_id, device)
            micro_loss = -torch.cat(log_likelihoods).sum() / num_tokens
            micro_loss.backward()
            loss += micro_loss.item()
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss became {loss} at step {step + 1} of {num_steps}. Lower "
                f"training.learning_rate (it is {training.learning_rate:g})."
            )
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        num_answer_tokens += num_tokens
        if progress is not None:
            progress(step + 1, num_steps, loss)
    model.eval()
    return PhaseResult(
        num_steps=num_steps,
        num_examples=len(examples),
        num_answer_tokens=num_answer_tokens,
        train_loss=sum(losses) / len(losses),
        final_train_loss=losses[-1],
        seconds=time.monotonic() - started,
    )


def schedule_factor(position: float, training: TrainingConfig) -> float:
    """Return the learning rate at ``position`` in [0, 1] of the run, relative to its peak."""
    if position < training.warmup_ratio:
        return min(1.0, max(position, 1e-3) / training.warmup_ratio)
    progress = (position - training.warmup_ratio) / (1 - training.warmup_ratio)
    floor = training.final_learning_rate_ratio
    if training.lr_scheduler == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if training.lr_scheduler == "linear":
        return 1 - (1 - floor) * progress
    return 1.0


def answer_log_likelihoods(
    model: AdaptedModel,
    examples: Sequence[Example],
    pad_token_id: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Return each example's log-likelihoods, one per answer token, fp32.

    Padding is on the right, where causal attention keeps it out of sight of every real
    token, so no mask is passed. The head is applied at answer positions only: logits for
    the whole prompt would need gigabytes with Qwen's 152,064 tokens.
    """
    longest = max(len(example.input_ids) for example in examples)
    rows = [ex.input_ids + [pad_token_id] * (longest - len(ex.input_ids)) for ex in examples]
    input_ids = torch.tensor(rows, device=device)  # (B, T)
    inner = model.get_base_model()
    hidden = inner.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
    predicting = [
        hidden[row, example.answer_start - 1 : len(example.input_ids) - 1]
        for row, example in enumerate(examples)
    ]
    targets = [
        input_ids[row, example.answer_start : len(example.input_ids)]
        for row, example in enumerate(examples)
    ]
    losses = _token_losses(inner.get_output_embeddings(), torch.cat(predicting), torch.cat(targets))
    return list((-losses).split([len(target) for target in targets]))


def _token_losses(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of every position, fp32, holding few rows of logits at a time.

    Args:
        hidden: (N, D), targets: (N,) token ids.
    """

    def losses(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(rows).float(), wanted, reduction="none")

    if len(hidden) <= LOGIT_ROWS:
        return losses(hidden, targets)
    parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def _step_batches(
    examples: Sequence[Example], training: TrainingConfig, seed: int
) -> Iterator[list[Example]]:
    """Yield one optimizer step's examples after another, epoch after epoch."""
    per_step = training.batch_size * training.gradient_accumulation_steps
    for epoch in count():
        order = list(range(len(examples)))
        random.Random(derive_seed(seed, "shuffle", epoch)).shuffle(order)
        for start in range(0, len(order), per_step):
            yield [examples[index] for index in order[start : start + per_step]]


def _build_optimizer(
    model: AdaptedModel, training: TrainingConfig, weight_decays: dict[str, float]
) -> torch.optim.Optimizer:
    """Return AdamW over the trainable adapters, one parameter group each."""
    groups = [
        {"params": adapter_parameters(model, name), "weight_decay": weight_decay}
        for name, weight_decay in weight_decays.items()
    ]
    if training.optimizer == "paged_adamw_8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, lr=training.learning_rate, betas=ADAM_BETAS)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=ADAM_BETAS, foreach=True)


def _set_checkpointing(model: AdaptedModel, training: TrainingConfig) -> None:
    inner = model.get_base_model()
    wanted = training.gradient_checkpointing
    if wanted == "auto":
        on_gpu = next(inner.parameters()).device.type == "cuda"
        wanted = on_gpu and inner.num_parameters() >= CHECKPOINTING_THRESHOLD
    if wanted and not inner.is_activation_checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    elif not wanted and inner.is_activation_checkpointing:
        inner.activation_checkpointing_disable()
