"""Real tokens a second: packed, padded to the longest of a micro-batch, padded to the limit.

The first three ways share the model, its two fused adapters, the loss at answer positions and the
optimizer; only the layout of a batch differs. The last is transformers' Trainer with PEFT, one
adapter and batches padded as its usual collators do, to the longest of eight; it also takes the
logits of every position. Lengths are those of short questions and answers: log-normal with a mean
of 130 tokens, in a fixed random order.

Padding to the limit makes every linear layer work on so many times the tokens as are real. Packing
may win back more than that, because attention grows with the square of what it is given.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.plain_trainer import (
    IGNORED,
    LEARNING_RATE,
    PlainTrainer,
    build_phase,
    constant_rate,
    deterministic,
    set_threads,
)
from benchmarks.toy_models import (
    DEVICE,
    DTYPE,
    build_adapted,
    build_examples,
    draw_lengths,
    name_dtype,
    small_config,
)
from benchmarks.turns import compute_ratio, describe_ratio, take_turns, timed
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel, activate, adapter_parameters
from fedlora_app.model.fused import fused_adapters
from fedlora_app.training.layout import pack
from fedlora_app.training.losses import compute_losses, token_losses
from fedlora_app.training.packing import packed_attention

BOTH = (GLOBAL, LOCAL)
PACKED, LONGEST, LIMIT = "packed", "padded to the longest", "padded to the limit"
TRAINER = "Trainer, one adapter, padded to the longest"
PAD = 0
LOSS_TOLERANCE = 1e-4 if torch.float32 == DTYPE else 1e-2


def measure(
    num_turns: int = 5,
    num_examples: int = 16,
    batch_size: int = 8,
    limit: int = 1024,
    rank: int = 16,
    **sizes: int,
) -> dict[str, Any]:
    """Time every way in turn; a step takes all examples."""
    threads = set_threads()
    config = small_config(**{"num_hidden_layers": 4} | sizes)
    lengths = draw_lengths(num_examples, limit)
    examples = build_examples(lengths, config.vocab_size)
    model = build_adapted(config, rank)
    batches = [examples[i : i + batch_size] for i in range(0, num_examples, batch_size)]
    training = constant_rate(
        batch_size=batch_size,
        gradient_accumulation_steps=len(batches),
        max_seq_length=limit,
    )
    padded = {LONGEST: _Padded(model, batches, None), LIMIT: _Padded(model, batches, limit)}
    losses = {name: way.compute_loss() for name, way in padded.items()}
    losses[PACKED] = _packed_loss(model, examples)
    if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * losses[PACKED]:
        raise RuntimeError(f"The ways do not compute the same: {losses}.")
    with tempfile.TemporaryDirectory() as folder:
        trainer = PlainTrainer(
            *(config, rank, examples, _collate),
            batch_size=batch_size,
            num_steps=1,
            output_dir=folder,
        )
        works = {
            PACKED: build_phase(model, examples, training, BOTH, (LOCAL,), 1),
            LONGEST: timed(padded[LONGEST].step),
            LIMIT: timed(padded[LIMIT].step),
            TRAINER: trainer.run,
        }
        seconds = take_turns(works, num_turns)
    widths = {
        PACKED: sum(lengths),
        LONGEST: sum(len(b) * max(len(e.input_ids) for e in b) for b in batches),
        LIMIT: num_examples * limit,
    }
    speedup = {n: compute_ratio(values, seconds[PACKED]) for n, values in seconds.items()}
    possible = widths[LIMIT] / widths[PACKED]
    return {
        "compared": f"real tokens a second of the same examples, {name_dtype()}",
        "dtype": name_dtype(),
        "threads": threads,
        "num_examples": num_examples,
        "limit": limit,
        "batch_size": batch_size,
        "mean_length": sum(lengths) / num_examples,
        "real_tokens": widths[PACKED],
        "padding_share": {n: round(1 - widths[PACKED] / w, 4) for n, w in widths.items()},
        "tokens_per_second": {
            n: round(widths[PACKED] / statistics.median(values), 1) for n, values in seconds.items()
        },
        "packed_to": {n: speedup[n] for n in (LONGEST, LIMIT, TRAINER)},
        "possible_against_limit": round(possible, 3),
        "reached_of_possible": {
            key: round(speedup[LIMIT][key] / possible, 4) for key in ("value", "low", "high")
        }
        | {"n": num_turns},
        "losses": losses,
        "turns": {n: [round(s, 4) for s in values] for n, values in seconds.items()},
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the rates as a table."""
    lines = [
        f"{figures['num_examples']} examples of {figures['mean_length']:.0f} tokens in the mean, "
        f"limit {figures['limit']}, batches of {figures['batch_size']}, "
        f"{figures['dtype']}, "
        f"{figures['threads']} threads; ratios of neighbouring turns: median [least, greatest]",
        "",
        "| batches | padding | real tokens a second | packed is faster by |",
        "|---|---|---|---|",
    ]
    for name, rate in figures["tokens_per_second"].items():
        padding = figures["padding_share"][LONGEST if name == TRAINER else name]
        ratio = figures["packed_to"].get(name)
        shown = describe_ratio(ratio) if ratio else ""
        lines.append(f"| {name} | {padding:.1%} | {rate:,.0f} | {shown} |")
    lines += [
        "",
        f"Padding to the limit costs {figures['possible_against_limit']:.2f} times the tokens; "
        f"packing wins back {describe_ratio(figures['reached_of_possible'])} of that.",
    ]
    return "\n".join(lines)


class _Padded:
    """One optimizer step over padded micro-batches, with everything else as in training."""

    def __init__(
        self, model: AdaptedModel, batches: Sequence[Sequence[Example]], width: int | None
    ) -> None:
        self._model = model
        self._inputs = [_pad(batch, width) for batch in batches]
        self._num_targets = sum(e.num_answer_tokens for b in batches for e in b)
        self._parameters = adapter_parameters(model, LOCAL)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, fused=True)

    def compute_loss(self) -> float:
        """Return the mean loss of an answer token."""
        activate(self._model, BOTH)
        with torch.no_grad():
            return sum(part.item() for part in self._losses())

    def step(self) -> None:
        """Train once on all micro-batches."""
        activate(self._model, BOTH, (LOCAL,))
        self._model.train()
        with deterministic():
            for part in self._losses():
                part.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._model.eval()

    def _losses(self) -> Iterator[torch.Tensor]:
        base = self._model.get_base_model()
        with fused_adapters(self._model, BOTH):
            for ids, mask, predicting, targets in self._inputs:
                states = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                hidden = states.last_hidden_state.flatten(0, 1)[predicting]
                losses = token_losses(base.get_output_embeddings(), hidden, targets)
                yield losses.sum() / self._num_targets


def _packed_loss(model: AdaptedModel, examples: Sequence[Example]) -> float:
    activate(model, BOTH)
    with torch.no_grad(), packed_attention(model.get_base_model()):
        return compute_losses(model, examples, None, pack)[0].mean().item()


def _pad(
    batch: Sequence[Example], width: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    width = width or max(len(e.input_ids) for e in batch)
    ids = torch.full((len(batch), width), PAD)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    predicting: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        predicting += range(row * width + example.answer_start - 1, row * width + length - 1)
        targets += example.input_ids[example.answer_start :]
    inputs = (ids, mask, torch.tensor(predicting), torch.tensor(targets))
    return tuple(tensor.to(DEVICE) for tensor in inputs)


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad as transformers' collators do."""
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": PAD, "labels": IGNORED}
    batch = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in fills.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(width)[None] < lengths[:, None]).long()
    return batch
