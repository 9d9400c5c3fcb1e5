"""What the clients' data make the model do: tokens, packed micro-batches, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import Config, TrainingConfig
from fedlora_app.data.client_files import ClientExamples, ClientFiles, tokenize_client_files
from fedlora_app.data.records import load_records
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.planning.gpus import Work
from fedlora_app.training.activations import MicroBatch
from fedlora_app.training.attention import group_by_width
from fedlora_app.training.batches import (
    count_steps,
    epoch_batches,
    largest_micro_batch,
    split_step,
    tokens_per_micro_batch,
)
from fedlora_app.training.selection import Selection, select_phase

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
    """A phase as one client meets it, with what it trains on."""

    client: str
    phase: Phase
    selection: Selection


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
    paths.append(config.data.public)
    return [path for path in dict.fromkeys(paths) if path and not (root / path).is_file()]


def missing_questions(config: Config, root: Path) -> list[str]:
    """Return the files of test questions that are not on this machine."""
    paths = [client.local_test for client in config.federated.clients]
    paths += [config.data.universal_test, config.data.conflict_test]
    return [path for path in dict.fromkeys(paths) if path and not (root / path).is_file()]


def load_client_phases(
    config: Config, tokenizer: PreTrainedTokenizerBase, root: Path
) -> list[ClientPhase]:
    """Return what every client trains on in the first round.

    Raises:
        DataError: a file cannot be used.
    """
    examples = {name: _tokenize(config, name, tokenizer, root) for name in config.client_ids}
    first = plan_round(config, 1).train
    return [
        ClientPhase(name, phase, select_phase(config, name, phase, 1, examples.__getitem__))
        for phase in phases_of(config)
        for name in (training_clients(config, 1) if phase == first else config.client_ids)
    ]


def measure_work(part: ClientPhase, training: TrainingConfig) -> PhaseWork:
    """Count one client's phase, packed as training packs it."""
    examples, steps = part.selection.examples, part.selection.num_steps
    lengths = [len(example.input_ids) for example in examples]
    answers = sum(example.num_answer_tokens for example in examples)
    num_packs = sum(1 for _ in _packs(examples, training))
    passes = _passes(part.selection, training)
    room = tokens_per_micro_batch(training)
    return PhaseWork(
        client=part.client,
        phase=part.phase.name,
        data=part.phase.data,
        num_examples=len(examples),
        num_truncated=part.selection.num_truncated,
        tokens_per_epoch=sum(lengths),
        answer_tokens_per_epoch=answers,
        longest=max(lengths),
        passes=passes,
        steps=steps,
        packing_fill=sum(lengths) / (num_packs * room),
        work=Work(
            tokens=round(passes * _count_computed(examples, training)),
            answer_tokens=round(passes * answers),
            attention_pairs=round(passes * sum(length * length for length in lengths)),
            micro_batches=round(passes * num_packs),
        ),
    )


def find_largest(
    parts: Sequence[ClientPhase], phase: Phase, training: TrainingConfig
) -> MicroBatch:
    """Return the most that a micro-batch of a phase can hold; without data, full examples."""
    batches = []
    for selection in (part.selection for part in parts if part.phase == phase):
        examples, comes_again = selection.examples, _passes(selection, training) > 1
        lengths = [len(example.input_ids) for example in examples]
        tokens = largest_micro_batch((min(n, training.max_seq_length) for n in lengths), training)
        share = sum(example.num_answer_tokens for example in examples) / sum(lengths)
        padding, in_all = _padding(examples, training), sum(lengths) * comes_again
        batches.append(MicroBatch(tokens, round(share * tokens), padding, in_all))
    if batches:
        most = max(batch.phase_tokens for batch in batches)
        return replace(max(batches, key=lambda b: b.num_tokens), phase_tokens=most)
    tokens = tokens_per_micro_batch(training)
    return MicroBatch(tokens, round(ASSUMED_ANSWER_SHARE * tokens))


def assumed_work(training: TrainingConfig) -> Work:
    """Return one micro-batch of examples that are all as long as they may be."""
    tokens = tokens_per_micro_batch(training)
    pairs = tokens * training.max_seq_length
    return Work(tokens, round(ASSUMED_ANSWER_SHARE * tokens), pairs, 1)


def _tokenize(
    config: Config, name: str, tokenizer: PreTrainedTokenizerBase, root: Path
) -> ClientExamples:
    client = config.client(name)
    universal, local, public = (
        path and load_records(root / path, skip_invalid=config.data.skip_invalid)
        for path in (
            client.universal_train or config.data.universal_train,
            client.local_train,
            config.data.public,
        )
    )
    # A plan needs no question sets, so that they need not be here.
    files = ClientFiles(universal, local, {}, public=public)
    return tokenize_client_files(config, client, files, tokenizer, root)


def _passes(selection: Selection, training: TrainingConfig) -> float:
    return selection.num_steps / count_steps(len(selection.examples), 1, training)


def _packs(examples: Sequence[Example], training: TrainingConfig) -> Iterator[list[Example]]:
    """Yield the micro-batches of one epoch in some order of the examples."""
    for step in epoch_batches(examples, training, derive_seed(0, "plan")):
        yield from split_step(step, training)


def _count_computed(examples: Sequence[Example], training: TrainingConfig) -> int:
    """Return the tokens of one epoch that go through the linear layers, padding included."""
    packs = ([len(example.input_ids) for example in p] for p in _packs(examples, training))
    return sum(sum(p) if training.packing else len(p) * max(p) for p in packs)


def _padding(examples: Sequence[Example], training: TrainingConfig) -> float:
    """Return attention's padded tokens for each real one, on average."""
    if not training.packing:
        return 1.0  # which its tokens hold already
    padded = tokens = 0
    for pack in _packs(examples, training):
        lengths = [len(example.input_ids) for example in pack]
        for members in group_by_width(lengths):
            padded += len(members) * max(lengths[place] for place in members)
        tokens += sum(lengths)
    return padded / tokens
