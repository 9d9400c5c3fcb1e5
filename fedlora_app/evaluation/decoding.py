"""An answer's text from what a model generated. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REASONING = re.compile(r"\A\s*(?:(?:<think>)?.*?</think>|<think>.*)", re.DOTALL)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return an answer's text, without the reasoning before it."""
    return strip_reasoning(tokenizer.decode(ids, skip_special_tokens=True))


def strip_reasoning(text: str) -> str:
    """Return what follows a block of thoughts, "" where it was cut off inside of one."""
    return REASONING.sub("", text).strip()
