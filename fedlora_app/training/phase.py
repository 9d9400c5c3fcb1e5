"""One phase of training: an explicit loop over answer tokens, in plain torch.

Input: examples, the active and the trainable adapters, and which part of the run the phase covers.
Output: the phase's figures; the adapters' weights change in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from fedlora_app.config.schema import GLOBAL, LOCAL, TrainingConfig
from fedlora_app.config.sharing import FACTORS
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import (
    AdaptedModel,
    activate,
    adapter_parameters,
    compute_overlap,
)
from fedlora_app.model.device import (
    read_peak_memory,
    reset_peak_memory,
)
from fedlora_app.model.fused import can_fuse_adapters, fused_adapters
from fedlora_app.model.kernels import apply_liger_kernels, compiled_layers
from fedlora_app.training.attention import ATTENTION
from fedlora_app.training.batches import (
    split_step,
    step_batches,
)
from fedlora_app.training.kept_states import KeptStates, keeping_states
from fedlora_app.training.layout import choose_layout
from fedlora_app.training.losses import compute_losses
from fedlora_app.training.optimizer import fresh_optimizer
from fedlora_app.training.packing import packed_attention, using_attention
from fedlora_app.training.proximal import ProximalTerm
from fedlora_app.training.record_privacy import RecordPrivacy, private_gradients, record_settings
from fedlora_app.training.schedule import schedule_factor

Progress = Callable[[int, int, float], None]  # step, number of steps, loss


class TrainingError(RuntimeError):
    """Training cannot continue, for instance because the loss is not finite."""


@dataclass(frozen=True)
class PhaseResult:
    """What one phase did. Losses are means over answer tokens, in nats.

    What is None is withheld: it tells of the records of a phase that is to hide each of them.
    """

    num_steps: int
    num_examples: int
    num_answer_tokens: int | None
    train_loss: float | None
    final_train_loss: float | None
    penalty: float
    """What protects the global adapter's knowledge, or holds it near what was received, with its
    weights; a mean over steps, not part of the losses."""
    seconds: float
    peak_memory_bytes: int
    """As ``model.device`` defines it: of this phase on a GPU, of the process on a CPU."""
    num_tokens: int | None
    """Of whole examples, those that are not learnt included."""
    gradient_checkpointing: int
    """1 where activations were computed twice to save memory."""
    memory_retries: int = 0
    """Times that it ran out of memory before, and was begun again with smaller batches."""


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
    progress: Progress | None = None,
    keeps_states: bool = True,
    factors: Sequence[str] = FACTORS,
    privacy: RecordPrivacy | None = None,
) -> PhaseResult:
    """Train the adapters ``trainable`` for ``num_steps`` optimizer steps.

    Args:
        run_span: where the phase begins and ends in the adapter's whole run, each in
            [0, 1]; the learning-rate schedule is read off there.
        seed: decides the order of examples and the dropout.
        keeps_states: of the layers below those that learn, wherever that pays and is exact.
        factors: of the global adapter that learn, where it is trainable.
        privacy: hides single examples in what the global adapter learns, which must be alone;
            steps then draw their examples by chance. None: nothing is hidden.

    Raises:
        TrainingError: the loss is not finite.
        ClippingError: single examples cannot be hidden.
    """
    if privacy is not None:
        assert tuple(active) == tuple(trainable) == (GLOBAL,), "others' noise is not provided for"
        training = record_settings(training)
    activate(model, active, trainable, factors)
    reset_peak_memory(model.device)
    checkpointing = training.gradient_checkpointing is True
    set_checkpointing(model, checkpointing)
    is_beside = tuple(trainable) == (LOCAL,) and GLOBAL in active
    penalised = training if is_beside and _has_penalty(training) else None
    proximal = None
    if training.proximal_mu > 0 and GLOBAL in trainable:
        proximal = ProximalTerm(adapter_parameters(model, GLOBAL), training.proximal_mu)
    total = _Tally()
    started = time.monotonic()
    decays = {name: weight_decays[name] for name in trainable}
    with (
        _training_forward(model, training, active),
        fresh_optimizer(model, training, decays) as optimizer,
        ExitStack() as stack,
    ):
        kept = None
        if keeps_states:
            kept = stack.enter_context(
                keeping_states(model, examples, training, trainable, num_steps)
            )
        private = None
        batches = step_batches(examples, training, seed)
        if privacy is not None:
            about = seed, num_steps, run_span, weight_decays, tuple(factors)
            private = stack.enter_context(
                private_gradients(model, examples, training, privacy, *about)
            )
            batches = private.draw_batches()
        torch.manual_seed(seed)
        for step, batch in enumerate(islice(batches, num_steps)):
            position = run_span[0] + (run_span[1] - run_span[0]) * step / num_steps
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * schedule_factor(position, training)
            if private is None:
                loss, penalty = _accumulate_gradients(model, batch, training, penalised, kept)
            else:
                loss, penalty = private.accumulate(step, batch, kept), 0.0
            if proximal is not None:
                penalty += proximal.add_gradient()
            if not math.isfinite(loss + penalty):
                raise TrainingError(
                    f"The loss became {loss + penalty} at step {step + 1} of {num_steps}. Lower "
                    f"training.learning_rate (it is {training.learning_rate:g})."
                )
            _take_step(optimizer, training.max_grad_norm)
            total.add(batch, loss, penalty)
            if progress is not None:
                progress(step + 1, num_steps, total.losses[-1] if total.losses else loss)
    return PhaseResult(
        num_steps=num_steps,
        num_examples=len(examples),
        **total.summarize(withholds=privacy is not None),
        seconds=time.monotonic() - started,
        peak_memory_bytes=read_peak_memory(model.device),
        gradient_checkpointing=int(checkpointing),
    )


@dataclass
class _Tally:
    """What the steps of a phase add up to."""

    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_answer_tokens: int = 0

    def add(self, batch: Sequence[Example], loss: float, penalty: float) -> None:
        num_learnt = sum(example.num_answer_tokens for example in batch if not example.is_public)
        if num_learnt:  # a batch of public records alone has no loss
            self.losses.append(loss)
        self.penalties.append(penalty)
        self.num_tokens += sum(len(example.input_ids) for example in batch)
        self.num_answer_tokens += num_learnt

    def summarize(self, withholds: bool) -> dict[str, Any]:
        """Return fields of the result; those that tell of single records are None if withheld."""
        losses = self.losses
        told = {
            "num_tokens": self.num_tokens,
            "num_answer_tokens": self.num_answer_tokens,
            "train_loss": sum(losses) / len(losses) if losses else None,
            "final_train_loss": losses[-1] if losses else None,
        }
        if withholds:
            told = dict.fromkeys(told)
        return {**told, "penalty": sum(self.penalties) / len(self.penalties)}


def _accumulate_gradients(
    model: AdaptedModel,
    batch: Sequence[Example],
    training: TrainingConfig,
    penalised: TrainingConfig | None,
    kept: KeptStates | None,
) -> tuple[float, float]:
    """Add up the gradients of one step, micro-batch by micro-batch, every learnt token alike.

    Returns:
        The mean loss and the mean penalty, which stay on the device until the last micro-batch.
    """
    num_answer_tokens = sum(e.num_answer_tokens for e in batch if not e.is_public)
    num_of_others = sum(example.num_answer_tokens for example in batch if not example.is_own)
    loss = penalty = torch.zeros((), device=model.device)
    lay_out = choose_layout(training)
    for micro_batch in split_step(batch, training):
        losses, divergences = compute_losses(model, micro_batch, penalised, lay_out, kept)
        micro_loss = losses.sum() / max(num_answer_tokens, 1)
        loss = loss + micro_loss.detach()
        if penalised is not None:
            micro_penalty = len(micro_batch) / len(batch) * penalised.local_orthogonality
            micro_penalty = micro_penalty * compute_overlap(model)
            if divergences is not None:
                weight = penalised.local_kl_weight / num_of_others
                micro_penalty = micro_penalty + weight * divergences.sum()
            penalty = penalty + micro_penalty.detach()
            micro_loss = micro_loss + micro_penalty
        micro_loss.backward()
    return loss.item(), penalty.item()


def _take_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def _training_forward(
    model: AdaptedModel, training: TrainingConfig, active: Sequence[str]
) -> Iterator[None]:
    """Have the model run as training wants it while the block runs."""
    implementation = ATTENTION if training.attention == "sdpa" else training.attention
    fuses = training.fused_adapters
    if fuses == "auto":
        fuses = can_fuse_adapters(model, active)
    base = model.get_base_model()
    if training.liger_kernels:
        apply_liger_kernels(base)
    with ExitStack() as stack:
        stack.callback(model.zero_grad, set_to_none=True)  # also of a phase that failed half-way
        stack.callback(model.eval)
        if fuses:
            stack.enter_context(fused_adapters(model, active))
        if training.compile:
            stack.enter_context(compiled_layers(base))
        if training.packing:
            stack.enter_context(packed_attention(base, implementation))
        elif training.attention != "sdpa":
            stack.enter_context(using_attention(base, training.attention))
        model.train()
        yield


def _has_penalty(training: TrainingConfig) -> bool:
    return training.local_kl_weight > 0 or training.local_orthogonality > 0


def set_checkpointing(model: AdaptedModel, wanted: bool) -> None:
    """Have the model compute activations twice in training, which saves memory, or not."""
    inner = model.get_base_model()
    if wanted and not inner.is_activation_checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    elif not wanted and inner.is_activation_checkpointing:
        inner.activation_checkpointing_disable()
