"""Transformers' Trainer with PEFT and one adapter, and our training step, timed step by step.

Both are timed from the end of one step to the end of the next, so that neither's start-up counts
and everything that a step takes does: collating, forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from benchmarks.toy_models import DEVICE, build_base
from benchmarks.turns import Work
from fedlora_app.config.schema import GLOBAL, LOCAL, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel
from fedlora_app.training.phase import train_phase

LEARNING_RATE = 1e-4
PHASE_SEED = 1
IGNORED = -100


class PlainTrainer:
    """A Trainer that takes the same steps whenever it is run.

    Args:
        collate: rows with ``input_ids`` and ``labels`` to one batch.
        batch_size: rows in a batch; a step takes all of ``examples``.
    """

    def __init__(
        self,
        config: Qwen2Config,
        rank: int,
        examples: Sequence[Example],
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        batch_size: int,
        num_steps: int,
        output_dir: str,
    ) -> None:
        base = build_base(config)
        base.config.use_cache = False  # with one, transformers mixes packed examples
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        self.model = get_peft_model(base, lora)
        self.losses: list[float] = []
        self._clock = _StepClock()
        rows = [
            {
                "input_ids": list(ex.input_ids),
                "labels": [IGNORED] * ex.answer_start + list(ex.input_ids[ex.answer_start :]),
            }
            for ex in examples
        ]
        self._trainer = Trainer(
            self.model,
            TrainingArguments(
                output_dir=output_dir,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=len(examples) // batch_size,
                max_steps=num_steps + 1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                use_cpu=DEVICE.type == "cpu",
                bf16=DEVICE.type == "cuda",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self) -> float:
        """Train, and return the seconds of a step."""
        self._clock.ends = []
        self.losses.append(self._trainer.train().training_loss)
        return _mean_gap(self._clock.ends)


class _StepClock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def build_phase(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    active: Sequence[str],
    trainable: Sequence[str],
    num_steps: int,
    losses: list[float] | None = None,
) -> Work:
    """Return what trains for some steps and returns the seconds of one."""

    def run() -> float:
        ends: list[float] = []
        with deterministic():
            result = train_phase(
                model,
                examples,
                training,
                active=active,
                trainable=trainable,
                num_steps=num_steps + 1,
                run_span=(0.0, 1.0),
                weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
                seed=PHASE_SEED,
                progress=lambda *_: ends.append(time.perf_counter()),
            )
        if losses is not None:
            losses.append(result.train_loss)
        return _mean_gap(ends)

    return run


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch choose deterministic algorithms in the block, as a client does for its whole life.

    The Trainer runs without, which is its default and faster.
    """
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def constant_rate(**settings: Any) -> TrainingConfig:
    """Return our settings for the same steps that the Trainer takes."""
    settings = {
        "learning_rate": LEARNING_RATE,
        "warmup_ratio": 0.0,
        "lr_scheduler": "constant",
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
    } | settings
    return TrainingConfig(**settings)


def set_threads() -> int:
    """Use as many threads as a client does, and return their number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


def _mean_gap(ends: Sequence[float]) -> float:
    return (ends[-1] - ends[0]) / (len(ends) - 1)
