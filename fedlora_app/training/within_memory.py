"""Training within the memory that there is: checkpointing where it takes it, smaller batches too.

What a step holds is predicted before it begins. Where memory runs out all the same, what was being
trained begins once more with half the batch or less, as many examples a step, and checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import Config, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel, adapter_parameters, get_state, set_state
from fedlora_app.model.base import compute_dtype, uses_4bit
from fedlora_app.model.device import is_out_of_memory, read_free_memory
from fedlora_app.training.activations import MicroBatch, Numerics, PlanError
from fedlora_app.training.batches import examples_per_step, largest_micro_batch
from fedlora_app.training.phase import PhaseResult, TrainingError
from fedlora_app.training.phase_memory import predict_step_bytes
from fedlora_app.training.proximal import without_idle_term
from fedlora_app.training.record_privacy import hides_records, record_settings

USABLE_SHARE = 0.9  # of the free memory; the rest is lost to fragmentation

Result = TypeVar("Result")


def use_less_memory(training: TrainingConfig) -> TrainingConfig:
    """Return settings with half the batch or less, as many examples a step, and checkpointing."""
    per_step = examples_per_step(training)
    most = max(1, training.batch_size // 2)
    batch_size = max(size for size in range(1, most + 1) if per_step % size == 0)
    changes = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": per_step // batch_size,
        "gradient_checkpointing": True,
    }
    return training.model_copy(update=changes)


def train_within_memory(
    model: AdaptedModel,
    phase: Phase,
    training: TrainingConfig,
    train: Callable[[TrainingConfig], PhaseResult],
    what: str,
) -> tuple[PhaseResult, TrainingConfig]:
    """Train, and where memory runs out begin once more with smaller batches.

    Args:
        train: runs the phase with the settings that it is given.
        what: begins the line that says so.

    Returns:
        The phase's figures, and the settings with which it fitted.

    Raises:
        TrainingError: memory does not suffice for the smaller batches either.
    """
    before = {name: get_state(model, name) for name in phase.trainable}

    def go_back() -> None:
        for name, state in before.items():
            set_state(model, name, state)

    result, fitted = retry_with_less_memory(training, train, go_back, what)
    return replace(result, memory_retries=int(fitted is not training)), fitted


def retry_with_less_memory(
    training: TrainingConfig,
    train: Callable[[TrainingConfig], Result],
    go_back: Callable[[], None],
    what: str,
) -> tuple[Result, TrainingConfig]:
    """Train, and where memory runs out once more with smaller batches.

    Args:
        train: trains with the settings that it is given.
        go_back: is called before it is to begin once more.
        what: begins the line that says so.

    Returns:
        The result, and the settings with which it fitted: ``training`` itself or others.

    Raises:
        TrainingError: memory does not suffice for the smaller batches either.
    """
    try:
        return train(training), training
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside that block, so that the exception's frames have freed their tensors.
    smaller = use_less_memory(training)
    print(
        f"{what}: out of memory with batches of {training.batch_size}; once more, and from here "
        f"on, with {smaller.batch_size} x {smaller.gradient_accumulation_steps} and checkpointing.",
        flush=True,
    )
    go_back()
    torch.cuda.empty_cache()
    try:
        return train(smaller), smaller
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{what}: out of memory, also with batches of {smaller.batch_size} and gradient "
            "checkpointing. Lower training.max_seq_length or the adapters' ranks."
        ) from None


def settle_checkpointing(
    config: Config, model: AdaptedModel, phase: Phase, examples: Sequence[Example]
) -> TrainingConfig:
    """Return a phase's settings with ``gradient_checkpointing`` on or off instead of "auto".

    It is on where what a step holds without it, by ``phase_memory``, would not fit into the
    memory that is free now, or where that cannot be told and the model is on a GPU.
    """
    training, hides = without_idle_term(config), hides_records(phase, config.privacy)
    if hides:
        training = record_settings(training)
    if training.gradient_checkpointing != "auto":
        return training
    num_tokens = largest_micro_batch((len(example.input_ids) for example in examples), training)
    learning = {
        name: sum(p.numel() for p in adapter_parameters(model, name)) for name in phase.trainable
    }
    try:
        needed = predict_step_bytes(
            model.get_base_model().config,
            config.adapters,
            training,
            Numerics(uses_4bit(config.model), compute_dtype(config.model).itemsize),
            phase,
            MicroBatch(num_tokens, num_tokens),  # as if all were answers, which is the most
            learning,
            hides,
        )
        fits = needed <= USABLE_SHARE * read_free_memory(model.device)
    except PlanError:
        fits = model.device.type != "cuda"
    return training.model_copy(update={"gradient_checkpointing": not fits})
