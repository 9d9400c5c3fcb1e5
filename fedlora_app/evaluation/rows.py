"""How questions become rows that go through the model, and rows become batches.

A row is a prompt with some of its candidates, or a prompt alone that is generated for. Rows of like
length go together, as many as are asked for and as there is room for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fedlora_app.evaluation.memory import MAX_TOKENS, AnswerBatch
from fedlora_app.evaluation.room import Room
from fedlora_app.training.losses import LOGIT_ROWS

CANDIDATES_PER_ROW = 16


@dataclass(frozen=True)
class Row:
    """One sequence: a prompt and some of its candidates, by their positions in the lists."""

    prompt: int
    prompt_ids: list[int]
    candidates: list[int]
    answer_ids: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the prompt and of these candidates."""
        return len(self.prompt_ids) + sum(map(len, self.answer_ids))

    def divide(self) -> list[Row]:
        """Return two rows with half of the candidates each, or this one where it has but one."""
        middle = len(self.candidates) // 2
        if not middle:
            return [self]
        first, second = slice(middle), slice(middle, None)
        return [
            replace(self, candidates=self.candidates[part], answer_ids=self.answer_ids[part])
            for part in (first, second)
        ]


def build_rows(
    prompt_ids: Sequence[list[int]], answer_ids: Sequence[list[list[int]]], per_row: int
) -> Iterator[Row]:
    """Yield the sequences to compute, each a prompt with up to ``per_row`` of its candidates."""
    for index, (ids, answers) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        for start in range(0, len(answers), per_row):
            part = answers[start : start + per_row]
            yield Row(index, ids, list(range(start, start + len(part))), part)


def build_batches(rows: Sequence[Row], batch_size: int, room: Room) -> Iterator[list[Row]]:
    """Yield rows of similar length, at most ``batch_size`` candidates at a time."""
    batch: list[Row] = []
    count = 0
    for row in sorted(rows, key=lambda row: (row.length, row.prompt)):
        is_full = count + len(row.candidates) > batch_size
        is_full |= not room.has_for(len(batch) + 1, row.length)
        if batch and is_full:
            yield batch
            batch, count = [], 0
        batch.append(row)
        count += len(row.candidates)
    if batch:
        yield batch


def batch_prompts(
    waiting: Sequence[int],
    lengths: Mapping[int, int],
    batch_size: int,
    max_new_tokens: int,
    room: Room,
) -> Iterator[list[int]]:
    """Yield the places of prompts to generate for, those of like length together.

    Args:
        lengths: tokens of the prompts by their places.
    """
    batch: list[int] = []
    for index in sorted(waiting, key=lengths.__getitem__):
        has_room = room.has_for(len(batch) + 1, lengths[index] + max_new_tokens)
        if batch and (len(batch) == batch_size or not has_room):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def largest_scored(rows: Sequence[Row], batch_size: int) -> AnswerBatch:
    """Return as many of the longest rows as are ever scored at once, where memory allows it."""
    longest = sorted(rows, key=lambda row: -row.length)
    length = longest[0].length if longest else 1
    most = max(1, MAX_TOKENS // length)
    counts = accumulate(len(row.candidates) for row in longest)
    num_rows = max(1, min(most, sum(count <= batch_size for count in counts)))
    num_logits = sum(len(ids) for row in longest[:num_rows] for ids in row.answer_ids)
    return AnswerBatch(num_rows, length, min(LOGIT_ROWS, num_logits))


def largest_generated(longest: int, batch_size: int, max_new_tokens: int) -> AnswerBatch:
    """Return as many of the longest prompts as are ever generated for at once, likewise."""
    num_rows = min(batch_size, max(1, MAX_TOKENS // max(1, longest + max_new_tokens)))
    return AnswerBatch(num_rows, longest, num_rows, max_new_tokens)


def count_tokens(rows: Sequence[Row]) -> int:
    """Return the tokens of rows that are scored at once, padding included."""
    return len(rows) * max(row.length for row in rows)
