"""Random models in which matrix products dominate, and examples of a given length for them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedlora_app.config.schema import AdaptersConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel, attach_adapters

ROOT = Path(__file__).resolve().parents[1]
MEDIAN_LENGTH, LENGTH_SPREAD = 115, 0.5
"""Of a log-normal distribution with a mean of 130 tokens: short questions and answers."""
ANSWER_SHARE = 1 / 3
"""Of an example's tokens, those that the loss is taken on."""
FIRST_TOKEN = 3

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
QWEN_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
"""The sizes of Qwen2.5-7B."""


def name_dtype() -> str:
    """Return what the models compute in, for tables."""
    return str(DTYPE).removeprefix("torch.")


def small_config(**changes: Any) -> Qwen2Config:
    """Return a Qwen2 of 60 million parameters, 28 of them in the linear layers.

    On a GPU, which would wait for such a one, it has a billion, most of them there.
    """
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1792,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen2Config(**(sizes | (large if DEVICE.type == "cuda" else {}) | changes))


def build_base(config: Qwen2Config) -> Qwen2ForCausalLM:
    """Return a model with random weights, the same ones every time, where it is measured."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(DEVICE, DTYPE).requires_grad_(False).eval()


def build_adapted(config: Qwen2Config, rank: int) -> AdaptedModel:
    """Return such a model with both adapters, B of both zero."""
    return attach_adapters(build_base(config), equal_adapters(rank))


def equal_adapters(rank: int) -> AdaptersConfig:
    """Return two adapters of the same rank."""
    one = {"rank": rank, "alpha": 2 * rank}
    return AdaptersConfig.model_validate({"global": one, "local": one})


def draw_lengths(count: int, longest: int, seed: int = 1) -> list[int]:
    """Return lengths of short questions and answers in random order, at most ``longest``.

    One from each of ``count`` equal parts of the distribution, so that few have its mean too.
    """
    spread = NormalDist(math.log(MEDIAN_LENGTH), LENGTH_SPREAD)
    quantiles = (spread.inv_cdf((index + 0.5) / count) for index in range(count))
    lengths = [min(longest, round(math.exp(quantile))) for quantile in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


def build_examples(lengths: Sequence[int], vocabulary: int, seed: int = 2) -> list[Example]:
    """Return examples of random tokens, of which the last third is learnt."""
    rng = random.Random(seed)
    return [
        Example(
            [rng.randrange(FIRST_TOKEN, vocabulary) for _ in range(length)],
            length - max(1, round(ANSWER_SHARE * length)),
        )
        for length in lengths
    ]


def use_tests() -> None:
    """Make the tests' own objects importable."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
