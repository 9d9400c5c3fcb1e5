"""A measurement beside its plan, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from fedlora_app.config.schema import Config
from fedlora_app.foundation.progress import format_duration
from fedlora_app.planning.measurement import MEDIAN, Measurement
from fedlora_app.planning.plan import Plan
from fedlora_app.planning.suggestions import suggest_changes
from fedlora_app.planning.text import format_size, format_speed, render, wrap, yaml_value


def describe_measurement(config: Config, plan: Plan, measured: Measurement) -> str:
    """Return what was measured, what had been planned, and the settings that it would change."""
    what = "random weights of the base model's shape" if measured.is_random else "the base model"
    blocks = [
        f"{plan.name}: measured on this machine's {measured.device}, with {what}.",
        render(_phase_table(plan, measured)),
        *_describe_memory(plan, measured),
        *_describe_times(config, plan, measured),
        *_describe_changes(config, plan, measured),
    ]
    return "\n".join(line for block in blocks for line in wrap(block))


def _phase_table(plan: Plan, measured: Measurement) -> Table:
    table = Table("step", title="Measured, two steps each", title_justify="left")
    headings = ("tokens", "peak memory", "planned", "tokens/s", "of the peak", "checkpointing")
    for heading in headings:
        table.add_column(heading, justify="right")
    planned = {phase.phase: phase for phase in plan.phases}
    for (name, kind), steps in measured.steps.items():
        share = measured.share_of_peak(steps)
        is_largest = (name, MEDIAN) not in measured.steps or kind != MEDIAN
        table.add_row(
            f"{name}, {kind}",
            f"{steps.tokens_per_step:,.0f}",
            format_size(steps.peak_bytes),
            format_size(planned[name].torch_bytes) if is_largest else "",
            format_speed(steps.tokens_per_second),
            "" if share is None else f"{share:.1%}",
            "on" if steps.settings.gradient_checkpointing else "off",
        )
    answers = measured.answers
    if answers.num_questions:
        peak = format_size(plan.evaluation.torch_bytes) if plan.evaluation is not None else ""
        about = (f"{answers.num_questions} questions", "", format_size(answers.peak_bytes), peak)
        table.add_row(*about, f"{answers.num_questions / answers.seconds:.3g} questions/s")
    return table


def _describe_memory(plan: Plan, measured: Measurement) -> Iterator[str]:
    if plan.on_cpu:
        yield (
            "Memory is what the process held beyond what it had before there was a model, some "
            "50 MB of libraries included."
        )
    if measured.card is not None:
        card = measured.card
        peak = "matrix products of these widths" if plan.on_cpu else "the maker's figure"
        speed = format_speed(card.tokens_per_second)
        yield (
            f"Planned were {speed} tokens/s at {card.efficiency:.0%} of the "
            f"peak, {card.peak_tflops:,.3g} TFLOP/s by {peak}."
        )


def _describe_times(config: Config, plan: Plan, measured: Measurement) -> Iterator[str]:
    times = measured.times
    load = "Making the weights up" if measured.is_random else "Loading the base model"
    yield (
        f"{load} took {_seconds(measured.load_seconds)}, saving a client's adapters "
        f"{_seconds(measured.save_seconds)}, a message down and one up "
        f"{_seconds(measured.message_seconds)}."
    )
    planned = measured.card.round_seconds if measured.card is not None else None
    expected = f" ({_seconds(planned)} planned)" if planned is not None else ""
    yield (
        f"A round: {_seconds(times.round)}. Training {_seconds(times.training)}{expected}, "
        f"questions {_seconds(times.evaluation)}, messages and saving {_seconds(times.transfer)}; "
        f"the last round's questions {_seconds(times.last_evaluation)}."
    )
    rounds = plan.num_rounds
    expected = f" (training {_seconds(rounds * planned)} planned)" if planned is not None else ""
    yield f"The whole run of {rounds} rounds: {_seconds(times.run)}{expected}."
    gate = ", fitting the gates" if config.adapters.gate != "none" else ""
    yield (
        f"Not counted: Flower's start (10 to 20 s), reading and tokenising data{gate}, and the "
        "likelihoods of answers without a question."
    )
    if measured.is_random:
        yield "Random weights hardly ever end an answer, so that a trained model answers faster."


def _describe_changes(config: Config, plan: Plan, measured: Measurement) -> Iterator[str]:
    suggestions = suggest_changes(config, plan, measured)
    for suggestion in suggestions:
        words = " ".join(f"{k}={yaml_value(v)}" for k, v in suggestion.settings.items())
        yield f"Change: {words} ({suggestion.reason})"
    if not suggestions:
        yield "No setting to change."


def _seconds(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"
