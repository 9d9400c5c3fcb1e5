"""Real steps of a phase on the device that is there: their time, and the memory that they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import GLOBAL, LOCAL, Config, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.process_memory import read_peak, reset_peak
from fedlora_app.model.adapters import AdaptedModel, adapter_parameters
from fedlora_app.model.device import reset_peak_memory
from fedlora_app.planning.gpus import Passes, Work, compute_flops
from fedlora_app.training.activations import Shape, first_trained_layer
from fedlora_app.training.batches import examples_per_step, step_batches
from fedlora_app.training.phase import PhaseResult, train_phase
from fedlora_app.training.phase_memory import BaseSizes
from fedlora_app.training.record_privacy import BACKWARDS, hides_records, protect_records
from fedlora_app.training.within_memory import settle_checkpointing, train_within_memory

SEED = 1


@dataclass(frozen=True)
class MeasuredSteps:
    """A phase's steps on some examples; the first is not timed."""

    tokens_per_step: float
    seconds_per_step: float
    flops_per_step: float
    """That the result needs, without what is computed twice to save memory."""
    recomputed_flops_per_step: float
    """All that were done."""
    peak_bytes: int
    settings: TrainingConfig
    """With which it fitted."""
    memory_retries: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.tokens_per_step / self.seconds_per_step


def measure_steps(
    model: AdaptedModel,
    shape: Shape,
    sizes: BaseSizes,
    config: Config,
    phase: Phase,
    examples: Sequence[Example],
    num_steps: int,
    base_bytes: int = 0,
    what: str = "",
) -> MeasuredSteps:
    """Train for one step and then ``num_steps`` that are timed, as a client does.

    Args:
        examples: those of the steps, which are taken in turn.
        base_bytes: what this process held before there was a model, on a CPU.
        what: begins a line where memory runs out.

    Raises:
        TrainingError: memory does not suffice, for smaller batches neither.
    """
    privacy = None
    if hides_records(phase, config.privacy):
        examples = examples[: examples_per_step(config.training)]  # so that a step draws them all
        privacy = protect_records(phase, config.privacy, 1.0, bytes(32))
    ends: list[float] = []

    def train(settings: TrainingConfig) -> PhaseResult:
        ends.clear()
        return train_phase(
            model,
            examples,
            settings,
            active=phase.active,
            trainable=phase.trainable,
            num_steps=num_steps + 1,
            run_span=(0.0, 1.0),
            weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
            seed=SEED,
            progress=lambda *_: ends.append(time.perf_counter()),
            keeps_states=False,  # so that every step is one of the first pass
            privacy=privacy,
        )

    reset_peak_memory(model.device)
    reset_peak()
    training = settle_checkpointing(config, model, phase, examples)
    result, settings = train_within_memory(model, phase, training, train, what)
    peak = result.peak_memory_bytes
    if model.device.type == "cpu":
        peak = read_peak() - base_bytes
    batches = list(islice(step_batches(examples, settings, SEED), num_steps + 1))
    timed = [example for batch in batches[1:] for example in batch]
    needed, done = (
        _count_flops(model, shape, sizes, config, phase, timed, recomputes) / num_steps
        for recomputes in (False, settings.gradient_checkpointing is True)
    )
    return MeasuredSteps(
        tokens_per_step=sum(len(example.input_ids) for example in timed) / num_steps,
        seconds_per_step=(ends[-1] - ends[0]) / num_steps,
        flops_per_step=needed,
        recomputed_flops_per_step=done,
        peak_bytes=peak,
        settings=settings,
        memory_retries=result.memory_retries,
    )


def _count_flops(
    model: AdaptedModel,
    shape: Shape,
    sizes: BaseSizes,
    config: Config,
    phase: Phase,
    examples: Sequence[Example],
    recomputes: bool,
) -> float:
    """Return the operations of training on examples once, as a plan counts them."""
    active, learning = (
        sum(p.numel() for name in names for p in adapter_parameters(model, name))
        for names in (phase.active, phase.trainable)
    )
    work = Work(
        tokens=sum(len(example.input_ids) for example in examples),
        answer_tokens=sum(example.num_answer_tokens for example in examples),
        attention_pairs=sum(len(example.input_ids) ** 2 for example in examples),
        micro_batches=0,
    )
    frozen = first_trained_layer(config.adapters, phase) / shape.num_layers
    backwards = BACKWARDS if hides_records(phase, config.privacy) else 1
    passes = Passes(recomputes, frozen, backwards=backwards)
    return compute_flops(shape, sizes, work, active, learning, passes)
