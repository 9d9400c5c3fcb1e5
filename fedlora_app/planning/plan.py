"""A run as it will be, from its configuration: memory, bytes on the wire, time, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.config.idle import describe_idle
from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import Config
from fedlora_app.config.sharing import travelling_factors
from fedlora_app.data.client_files import load_all_files
from fedlora_app.federation.privacy_notice import describe_privacy
from fedlora_app.federation.quantised import PLAIN_BYTES, WIRE_DTYPES, count_wire_bytes
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
    parse_memory,
)
from fedlora_app.planning.host import probe_cpu, read_host_memory
from fedlora_app.planning.prediction import Predictor, read_numerics
from fedlora_app.planning.questions import QuestionWork, describe_cut_answers, measure_questions
from fedlora_app.planning.sizes import measure_sizes
from fedlora_app.planning.workload import (
    ClientPhase,
    PhaseWork,
    assumed_work,
    load_client_phases,
    measure_work,
    missing_files,
    missing_questions,
)
from fedlora_app.training.activations import (
    Numerics,
    first_trained_layer,
    keeps_states,
    read_shape,
)
from fedlora_app.training.decay import describe_decay
from fedlora_app.training.phase_memory import BaseSizes, PhaseMemory, adapter_sizes
from fedlora_app.training.record_privacy import BACKWARDS, hides_records
from fedlora_app.training.selection import describe_long_phases


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights in one round, without the messages' headers."""

    up_per_client: int
    down_per_client: int
    num_senders: int
    num_receivers: int
    up_by_dtype: dict[str, int]
    """What ``up_per_client`` would be with each ``federated.upload_dtype``."""


@dataclass(frozen=True)
class CardPlan:
    """What one card would do with this configuration."""

    card: str
    peak_tflops: float
    """A card's by its maker's figures, a CPU's of plain matrix products."""
    efficiency: float
    """The share of it that training is assumed to reach."""
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
    """Of a run on a CPU, this machine's alone."""
    verdict: Verdict
    notes: list[str]
    on_cpu: bool = False
    evaluation: PhaseMemory | None = None
    """None where the questions are not here."""
    num_questions: dict[str, dict[str, int]] = field(default_factory=dict)
    """By client and question set; empty where they are not here."""

    @property
    def largest_phase(self) -> PhaseMemory:
        """The phase that decides what the card must have."""
        return max(self.memory, key=lambda phase: phase.total_bytes)

    def count_questions(self, sample: int = 0) -> int:
        """Return the questions of all clients together, at most ``sample`` of each set."""
        counts = [n for sets in self.num_questions.values() for n in sets.values()]
        return sum(min(n, sample or n) for n in counts)

    @property
    def memory(self) -> list[PhaseMemory]:
        """What every phase takes, and evaluation."""
        return [*self.phases, *([self.evaluation] if self.evaluation is not None else [])]

    def dump(self) -> dict[str, Any]:
        """Return plain data for JSON, sums included."""
        data = asdict(self)
        entries = [*data["phases"], *([data["evaluation"]] if self.evaluation else [])]
        for entry, phase in zip(entries, self.memory, strict=True):
            entry |= {"torch_bytes": phase.torch_bytes, "total_bytes": phase.total_bytes}
        return data | {"base": data["base"] | {"total": self.base.total}}


def build_plan(config: Config, root: Path, gpu_memory: str = "") -> Plan:
    """Plan a run on one GPU or a CPU. No weights are read, and nothing is downloaded twice.

    Args:
        gpu_memory: as ``parse_memory`` reads it; empty: this machine, with its GPU if it has one.

    Raises:
        PlanError: the memory's size or the kind of model is unknown.
        ModelError: the base model's configuration is not there.
        ConfigError: naming the clients whose own settings are not here.
        DataError: a training file that is there cannot be used.
    """
    config.require_clients()
    limit, source, on_cpu = _read_limit(gpu_memory)
    empty = _build_empty(config, root)
    fault = find_embedding_fault(config.model, root)
    if fault is not None:
        raise ModelError(fault)
    shape = read_shape(empty.config)
    sizes = measure_sizes(empty, config.adapters)
    notes: list[str] = []
    tokenizer = _find_tokenizer(config, root, notes)
    parts = load_client_phases(config, tokenizer, root) if tokenizer is not None else []
    questions = _find_questions(config, root, tokenizer, notes) if parts else None
    predict = Predictor(shape, sizes, parts, on_cpu, questions)
    phases = predict(config, limit)
    numerics = read_numerics(config, on_cpu)
    cards = [probe_cpu(shape, numerics, config.federated.at_once)] if on_cpu else CARDS
    work = [measure_work(part, config.training) for part in parts]
    notes += _note_settings(config, on_cpu)
    counts = {p.client: (p.selection.num_universal, p.selection.num_local) for p in parts}
    notes += [*describe_decay(config, counts), *describe_long_phases(config, counts)]
    traffic = _plan_traffic(config, sizes.global_tensors)
    num_values = traffic.up_by_dtype.get("float32", 0) // PLAIN_BYTES["float32"]
    notes += [f"privacy: {line}" for line in describe_privacy(config, num_values, counts)]
    return Plan(
        name=config.experiment.name,
        mode=config.federated.mode,
        model=config.model.name,
        base=sizes,
        numerics=numerics,
        adapter_parameters=adapter_sizes(sizes, config.adapters),
        optimizer=config.training.optimizer,
        phases=phases,
        work=work,
        num_rounds=config.federated.num_rounds,
        traffic=traffic,
        cards=[_plan_card(config, card, predict, work) for card in cards],
        verdict=_judge(config, predict, phases, limit, source, parts),
        notes=notes,
        on_cpu=on_cpu,
        evaluation=predict.predict_evaluation(config, limit),
        num_questions=questions.num_questions if questions is not None else {},
    )


def _note_settings(config: Config, on_cpu: bool) -> Iterator[str]:
    """Yield what settings make of a run that the figures do not show."""
    if config.training.liger_kernels or config.training.compile:
        yield "What training.liger_kernels and training.compile save is not in these figures."
    yield from describe_idle(config)
    at_once = config.federated.at_once
    if at_once > 1:
        where = "the machine's memory must hold all" if on_cpu else "they spread over the cards"
        yield (
            f"federated.clients_at_once: {at_once} base models are in memory at once, each with "
            f"what these figures say; {where}."
        )
    if config.federated.mode == "dual" and config.training.schedule == "joint":
        yield "The last round has a local phase more than the others."
    if config.federated.mode == "finetuned":
        yield "The last round has the fine-tuning more than the others: its local phase."


def _read_limit(gpu_memory: str) -> tuple[int, str, bool]:
    """Return the bytes to plan for, where they come from, and whether they are a CPU's."""
    if gpu_memory:
        return parse_memory(gpu_memory), "--gpu-memory", False
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, f"this machine's {properties.name}", False
    return read_host_memory(), "this machine's memory; it has no GPU", True


def _build_empty(config: Config, root: Path) -> Any:
    try:
        return build_empty_model(config.model, root)
    except ModelError as error:
        raise ModelError(
            f"{error}\nA plan needs no weights: configuration and tokenizer are enough "
            f'(hf download {config.model.name} --exclude "*.safetensors").'
        ) from error


def _find_tokenizer(config: Config, root: Path, notes: list[str]) -> PreTrainedTokenizerBase | None:
    """Return what the clients' data are counted by, or None and a note if that is impossible."""
    missing = missing_files(config, root)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(
            f"The training data is not here ({missing[0]}{more}), so every example is taken to "
            "have training.max_seq_length tokens, half of them answer."
        )
        return None
    try:
        return load_tokenizer(config.model, root)
    except ModelError as error:
        reason = str(error).splitlines()[0]
        notes.append(
            f"The tokenizer cannot be used, so tokens are not counted and every example is taken "
            f"to have training.max_seq_length of them, half of them answer: {reason}"
        )
        return None


def _find_questions(
    config: Config, root: Path, tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> QuestionWork | None:
    """Return what is asked, with a note of what cannot be answered or is not here."""
    missing = missing_questions(config, root)
    if missing:
        notes.append(f"The questions are not here ({missing[0]}), so evaluation is not planned.")
        return None
    files = load_all_files(config, root)
    notes += describe_cut_answers(config, files, tokenizer, root)
    return measure_questions(config, files, tokenizer)


def _plan_traffic(config: Config, tensors: dict[str, dict[int, int]]) -> Traffic:
    """Count what travels of a global adapter in the first round.

    Args:
        tensors: by factor, how many tensors have so many parameters per unit of rank.
    """
    if plan_round(config, 1).train is None:
        return Traffic(0, 0, 0, len(config.client_ids), {})

    def count(rank: int, dtype: str, factors: Sequence[str]) -> int:
        units = [entry for factor in factors for entry in tensors[factor].items()]
        return sum(n * count_wire_bytes(rank * unit, dtype) for unit, n in units)

    ours, sent = config.adapters.global_, travelling_factors(config, 1)
    up = {dtype: count(ours.rank, dtype, sent) for dtype in WIRE_DTYPES}
    return Traffic(
        up_per_client=up[config.federated.upload_dtype],
        down_per_client=count(ours.joint.rank, "float32", sent),
        num_senders=len(training_clients(config, 1)),
        num_receivers=len(config.client_ids),
        up_by_dtype=up,
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
            BACKWARDS if hides_records(phase, config.privacy) else 1,
        )
        active = sum(counts[adapter] for adapter in phase.active)
        learning = sum(counts[adapter] for adapter in phase.trainable)
        flops = compute_flops(predict.shape, predict.sizes, amount, active, learning, passes)
        return compute_seconds(
            *(card, flops, predict.sizes, read_numerics(config, predict.on_cpu)),
            *(amount.micro_batches, passes),
        )

    total = sum(seconds(*part) for part in parts)
    peak = _peak(predict, config, card.memory_bytes)
    return CardPlan(
        card=card.name,
        peak_tflops=card.peak_tflops,
        efficiency=card.efficiency,
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
    peak = _peak(predict, config, limit)
    changed: Config | None = None
    changes: Change | None = None
    if peak > limit:
        fits: Callable[[Config], bool] = lambda c: _peak(predict, c, limit) <= limit  # noqa: E731
        changes, changed = find_changes(config, predict.sizes.is_tied, fits, predict.on_cpu)
    checkpoints, without = any(phase.checkpointing for phase in phases), peak
    if checkpoints:
        phases = predict(config, limit, checkpointing=False)
        without = max(phase.total_bytes for phase in phases)
    length = changed.training.max_seq_length if changed else config.training.max_seq_length
    return Verdict(
        fits=peak <= limit,
        peak_bytes=peak,
        limit_bytes=limit,
        limit_source=source,
        changes=changes,
        changed_peak_bytes=_peak(predict, changed, limit) if changed else None,
        checkpointing_unneeded=checkpoints and without <= limit,
        num_cut=sum(len(ex.input_ids) > length for part in parts for ex in part.selection.examples),
    )


def _peak(predict: Predictor, config: Config, limit: int) -> int:
    """Return the most that a phase or an evaluation takes where ``limit`` bytes are there."""
    evaluation = predict.predict_evaluation(config, limit)
    phases = [*predict(config, limit), *([evaluation] if evaluation is not None else [])]
    return max(phase.total_bytes for phase in phases)
