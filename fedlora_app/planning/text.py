"""A plan as text for the terminal: memory, data, traffic, cards, and the verdict."""

from __future__ import annotations

import io
from collections.abc import Iterator
from textwrap import fill

from rich.console import Console
from rich.table import Table

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.foundation.progress import format_duration
from fedlora_app.planning.gpus import EFFICIENCY
from fedlora_app.planning.host import CPU_EFFICIENCY
from fedlora_app.planning.plan import Plan, Traffic, Verdict
from fedlora_app.training.phase_memory import Item

WIDTH = 100
MAX_ROWS = 12  # more clients are left out here; --json has them all


def describe_plan(plan: Plan) -> str:
    """Return the whole plan, 100 columns wide and without colour."""
    base, numerics = plan.base, plan.numerics
    held = "NF4" if numerics.is_4bit else "not quantised"
    dtype = "float32" if numerics.dtype_bytes == 4 else "bfloat16"
    sizes = plan.adapter_parameters
    title = (
        f"{plan.name}: {plan.mode}, {plan.num_rounds} rounds; {plan.model}, "
        f"{base.total / 1e6:,.1f} M parameters ({held}, {dtype}), adapters {sizes[GLOBAL]:,} and "
        f"{sizes[LOCAL]:,}"
    )
    blocks = [title, render(_memory_table(plan))]
    if not plan.on_cpu:
        blocks += _host_lines(plan)
    if plan.work:
        blocks.append(render(_work_table(plan)))
    blocks.append(_describe_traffic(plan.traffic))
    blocks += [_describe_cpu(plan)] if plan.on_cpu else [render(_card_table(plan))]
    blocks.append(_describe_time(plan))
    blocks += [f"Note: {note}" for note in plan.notes]
    blocks += _verdict_lines(plan.verdict, plan.on_cpu)
    return "\n".join(line for block in blocks for line in wrap(block))


def format_size(num_bytes: float) -> str:
    """Return "8.54 GB" or "61.6 MB", in powers of ten."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _memory_table(plan: Plan) -> Table:
    where = "memory on the CPU" if plan.on_cpu else "GPU memory"
    table = Table("item", title=f"Peak of {where}, predicted", title_justify="left")
    for phase in plan.memory:
        how = "checkpointed" if phase.checkpointing else "no checkpointing"
        name = f"{phase.phase} phase"
        if phase is plan.evaluation:
            name, how = "evaluation", f"{phase.items[-1].note} at its peak"
        heading = f"{name}\n{phase.micro_batch_tokens:,} tokens at once\n{how}"
        table.add_column(heading, justify="right")
    names = dict.fromkeys(_label(item) for phase in plan.memory for item in phase.items)
    outside = dict.fromkeys(_label(item) for phase in plan.memory for item in phase.outside)
    for group in (names, outside):
        for name in group:
            sizes = []
            for phase in plan.memory:
                found = {_label(item): item for item in (*phase.items, *phase.outside)}
                sizes.append(format_size(found[name].num_bytes) if name in found else "")
            table.add_row(name, *sizes)
        sums = [p.torch_bytes if group is names else p.total_bytes for p in plan.memory]
        owner = "machine" if plan.on_cpu else "card"
        label = "what torch will count" if group is names else f"what the {owner} must have"
        table.add_section()
        table.add_row(label, *map(format_size, sums))
        table.add_section()
    return table


def _label(item: Item) -> str:
    if item.name in ("gradients", "activations", "answers"):
        return item.name  # its note says what the heading says
    return f"{item.name} ({item.note})" if item.note else item.name


def _host_lines(plan: Plan) -> Iterator[str]:
    parts = ", ".join(f"{i.name} {format_size(i.num_bytes)}" for i in plan.largest_phase.host)
    yield f"In the machine's own memory, beside Python and its libraries: {parts}."


def _work_table(plan: Plan) -> Table:
    table = Table("client", "phase", title="Training data, per epoch", title_justify="left")
    headings = ("examples", "tokens", "answer tokens", "longest", "cut", "passes", "steps", "fill")
    for heading in headings:
        table.add_column(heading, justify="right")
    for part in plan.work[:MAX_ROWS]:
        table.add_row(
            part.client,
            part.phase,
            f"{part.num_examples:,}",
            f"{part.tokens_per_epoch:,}",
            f"{part.answer_tokens_per_epoch:,}",
            f"{part.longest:,}",
            f"{part.num_truncated:,}",
            f"{part.passes:g}",
            f"{part.steps:,}",
            f"{100 * part.packing_fill:.0f} %",
        )
    if len(plan.work) > MAX_ROWS:
        table.caption = f"and {len(plan.work) - MAX_ROWS} rows more, in --json"
    return table


def _describe_traffic(traffic: Traffic) -> str:
    if not traffic.num_senders:
        return "Per round nothing but metrics leaves a client."
    up, down = traffic.up_per_client, traffic.down_per_client
    total = up * traffic.num_senders + down * traffic.num_receivers
    by_dtype = ", ".join(f"{name} {format_size(n)}" for name, n in traffic.up_by_dtype.items())
    return (
        f"Per round {format_size(up)} up from each of {traffic.num_senders} clients and "
        f"{format_size(down)} down to each of {traffic.num_receivers}, {format_size(total)} in "
        f"all. By federated.upload_dtype up: {by_dtype}. Local adapters never travel."
    )


def _card_table(plan: Plan) -> Table:
    table = Table("card", title="Cards", title_justify="left")
    for heading in ("memory", "needed", "fits", "checkpointing", "tokens/s", "round"):
        table.add_column(heading, justify="right")
    for card in plan.cards:
        duration = card.round_seconds
        table.add_row(
            card.card,
            format_size(card.memory_bytes),
            format_size(card.peak_bytes),
            "yes" if card.fits else "no",
            "on" if card.checkpointing else "off",
            f"{card.tokens_per_second:,.0f}" if card.fits else "",
            _format_time(duration) if card.fits and duration is not None else "",
        )
    return table


def format_speed(speed: float) -> str:
    """Return "1,855" or "0.13"."""
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


def _format_time(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 1 else "under 1 s"


def _describe_cpu(plan: Plan) -> str:
    """Return what this machine's CPU will do, in a sentence."""
    (cpu,) = plan.cards
    took = "" if cpu.round_seconds is None else f", {_format_time(cpu.round_seconds)} for a round"
    speed = format_speed(cpu.tokens_per_second)
    return f"On this machine's {cpu.card}: about {speed} tokens/s{took}."


def _describe_time(plan: Plan) -> str:
    """Return where the times come from and what they leave out."""
    if plan.on_cpu:
        return (
            "The time is calculated from matrix products of the model's widths, which were timed "
            f"just now, at an assumed efficiency of {CPU_EFFICIENCY:.0%}. A round is the training "
            "of all clients one after the other; loading, evaluation and messages come on top. "
            "fedlora plan CONFIG --measure measures all of it. To plan for a card: --gpu-memory "
            "24GB."
        )
    return (
        f"Times are calculated from makers' peak figures at an assumed efficiency of "
        f"{EFFICIENCY:.0%}, not measured. A round is the training of all clients one after the "
        "other; loading, evaluation and messages come on top, and a small model waits for its "
        "kernels to start instead. fedlora plan CONFIG --measure measures all of it on a card."
    )


def _verdict_lines(verdict: Verdict, on_cpu: bool) -> Iterator[str]:
    limit = f"{format_size(verdict.limit_bytes)} ({verdict.limit_source})"
    peak = format_size(verdict.peak_bytes)
    if verdict.fits:
        left = verdict.limit_bytes - verdict.peak_bytes
        yield f"Fits: {peak} of {limit}, {format_size(left)} left."
        if verdict.checkpointing_unneeded:
            yield (
                "It would fit without checkpointing too: training.gradient_checkpointing=false "
                "is faster."
            )
        return
    yield f"Does not fit: {peak} of {limit}."
    if verdict.changes is None or verdict.changed_peak_bytes is None:
        larger = "a machine with more memory or a GPU" if on_cpu else "a larger card"
        yield f"No setting makes it fit. Use {larger}, or a smaller base model."
        return
    words = " ".join(f"{key}={yaml_value(value)}" for key, value in verdict.changes.items())
    yield f"With {format_size(verdict.changed_peak_bytes)} it would fit: {words}"
    if verdict.num_cut:
        yield f"That cuts {verdict.num_cut:,} training examples short."


def wrap(block: str) -> list[str]:
    """Return a table's lines as they are, and those of a sentence."""
    return block.splitlines() if "\n" in block else fill(block, WIDTH).splitlines()


def yaml_value(value: object) -> str:
    """Return a setting's value as a YAML and an override have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def render(table: Table) -> str:
    """Return a table's lines, without colour."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()
