"""How examples become optimizer steps, and a step's examples become micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.seeds import derive_seed


def examples_per_step(training: TrainingConfig) -> int:
    """Return how many examples one optimizer step learns from."""
    return training.batch_size * training.gradient_accumulation_steps


def count_steps(num_examples: int, epochs: int, training: TrainingConfig) -> int:
    """Return the optimizer steps of ``epochs`` passes over ``num_examples`` examples."""
    return epochs * math.ceil(num_examples / examples_per_step(training))


def tokens_per_micro_batch(training: TrainingConfig) -> int:
    """Return how many tokens go through the model at once: as many as a full padded batch has."""
    return training.batch_size * training.max_seq_length


def largest_micro_batch(lengths: Iterable[int], training: TrainingConfig) -> int:
    """Return the most tokens that a micro-batch of examples of these lengths can hold."""
    longest = sorted(lengths, reverse=True)[: examples_per_step(training)]
    if not training.packing:
        return longest[0] * min(training.batch_size, len(longest))
    return min(sum(longest), tokens_per_micro_batch(training))


def step_batches(
    examples: Sequence[Example], training: TrainingConfig, seed: int
) -> Iterator[list[Example]]:
    """Yield one optimizer step's examples after another, epoch after epoch, for ever.

    Args:
        seed: that of the phase.
    """
    for epoch in count():
        yield from epoch_batches(examples, training, derive_seed(seed, "shuffle", epoch))


def epoch_batches(
    examples: Sequence[Example], training: TrainingConfig, seed: int
) -> Iterator[list[Example]]:
    """Yield the steps of one epoch, whose order ``seed`` decides."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    for start in range(0, len(order), examples_per_step(training)):
        yield order[start : start + examples_per_step(training)]


def split_step(examples: Sequence[Example], training: TrainingConfig) -> list[list[Example]]:
    """Return one step's examples as micro-batches, packed or of similar length."""
    if training.packing:
        return split_into_packs(examples, tokens_per_micro_batch(training))
    ordered = sorted(examples, key=lambda ex: -len(ex.input_ids))
    size = training.batch_size
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def split_into_packs(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Return groups of at most ``max_tokens`` tokens, the longest examples first (first fit).

    A longer example has a group of its own.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda ex: -len(ex.input_ids)):
        size = len(example.input_ids)
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            packs.append([])
            room.append(max_tokens)
            place = len(packs) - 1
        packs[place].append(example)
        room[place] -= size
    return packs
