"""What answering questions takes in memory, predicted from shapes alone.

Nothing is kept for a backward pass, so the peak is one moment of one layer, the logits, or the keys
and values of prompts that are generated for, whichever is most.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_app.training.activations import FP32_BYTES, Numerics, Shape

MAX_TOKENS = 16_384
"""In one forward pass, padding included, however much memory there is."""
LOGIT_BYTES = 2 * FP32_BYTES
"""Of each logit: in fp32, and its log-probability."""
MASK_BYTES = 1
"""Of an entry of a mask as it is made: a bool."""


@dataclass(frozen=True)
class AnswerBatch:
    """Rows that go through the model at once, padded to the longest."""

    num_rows: int
    length: int
    """Of the longest, in tokens."""
    num_logits: int
    """Positions whose logits are held at a time."""
    max_new_tokens: int = 0
    """That are generated for each row; 0: given answers are scored."""

    @property
    def num_tokens(self) -> int:
        """Tokens at the end, padding included."""
        return self.num_rows * (self.length + self.max_new_tokens)


def count_answer_bytes(
    shape: Shape,
    numerics: Numerics,
    batch: AnswerBatch,
    largest_linear: int,
    num_adapter_parameters: int,
) -> int:
    """Return what a batch needs beside the base model and the adapters.

    Args:
        largest_linear: weights of the largest linear layer, which 4-bit makes whole for a moment.
        num_adapter_parameters: of all that answer, which are copied in the computation's dtype.
    """
    width = numerics.dtype_bytes
    tokens = batch.num_rows * batch.length
    generates = batch.max_new_tokens > 0
    mask = tokens * batch.length * (MASK_BYTES if generates else width + MASK_BYTES)
    cache = 2 * shape.key * width * generates  # of a token in a layer
    kept = tokens * shape.num_layers * cache
    layer = _layer_bytes(shape, width) * tokens
    if numerics.is_4bit:
        layer += largest_linear * width
    last_norm = tokens * shape.hidden * (2 * width + FP32_BYTES)
    # Beside them generation holds them as they came from the head.
    logits = batch.num_logits * shape.vocabulary * (LOGIT_BYTES + width * generates)
    # Growing keys and values are copied, a layer at a time.
    grown = batch.num_tokens * (shape.num_layers + 1) * cache
    copied = width * num_adapter_parameters
    return copied + max(kept + mask + max(layer, last_norm + logits), grown + logits)


def fit_tokens(
    shape: Shape,
    numerics: Numerics,
    batch: AnswerBatch,
    largest_linear: int,
    num_adapter_parameters: int,
    free_bytes: float,
) -> int:
    """Return how many tokens may go through the model at once for rows like these to fit.

    ``MAX_TOKENS``, or the first of its halves that is small enough: in steps, so that a little more
    or less free memory changes no batch, and with it the last digits of no score.
    """
    tokens = MAX_TOKENS
    while True:
        cut = cut_batch(batch, tokens)
        sizes = (largest_linear, num_adapter_parameters)
        needed = count_answer_bytes(shape, numerics, cut, *sizes)
        if needed <= free_bytes or cut.num_rows == 1:  # a row is always tried
            return tokens
        tokens //= 2


def cut_batch(batch: AnswerBatch, tokens: int) -> AnswerBatch:
    """Return a batch of such rows with at most so many tokens, one row at least."""
    rows = max(1, tokens // max(1, batch.length + batch.max_new_tokens))
    logits = batch.num_logits if not batch.max_new_tokens else min(rows, batch.num_rows)
    return AnswerBatch(min(rows, batch.num_rows), batch.length, logits, batch.max_new_tokens)


def _layer_bytes(shape: Shape, width: int) -> int:
    """Return the most that a token takes inside of a layer, its residual stream included."""
    # Queries, keys and values, rotated ones, and keys and values once per query head.
    attention = 4 * shape.query + 4 * shape.key
    # The activated gate, and the other half before and after the adapters are added.
    feed_forward = 3 * shape.intermediate
    return (max(attention, feed_forward) + 4 * shape.hidden) * width
