"""What the clients' data make the model do: tokens, packed micro-batches, steps."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.rounds import Phase, plan_round, training_clients
from fedlora_app.config.schema import Config, TrainingConfig
from fedlora_app.data.client_files import (
    CACHE_DIR,
    ClientExamples,
)
from fedlora_app.data.records import load_records
from fedlora_app.data.tokens import Example, tokenize_file
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.planning.gpus import Work
from fedlora_app.training.packing import SHORTEST_WIDTH, split_into_packs
from fedlora_app.training.phase import tokens_per_micro_batch
from fedlora_app.training.selection import count_phase_steps, select_examples
from fedlora_app.training.step_memory import MicroBatch

ASSUMED_ANSWER_SHARE = 0.5
"""Of the tokens of an example, where there is no data to count."""


@dataclass(frozen=True)
class PhaseWork:
    """What one phase of a round is for one client."""

    client: str
    phase: str
    data: str
    num_examples: int
    num_truncated: int
    tokens_per_epoch: int
    answer_tokens_per_epoch: int
    longest: int
    passes: float
    """Over the examples, in one round."""
    steps: int
    packing_fill: float
    """Share of the room in micro-batches that real tokens take."""
    work: Work
    """Of one round."""


@dataclass(frozen=True)
class ClientPhase:
    """A phase as one client meets it, with the examples that it trains on."""

    client: str
    phase: Phase
    examples: list[Example]
    steps: int
    num_truncated: int


def phases_of(config: Config) -> list[Phase]:
    """Return the phases of a round; of the last one, where it has one more."""
    phases: dict[Phase, None] = {}
    for server_round in (1, config.federated.num_rounds):
        plan = plan_round(config, server_round)
        phases |= {phase: None for phase in (plan.train, plan.personalise) if phase is not None}
    return list(phases)


def missing_files(config: Config, root: Path) -> list[str]:
    """Return the training files that are not on this machine."""
    paths = [
        path
        for client in config.federated.clients
        for path in (client.universal_train or config.data.universal_train, client.local_train)
    ]
    return [path for path in dict.fromkeys(paths) if path and not (root / path).is_file()]


def load_client_phases(
    config: Config, tokenizer: PreTrainedTokenizerBase, root: Path
) -> list[ClientPhase]:
    """Return what every client trains on in the first round.

    Raises:
        DataError: a file cannot be used.
    """
    examples = {name: _tokenize(config, name, tokenizer, root) for name in config.client_ids}
    found = []
    for phase in phases_of(config):
        pools = phase.data == "pooled"
        trains_before = phase == plan_round(config, 1).train
        clients = training_clients(config) if trains_before else config.client_ids
        for name in clients:
            owners = config.client_ids if pools else [name]
            selected: list[Example] = []
            steps = truncated = 0
            for owner in owners:
                own = examples[owner]
                selected += select_examples(config, owner, own, phase, 1)
                steps += count_phase_steps(config, own, phase)
                truncated += own.universal.num_truncated * (phase.data != "local")
                truncated += own.local.num_truncated * (phase.data != "universal")
            found.append(ClientPhase(name, phase, selected, steps, truncated))
    return found


def measure_work(part: ClientPhase, training: TrainingConfig) -> PhaseWork:
    """Count one client's phase, packed as training packs it."""
    lengths = [len(example.input_ids) for example in part.examples]
    answers = sum(example.num_answer_tokens for example in part.examples)
    packs = list(_packs(part.examples, training))
    steps_per_epoch = -(-len(lengths) // _per_step(training))
    passes = part.steps / steps_per_epoch
    room = tokens_per_micro_batch(training) or max(lengths)
    return PhaseWork(
        client=part.client,
        phase=part.phase.name,
        data=part.phase.data,
        num_examples=len(lengths),
        num_truncated=part.num_truncated,
        tokens_per_epoch=sum(lengths),
        answer_tokens_per_epoch=answers,
        longest=max(lengths),
        passes=passes,
        steps=part.steps,
        packing_fill=sum(lengths) / (len(packs) * room),
        work=Work(
            tokens=round(passes * sum(lengths)),
            answer_tokens=round(passes * answers),
            attention_pairs=round(passes * sum(length * length for length in lengths)),
            micro_batches=round(passes * len(packs)),
        ),
    )


def largest_micro_batch(
    parts: Sequence[ClientPhase], phase: Phase, training: TrainingConfig
) -> MicroBatch:
    """Return the most that a micro-batch of a phase can hold; without data, full examples."""
    batches = []
    for part in parts:
        if part.phase != phase:
            continue
        limit = training.max_seq_length
        lengths = sorted((min(len(ex.input_ids), limit) for ex in part.examples), reverse=True)
        room = tokens_per_micro_batch(training) or lengths[0]
        tokens = min(sum(lengths[: _per_step(training)]), room)
        answers = sum(example.num_answer_tokens for example in part.examples)
        share = answers / sum(len(example.input_ids) for example in part.examples)
        padding = _padding(part.examples, training)
        batches.append(MicroBatch(tokens, round(share * tokens), padding))
    if batches:
        return max(batches, key=lambda batch: batch.num_tokens)
    tokens = tokens_per_micro_batch(training) or training.max_seq_length
    return MicroBatch(tokens, round(ASSUMED_ANSWER_SHARE * tokens))


def assumed_work(training: TrainingConfig) -> Work:
    """Return one micro-batch of examples that are all as long as they may be."""
    count = training.batch_size if training.packing else 1
    tokens = count * training.max_seq_length
    pairs = tokens * training.max_seq_length
    return Work(tokens, round(ASSUMED_ANSWER_SHARE * tokens), pairs, 1)


def _tokenize(
    config: Config, name: str, tokenizer: PreTrainedTokenizerBase, root: Path
) -> ClientExamples:
    client = config.client(name)
    paths = (client.universal_train or config.data.universal_train, client.local_train)
    universal, local = (
        tokenize_file(
            tokenizer,
            client.system_prompt,
            load_records(root / path, skip_invalid=config.data.skip_invalid),
            max_seq_length=config.training.max_seq_length,
            skip_invalid=config.data.skip_invalid,
            cache_dir=root / CACHE_DIR,
        )
        for path in paths
    )
    return ClientExamples(universal, local)


def _per_step(training: TrainingConfig) -> int:
    return training.batch_size * training.gradient_accumulation_steps


def _packs(examples: Sequence[Example], training: TrainingConfig) -> Iterator[list[Example]]:
    """Yield the micro-batches of one epoch in some order of the examples."""
    order = list(examples)
    random.Random(derive_seed(0, "plan")).shuffle(order)
    for start in range(0, len(order), _per_step(training)):
        step = order[start : start + _per_step(training)]
        yield from split_into_packs(step, tokens_per_micro_batch(training))


def _padding(examples: Sequence[Example], training: TrainingConfig) -> float:
    """Return attention's padded tokens for each real one, on average."""
    padded = tokens = 0
    for pack in _packs(examples, training):
        widths: dict[int, list[int]] = defaultdict(list)
        for example in pack:
            length = len(example.input_ids)
            widths[max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())].append(length)
        padded += sum(len(lengths) * max(lengths) for lengths in widths.values())
        tokens += sum(map(sum, widths.values()))
    return padded / tokens
