"""Settings to begin with: a base model for the device that is there, and what suits its size.

The values are those of the configurations in conf/, which say what they were tried on. A phase gets
the passes over its data that make enough optimizer steps of them: an adapter that saw a hundred
questions twice has learnt nothing yet.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
TINY, SMALL, MEDIUM = 20e6, 400e6, 2e9
"""Parameters up to which a base model counts as such; others are large."""
UNKNOWN_SIZE = 7e9
SIZE_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)([bm])(?![A-Za-z0-9])", re.I)
TEMPLATE_TOKENS = 64  # what a chat template and a system prompt add to a question
CHARS_PER_TOKEN = 2.5  # of Latin text; other scripts may take a token a character
MAX_SEQ_LENGTHS = (128, 256, 512, 1024, 2048)
MAX_NEW_TOKENS = 512
MIN_PASSES, MAX_PASSES = 2, 12  # over a client's data in a round


@dataclass(frozen=True)
class DataSizes:
    """What of the data decides about settings."""

    num_universal: Sequence[int] = (1,)
    """Training records of each client."""
    num_local: Sequence[int] = (1,)
    longest_record: int = 200
    """Characters of question and answer."""
    longest_answer: int = 100
    is_latin: bool = True
    """Whether most texts are in Latin letters."""


@dataclass(frozen=True)
class Choice:
    """A base model and why it was chosen."""

    name: str
    reason: str


@dataclass(frozen=True)
class Preset:
    """Sections of a configuration, without clients and data."""

    adapters: dict[str, Any]
    training: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    federated: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def choose_model(gpu_bytes: int | None, is_latin: bool) -> Choice:
    """Return the base model to begin with.

    Args:
        gpu_bytes: memory of the GPU; None where there is none.
    """
    large, medium = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
    if gpu_bytes is not None:
        memory = f"this machine's GPU has {gpu_bytes / GIB:.0f} GiB"
        if gpu_bytes >= 7 * GIB:
            return Choice(large, f"{memory}, and in 4 bits it fits")
        return Choice(medium, f"{memory}, and {large} needs 8")
    wish = f"With a GPU of 8 GB or more: {large}"
    if is_latin:
        small = "HuggingFaceTB/SmolLM2-135M-Instruct"
        return Choice(small, f"this machine shows no GPU. It was trained on English only. {wish}")
    return Choice(medium, f"this machine shows no GPU. It takes a night on a CPU. {wish}")


def guess_parameters(name: str) -> float:
    """Return the number of parameters that a model's name says, such as 7e9 for "...-7B-..."."""
    found = SIZE_IN_NAME.findall(name.rstrip("/").rsplit("/", 1)[-1])
    if not found:
        return UNKNOWN_SIZE
    number, unit = found[-1]
    return float(number) * {"b": 1e9, "m": 1e6}[unit.lower()]


def build_preset(parameters: float, gpu_bytes: int | None, sizes: DataSizes) -> Preset:
    """Return settings for a base model of so many parameters on this device."""
    if parameters <= TINY:
        preset = _tiny()
    elif parameters <= MEDIUM:
        preset = _small() if parameters <= SMALL else _medium()
    else:
        preset = _large(gpu_bytes)
    rounds, steps = preset.federated["num_rounds"], 100 if parameters > SMALL else 200
    training = preset.training
    per_step = training["batch_size"] * training["gradient_accumulation_steps"]
    for phase, counts in (("global", sizes.num_universal), ("local", sizes.num_local)):
        steps_of_pass = math.ceil(statistics.median(counts) / per_step)
        passes = math.ceil(steps / rounds / max(steps_of_pass, 1))
        training[f"{phase}_epochs"] = min(max(passes, MIN_PASSES), MAX_PASSES)
    training["max_seq_length"] = _choose_length(sizes, 1024 if parameters > MEDIUM else 2048)
    answer = _count_tokens(sizes.longest_answer, sizes) + 16
    preset.evaluation["max_new_tokens"] = min(16 * math.ceil(answer / 16), MAX_NEW_TOKENS)
    return preset


def _tiny() -> Preset:
    return Preset(
        model={"quantization": "none", "dtype": "float32"},
        adapters={"gate": "none", **_ranks(8)},  # a gate needs a base that understands questions
        training={"learning_rate": 5.0e-3, "batch_size": 8, "gradient_accumulation_steps": 1},
        federated={"num_rounds": 3},
    )


def _small() -> Preset:
    return Preset(
        model={"quantization": "none"},
        adapters=_ranks(8),
        training={"learning_rate": 1.0e-3, "batch_size": 4, "gradient_accumulation_steps": 1},
        federated={"num_rounds": 2},
    )


def _medium() -> Preset:
    return Preset(
        model={"quantization": "none"},
        adapters=_ranks(8),
        training={"learning_rate": 5.0e-4, "batch_size": 4, "gradient_accumulation_steps": 2},
        federated={"num_rounds": 2},
    )


def _large(gpu_bytes: int | None) -> Preset:
    is_narrow = gpu_bytes is not None and gpu_bytes < 16 * GIB
    training: dict[str, Any] = {"learning_rate": 2.0e-4}
    training |= {"batch_size": 1, "gradient_accumulation_steps": 8} if is_narrow else {}
    narrow = {"optimizer": "paged_adamw_8bit", "gradient_checkpointing": True}
    training |= narrow if is_narrow else {"batch_size": 2, "gradient_accumulation_steps": 4}
    return Preset(
        model={"embedding_device": "cpu"} if is_narrow else {},
        adapters=_ranks(16),
        training=training,
        federated={"num_rounds": 3, "upload_dtype": "bfloat16"},
        evaluation={"batch_size": 4} if is_narrow else {},
    )


def _ranks(rank: int) -> dict[str, Any]:
    return {name: {"rank": rank, "alpha": 2 * rank} for name in ("global", "local")}


def _choose_length(sizes: DataSizes, limit: int) -> int:
    needed = _count_tokens(sizes.longest_record, sizes) + TEMPLATE_TOKENS
    return next((n for n in MAX_SEQ_LENGTHS if n >= min(needed, limit)), limit)


def _count_tokens(num_characters: int, sizes: DataSizes) -> int:
    return math.ceil(num_characters / (CHARS_PER_TOKEN if sizes.is_latin else 1))
