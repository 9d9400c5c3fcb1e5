"""How many tokens evaluation puts through a model at once, and what happens if they are too many.

Batches are no larger than the free memory should allow (``memory``). Where it runs out all the
same, the batch is done in halves, and what follows on this base model begins with half as many
tokens. No answer depends on it: rows of a batch do not see each other.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from fedlora_app.evaluation.memory import MAX_TOKENS, AnswerBatch, fit_tokens
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapters import AdaptedModel, adapter_parameters
from fedlora_app.model.device import is_out_of_memory, read_free_memory
from fedlora_app.training.activations import Numerics, PlanError, read_shape
from fedlora_app.training.within_memory import USABLE_SHARE

SCORING, GENERATING, GATE = "scoring given answers", "generating", "reading questions for the gate"
"""What memory is needed for."""

Row = TypeVar("Row")
Result = TypeVar("Result")

_fitting: WeakKeyDictionary[PreTrainedModel, dict[str, int]] = WeakKeyDictionary()
"""Tokens that are left to a base model for each kind of work, where memory once ran out."""
_halvings: WeakKeyDictionary[PreTrainedModel, Counter[str]] = WeakKeyDictionary()


class EvaluationError(UserError):
    """A question cannot be answered here; the message says what would help."""


@dataclass(frozen=True)
class Room:
    """The tokens, padding included, that one kind of work may put through a model at once."""

    kind: str
    num_tokens: int
    _base: PreTrainedModel

    def run(
        self,
        rows: Sequence[Row],
        work: Callable[[Sequence[Row]], list[Result]],
        count_tokens: Callable[[Sequence[Row]], int],
        divide: Callable[[Row], list[Row]] = lambda row: [row],
    ) -> list[Result]:
        """Return what ``work`` makes of all rows, in halves where memory does not suffice.

        Args:
            divide: returns the parts of a row that does not fit alone, or the row itself.

        Raises:
            EvaluationError: memory does not suffice for the smallest part.
        """
        try:
            return work(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside that block, so that the exception's frames have freed their tensors.
        torch.cuda.empty_cache()
        num_tokens = count_tokens(rows)
        parts = rows if len(rows) > 1 else divide(rows[0])
        if len(parts) < 2:
            raise EvaluationError(
                f"Out of memory while {self.kind} with one row of {num_tokens:,} tokens. Use a "
                "larger card, hold the base model in 4 bits (model.quantization: 4bit), or "
                "shorten the longest questions and answers."
            )
        fitting = _fitting.setdefault(self._base, {})
        fitting[self.kind] = min(fitting.get(self.kind, num_tokens), max(1, num_tokens // 2))
        _halvings.setdefault(self._base, Counter())[self.kind] += 1
        print(
            f"Note: out of memory while {self.kind} ({len(rows)} rows, {num_tokens:,} tokens); "
            "this goes on with half of them at a time, as does what follows.",
            file=sys.stderr,  # a command's answer is on the other stream
            flush=True,
        )
        middle = (len(parts) + 1) // 2
        halves = (parts[:middle], parts[middle:])
        return [r for half in halves for r in self.run(half, work, count_tokens, divide)]

    def has_for(self, num_rows: int, length: int) -> bool:
        """Return whether rows of this length are not too many; memory may have run out since."""
        fitting = _fitting.get(self._base, {}).get(self.kind, self.num_tokens)
        return num_rows == 1 or num_rows * length <= min(fitting, self.num_tokens)


def find_room(model: AdaptedModel, kind: str, largest: AnswerBatch) -> Room:
    """Return the room for batches of rows as long as those of ``largest`` at most.

    By the memory that is free now, where the kind of model is known.
    """
    base = model.get_base_model()
    try:
        shape = read_shape(base.config)
    except PlanError:
        return Room(kind, MAX_TOKENS, base)
    numerics = Numerics(bool(getattr(base, "is_loaded_in_4bit", False)), base.dtype.itemsize)
    matrix = max(inputs * outputs for inputs, outputs in shape.modules.values())
    adapters = sum(
        p.numel() for name in model.active_adapters for p in adapter_parameters(model, name)
    )
    free = USABLE_SHARE * read_free_memory(model.device)
    return Room(kind, fit_tokens(shape, numerics, largest, matrix, adapters, free), base)


def count_halvings(model: AdaptedModel) -> int:
    """Return how often memory has run out in evaluations on this base model."""
    return sum(_halvings.get(model.get_base_model(), Counter()).values())
