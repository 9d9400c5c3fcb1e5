"""Settings that a measurement would change, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedlora_app.config.schema import Config
from fedlora_app.planning.advice import Change
from fedlora_app.planning.measurement import LONGEST, Measurement
from fedlora_app.planning.plan import Plan
from fedlora_app.training.batches import examples_per_step
from fedlora_app.training.within_memory import USABLE_SHARE

FEWEST_SAMPLED = 20
"""Questions of a set; fewer say little."""
QUESTION_SHARE = 0.25
"""Of a round's training, that its questions may take."""


@dataclass(frozen=True)
class Suggestion:
    """Settings by dotted key, and why."""

    settings: Change
    reason: str


def suggest_changes(config: Config, plan: Plan, measured: Measurement) -> list[Suggestion]:
    """Return what would make the run fit at once or go faster, and changes nothing it learns."""
    return [
        *_after_full_memory(measured),
        *_with_free_memory(config, plan, measured),
        *_on_questions(config, plan, measured),
    ]


def _after_full_memory(measured: Measurement) -> Iterator[Suggestion]:
    """Yield the batches that fitted after memory had run out."""
    retried = [steps for steps in measured.steps.values() if steps.memory_retries]
    if retried:
        settings = min((steps.settings for steps in retried), key=lambda s: s.batch_size)
        yield Suggestion(
            {
                "training.batch_size": settings.batch_size,
                "training.gradient_accumulation_steps": settings.gradient_accumulation_steps,
                "training.gradient_checkpointing": True,
            },
            "memory ran out with what is configured; the steps learn from the same examples",
        )


def _with_free_memory(config: Config, plan: Plan, measured: Measurement) -> Iterator[Suggestion]:
    """Yield what memory that is left would allow."""
    training, limit = config.training, USABLE_SHARE * plan.verdict.limit_bytes
    longest = {name: steps for (name, kind), steps in measured.steps.items() if kind == LONGEST}
    if any(steps.memory_retries for steps in longest.values()):
        return
    if training.gradient_checkpointing is True and plan.verdict.checkpointing_unneeded:
        yield Suggestion(
            {"training.gradient_checkpointing": False},
            "what is computed twice now would fit into memory",
        )
        return
    if (
        plan.on_cpu
        or not training.packing
        or any(steps.settings.gradient_checkpointing for steps in longest.values())
    ):
        return
    per_step, size = examples_per_step(training), training.batch_size
    resident = plan.phases[0].resident_bytes
    step = max(steps.peak_bytes for steps in longest.values()) - resident
    fitting = [n for n in range(size + 1, per_step + 1) if per_step % n == 0]
    fitting = [n for n in fitting if resident + step * n / size <= limit]
    if fitting:
        yield Suggestion(
            {
                "training.batch_size": max(fitting),
                "training.gradient_accumulation_steps": per_step // max(fitting),
            },
            "fewer and larger forward passes, of the same examples a step, fit into memory",
        )


def _on_questions(config: Config, plan: Plan, measured: Measurement) -> Iterator[Suggestion]:
    """Yield a sample where questions take long beside what they ask about."""
    times, largest = (
        measured.times,
        max((n for sets in plan.num_questions.values() for n in sets.values()), default=0),
    )
    budget = QUESTION_SHARE * times.training
    if times.evaluation <= budget or config.federated.num_rounds < 2:
        return
    per_question = times.evaluation / plan.count_questions(config.evaluation.sample)
    sample = config.evaluation.sample or largest
    while sample > FEWEST_SAMPLED and per_question * plan.count_questions(sample) > budget:
        sample = max(FEWEST_SAMPLED, sample // 2)
    if sample < (config.evaluation.sample or largest):
        yield Suggestion(
            {"evaluation.sample": sample},
            "questions before the last round take longer than a quarter of its training; the last "
            "round asks all",
        )
