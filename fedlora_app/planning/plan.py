"""A run as it will be, from its configuration: memory, bytes on the wire, time, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora_app.config.rounds import plan_round, training_clients
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.model.base import (
    ModelError,
    build_empty_model,
    find_embedding_fault,
    load_tokenizer,
)
from fedlora_app.planning.advice import Change, find_changes
from fedlora_app.planning.gpus import (
    CARDS,
    Card,
    Passes,
    Work,
    compute_flops,
    compute_seconds,
    read_limit,
)
from fedlora_app.planning.prediction import Predictor, read_numerics
from fedlora_app.planning.sizes import measure_sizes
from fedlora_app.planning.workload import (
    ClientPhase,
    PhaseWork,
    assumed_work,
    load_client_phases,
    measure_work,
    missing_files,
)
from fedlora_app.training.activations import (
    FP32_BYTES,
    Numerics,
    first_trained_layer,
    keeps_states,
    read_shape,
)
from fedlora_app.training.decay import describe_decay
from fedlora_app.training.phase_memory import BaseSizes, PhaseMemory, adapter_sizes
from fedlora_app.training.selection import describe_long_phases

UPLOAD_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights in one round, without the messages' headers."""

    up_per_client: int
    down_per_client: int
    num_senders: int
    num_receivers: int
    least_up_per_client: int
    """The same update in two bytes a weight."""
    least_down_per_client: int
    """The average in two bytes a weight."""


@dataclass(frozen=True)
class CardPlan:
    """What one card would do with this configuration."""

    card: str
    memory_bytes: int
    peak_bytes: int
    fits: bool
    checkpointing: bool
    tokens_per_second: float
    round_seconds: float | None
    """Training alone, all clients; None where the data is not here."""


@dataclass(frozen=True)
class Verdict:
    """Whether it fits, and with which changes it would."""

    fits: bool
    peak_bytes: int
    limit_bytes: int
    limit_source: str
    changes: Change | None
    """Settings by dotted key; None where it fits or nothing helps."""
    changed_peak_bytes: int | None
    checkpointing_unneeded: bool
    num_cut: int
    """Examples that a smaller max_seq_length among the changes would shorten."""


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it is started."""

    name: str
    mode: str
    model: str
    base: BaseSizes
    numerics: Numerics
    adapter_parameters: dict[str, int]
    optimizer: str
    phases: list[PhaseMemory]
    work: list[PhaseWork]
    num_rounds: int
    traffic: Traffic
    cards: list[CardPlan]
    verdict: Verdict
    notes: list[str]

    @property
    def largest_phase(self) -> PhaseMemory:
        """The phase that decides what the card must have."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    def dump(self) -> dict[str, Any]:
        """Return plain data for JSON, sums included."""
        data = asdict(self)
        for entry, phase in zip(data["phases"], self.phases, strict=True):
            entry |= {"torch_bytes": phase.torch_bytes, "total_bytes": phase.total_bytes}
        return data | {"base": data["base"] | {"total": self.base.total}}


def build_plan(config: Config, root: Path, gpu_memory: str = "") -> Plan:
    """Plan a run on one GPU. No weights are read, and nothing is downloaded twice.

    Args:
        gpu_memory: as ``parse_memory`` reads it; empty: this machine's GPU, or 24 GB.

    Raises:
        PlanError: the memory's size or the kind of model is unknown.
        ModelError: the base model's configuration is not there.
        DataError: a training file that is there cannot be used.
    """
    limit, source = read_limit(gpu_memory)
    empty = _build_empty(config, root)
    fault = find_embedding_fault(config.model, root)
    if fault is not None:
        raise ModelError(fault)
    shape = read_shape(empty.config)
    sizes = measure_sizes(empty, config.adapters)
    notes: list[str] = []
    parts = _load_parts(config, root, notes)
    predict = Predictor(shape, sizes, parts)
    phases = predict(config, limit)
    work = [measure_work(part, config.training) for part in parts]
    if config.training.liger_kernels or config.training.compile:
        notes.append(
            "What training.liger_kernels and training.compile save is not in these figures."
        )
    if config.federated.mode == "dual" and config.training.schedule == "joint":
        notes.append("The last round has a local phase more than the others.")
    if config.federated.mode == "finetuned":
        notes.append("The last round has the fine-tuning more than the others: its local phase.")
    counts = {p.client: (p.selection.num_universal, p.selection.num_local) for p in parts}
    notes += [*describe_decay(config, counts), *describe_long_phases(config, counts)]
    return Plan(
        name=config.experiment.name,
        mode=config.federated.mode,
        model=config.model.name,
        base=sizes,
        numerics=read_numerics(config),
        adapter_parameters=adapter_sizes(sizes, config.adapters),
        optimizer=config.training.optimizer,
        phases=phases,
        work=work,
        num_rounds=config.federated.num_rounds,
        traffic=_plan_traffic(config, adapter_sizes(sizes, config.adapters)[GLOBAL]),
        cards=[_plan_card(config, card, predict, work) for card in CARDS],
        verdict=_judge(config, predict, phases, limit, source, parts),
        notes=notes,
    )


def _build_empty(config: Config, root: Path) -> Any:
    try:
        return build_empty_model(config.model, root)
    except ModelError as error:
        raise ModelError(
            f"{error}\nA plan needs no weights: configuration and tokenizer are enough "
            f'(hf download {config.model.name} --exclude "*.safetensors").'
        ) from error


def _load_parts(config: Config, root: Path, notes: list[str]) -> list[ClientPhase]:
    """Return the clients' phases, or none and a note where something is not here."""
    missing = missing_files(config, root)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(
            f"The training data is not here ({missing[0]}{more}), so every example is taken to "
            "have training.max_seq_length tokens, half of them answer."
        )
        return []
    try:
        tokenizer = load_tokenizer(config.model, root)
    except ModelError as error:
        reason = str(error).splitlines()[0]
        notes.append(
            f"The tokenizer cannot be used, so tokens are not counted and every example is taken "
            f"to have training.max_seq_length of them, half of them answer: {reason}"
        )
        return []
    return load_client_phases(config, tokenizer, root)


def _plan_traffic(config: Config, num_parameters: int) -> Traffic:
    if plan_round(config, 1).train is None:
        return Traffic(0, 0, 0, len(config.client_ids), 0, 0)
    upload = UPLOAD_BYTES[config.federated.upload_dtype]
    return Traffic(
        up_per_client=upload * num_parameters,
        down_per_client=FP32_BYTES * num_parameters,
        num_senders=len(training_clients(config)),
        num_receivers=len(config.client_ids),
        least_up_per_client=2 * num_parameters,
        least_down_per_client=2 * num_parameters,
    )


def _plan_card(
    config: Config, card: Card, predict: Predictor, work: Sequence[PhaseWork]
) -> CardPlan:
    memory = {phase.phase: phase for phase in predict(config, card.memory_bytes)}
    first_round = plan_round(config, 1)
    phases = {p.name: p for p in (first_round.train, first_round.personalise) if p is not None}
    parts = [(part.phase, part.work, part.passes) for part in work if part.phase in phases]
    parts = parts or [(name, assumed_work(config.training), 1.0) for name in phases]
    counts = adapter_sizes(predict.sizes, config.adapters)

    def seconds(name: str, amount: Work, num_passes: float) -> float:
        phase = phases[name]
        is_kept = keeps_states(config.adapters, phase)
        passes = Passes(
            memory[name].checkpointing,
            first_trained_layer(config.adapters, phase) / predict.shape.num_layers,
            1 / max(1.0, num_passes) if is_kept else 1.0,
        )
        active = sum(counts[adapter] for adapter in phase.active)
        learning = sum(counts[adapter] for adapter in phase.trainable)
        flops = compute_flops(predict.shape, predict.sizes, amount, active, learning, passes)
        return compute_seconds(
            card, flops, predict.sizes, read_numerics(config), amount.micro_batches, passes
        )

    total = sum(seconds(*part) for part in parts)
    peak = max(phase.total_bytes for phase in memory.values())
    return CardPlan(
        card=card.name,
        memory_bytes=card.memory_bytes,
        peak_bytes=peak,
        fits=peak <= card.memory_bytes,
        checkpointing=any(phase.checkpointing for phase in memory.values()),
        tokens_per_second=sum(amount.tokens for _, amount, _ in parts) / total,
        round_seconds=total if work else None,
    )


def _judge(
    config: Config,
    predict: Predictor,
    phases: Sequence[PhaseMemory],
    limit: int,
    source: str,
    parts: Sequence[ClientPhase],
) -> Verdict:
    peak = _peak(phases)
    changed: Config | None = None
    changes: Change | None = None
    if peak > limit:
        fits: Callable[[Config], bool] = lambda c: _peak(predict(c, limit)) <= limit  # noqa: E731
        changes, changed = find_changes(config, predict.sizes.is_tied, fits)
    without = peak
    if any(phase.checkpointing for phase in phases):
        without = _peak(predict(config, limit, checkpointing=False))
    length = changed.training.max_seq_length if changed else config.training.max_seq_length
    return Verdict(
        fits=peak <= limit,
        peak_bytes=peak,
        limit_bytes=limit,
        limit_source=source,
        changes=changes,
        changed_peak_bytes=_peak(predict(changed, limit)) if changed else None,
        checkpointing_unneeded=any(p.checkpointing for p in phases) and without <= limit,
        num_cut=sum(len(ex.input_ids) > length for part in parts for ex in part.selection.examples),
    )


def _peak(phases: Sequence[PhaseMemory]) -> int:
    return max(phase.total_bytes for phase in phases)
