"""An answer's text from what a model generated. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

OPENING = "<think>"
REASONING = re.compile(
    r"\A\s*(?:<think>.*?(?:</think>|\Z)|.*?^[ \t]*</think>[ \t\r]*(?:\n|\Z))",
    re.DOTALL | re.MULTILINE,
)
"""Thoughts; where the prompt had opened them, a line of its own ends them, and no mention of it."""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return an answer's text, without the reasoning before it."""
    return strip_reasoning(tokenizer.decode(ids, skip_special_tokens=True))


def strip_reasoning(text: str) -> str:
    """Return what follows a block of thoughts, "" where it was cut off inside of one."""
    return REASONING.sub("", text).strip()


def decode_so_far(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return as much of an answer's text as is known while it is made.

    Thoughts that began before the answer, in the prompt, cannot be told from it until they end.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if OPENING.startswith(text):  # may become one
        return ""
    return strip_reasoning(text) if text.startswith(OPENING) else text
