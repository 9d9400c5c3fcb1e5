"""How the examples of a micro-batch lie in memory: end to end in one row, or padded in rows.

End to end every linear layer works on real tokens only, and positions restart with each example.
Padded on the right, examples go through the model as anybody's do, for base models that cannot keep
examples of one row apart. Packing and its contamination: Krell et al. 2021,
https://arxiv.org/abs/2107.02027.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, PreTrainedModel

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.base import find_decoder
from fedlora_app.training.attention import Groups, send

FILL = 0  # any token: nothing looks at it

_collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


@dataclass(frozen=True)
class Batch:
    """Several examples on the model's device.

    ``predicting`` (N,) are the places, row after row, whose hidden states predict the answers'
    tokens ``targets`` (N,), and ``counts`` tells how many of them each example has; ``lengths``
    are the examples' own.
    """

    inputs: dict[str, Any]
    predicting: torch.Tensor
    targets: torch.Tensor
    counts: list[int]
    lengths: list[int]
    is_packed: bool

    @property
    def spans(self) -> list[slice]:
        """Each example's rows among all of them (rows * width), padding included."""
        if self.is_packed:
            ends = list(accumulate(self.lengths))
        else:
            width = self.inputs["input_ids"].shape[1]
            ends = [width * (row + 1) for row in range(len(self.lengths))]
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    def split(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Return each example's own (T, D) of hidden states (rows * width, D)."""
        if self.is_packed:
            return list(states.split(self.lengths))
        rows = states.unflatten(0, (len(self.lengths), -1))
        return [row[:length] for row, length in zip(rows, self.lengths, strict=True)]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all examples' states as layers take them (rows, width, D), padded with zeros."""
        if self.is_packed:
            return torch.cat(list(parts))[None]
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


Layout = Callable[[Sequence[Example], torch.device], Batch]


def choose_layout(training: TrainingConfig) -> Layout:
    """Return how the settings want micro-batches to lie."""
    return pack if training.packing else pad


def pack(examples: Sequence[Example], device: torch.device) -> Batch:
    """Lay examples end to end; for a model within ``packed_attention``."""
    inputs = _collate([{"input_ids": example.input_ids} for example in examples])
    del inputs["labels"]
    starts = inputs["cu_seq_lens_q"].tolist()
    inputs = {
        name: send(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    inputs["packed_groups"] = Groups([len(example.input_ids) for example in examples], device)
    return _build(inputs, examples, starts[:-1], device, is_packed=True)


def pad(examples: Sequence[Example], device: torch.device) -> Batch:
    """Lay examples side by side, padded on the right; for a model with its own attention."""
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    width = int(lengths.max())
    rows = [[*ex.input_ids, *[FILL] * (width - len(ex.input_ids))] for ex in examples]
    inputs = {"input_ids": send(torch.tensor(rows), device)}
    is_real = torch.arange(width)[None] < lengths[:, None]
    if not is_real.all():  # without a mask attention is faster
        inputs["attention_mask"] = send(is_real.long(), device)
    starts = range(0, len(rows) * width, width)
    return _build(inputs, examples, starts, device, is_packed=False)


def compute_hidden_states(base: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the last hidden states, row after row (rows * width, D)."""
    # A cache would make transformers forget where one example ends.
    states = find_decoder(base)(**batch.inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def _build(
    inputs: dict[str, Any],
    examples: Sequence[Example],
    starts: Sequence[int],
    device: torch.device,
    *,
    is_packed: bool,
) -> Batch:
    predicting, targets = [], []
    for start, example in zip(starts, examples, strict=True):
        end = start + len(example.input_ids)
        predicting += range(start + example.answer_start - 1, end - 1)
        targets += example.input_ids[example.answer_start :]
    return Batch(
        inputs,
        send(torch.tensor(predicting), device),
        send(torch.tensor(targets), device),
        [example.num_answer_tokens for example in examples],
        [len(example.input_ids) for example in examples],
        is_packed,
    )
