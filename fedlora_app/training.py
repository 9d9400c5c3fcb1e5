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

from fedlora_app.adapters import (
    AdaptedModel,
    activate,
    adapter_parameters,
    compute_overlap,
    scaled_local,
)
from fedlora_app.config import GLOBAL, LOCAL, TrainingConfig
from fedlora_app.memory import read_peak_memory, reset_peak_memory
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
    penalty: float
    """What protects the global adapter's knowledge, with its weights; not part of the losses."""
    seconds: float
    peak_memory_bytes: int
    """As ``memory`` defines it: of this phase on a GPU, of the process on a CPU."""
    memory_retries: int = 0
    """Times that it ran out of memory before, and was begun again with smaller batches."""


def use_less_memory(training: TrainingConfig) -> TrainingConfig:
    """Return settings with half the batch or less, as many examples a step, and checkpointing."""
    per_step = training.batch_size * training.gradient_accumulation_steps
    most = max(1, training.batch_size // 2)
    batch_size = max(size for size in range(1, most + 1) if per_step % size == 0)
    changes = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": per_step // batch_size,
        "gradient_checkpointing": True,
    }
    return training.model_copy(update=changes)


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
    reset_peak_memory(model.device)
    _set_checkpointing(model, training)
    model.train()
    optimizer = _build_optimizer(model, training, {n: weight_decays[n] for n in trainable})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    protects_global = tuple(trainable) == (LOCAL,) and GLOBAL in active and _has_penalty(training)
    step_losses: list[float] = []
    penalties: list[float] = []
    num_answer_tokens = 0
    started = time.monotonic()
    batches = islice(_step_batches(examples, training, seed), num_steps)
    for step, batch in enumerate(batches):
        position = run_span[0] + (run_span[1] - run_span[0]) * step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * schedule_factor(position, training)
        num_tokens = sum(example.num_answer_tokens for example in batch)
        loss = penalty = 0.0
        for start in range(0, len(batch), training.batch_size):
            micro_batch = batch[start : start + training.batch_size]
            losses, micro_penalty = _compute_losses(
                model, micro_batch, training if protects_global else None, pad_token_id
            )
            micro_loss = losses.sum() / num_tokens
            loss += micro_loss.item()
            if micro_penalty is not None:
                share = len(micro_batch) / len(batch)
                micro_loss = micro_loss + share * micro_penalty
                penalty += share * micro_penalty.item()
            micro_loss.backward()
        if not math.isfinite(loss + penalty):
            raise TrainingError(
                f"The loss became {loss + penalty} at step {step + 1} of {num_steps}. Lower "
                f"training.learning_rate (it is {training.learning_rate:g})."
            )
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_losses.append(loss)
        penalties.append(penalty)
        num_answer_tokens += num_tokens
        if progress is not None:
            progress(step + 1, num_steps, loss)
    model.eval()
    return PhaseResult(
        num_steps=num_steps,
        num_examples=len(examples),
        num_answer_tokens=num_answer_tokens,
        train_loss=sum(step_losses) / len(step_losses),
        final_train_loss=step_losses[-1],
        penalty=sum(penalties) / len(penalties),
        seconds=time.monotonic() - started,
        peak_memory_bytes=read_peak_memory(model.device),
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
    hidden, targets, counts = _answer_states(model, examples, pad_token_id, device)
    losses = _token_losses(model.get_base_model().get_output_embeddings(), hidden, targets)
    return list((-losses).split(counts))


def _answer_states(
    model: AdaptedModel, examples: Sequence[Example], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the hidden states that predict answer tokens (N, D), those (N,), and their counts."""
    longest = max(len(example.input_ids) for example in examples)
    rows = [ex.input_ids + [pad_token_id] * (longest - len(ex.input_ids)) for ex in examples]
    input_ids = torch.tensor(rows, device=device)  # (B, T)
    inner = model.get_base_model().base_model
    hidden = inner(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
    predicting = [
        hidden[row, example.answer_start - 1 : len(example.input_ids) - 1]
        for row, example in enumerate(examples)
    ]
    targets = [
        input_ids[row, example.answer_start : len(example.input_ids)]
        for row, example in enumerate(examples)
    ]
    counts = [len(target) for target in targets]
    return torch.cat(predicting), torch.cat(targets), counts


def _has_penalty(training: TrainingConfig) -> bool:
    return training.local_kl_weight > 0 or training.local_orthogonality > 0


def _compute_losses(
    model: AdaptedModel,
    examples: Sequence[Example],
    penalised: TrainingConfig | None,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of every answer token, and what holds local off global's ground.

    The KL term is a mean over the answer tokens of the replayed examples; its reference is
    the same model with the local adapter at scale 0.
    """
    device = next(model.parameters()).device
    head = model.get_base_model().get_output_embeddings()
    hidden, targets, counts = _answer_states(model, examples, pad_token_id, device)
    losses = _token_losses(head, hidden, targets)
    if penalised is None:
        return losses, None
    penalty = torch.zeros((), device=device)
    if penalised.local_orthogonality > 0:
        penalty = penalty + penalised.local_orthogonality * compute_overlap(model)
    replayed = [example for example in examples if example.is_replayed]
    if penalised.local_kl_weight > 0 and replayed:
        with torch.no_grad(), scaled_local(model, 0.0):
            reference, _, _ = _answer_states(model, replayed, pad_token_id, device)
        kept = [
            part
            for part, example in zip(hidden.split(counts), examples, strict=True)
            if example.is_replayed
        ]
        divergence = _token_divergences(head, torch.cat(kept), reference).mean()
        penalty = penalty + penalised.local_kl_weight * divergence
    return losses, penalty


def _token_divergences(
    head: torch.nn.Module, hidden: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
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
