"""A model's own greedy answers, of several prompts at once or streamed for one."""

from __future__ import annotations

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from fedlora_app.data.dialogue import encode_answer
from fedlora_app.evaluation.combiner import (
    Combiner,
    combined_answering,
    group_by_weights,
    weighted_pair,
)
from fedlora_app.evaluation.decoding import decode
from fedlora_app.model.adapters import AdaptedModel

LEAVING_SHARE = 1 / 8
"""Rows leave a batch once so many of them have ended: each time costs a copy of what is kept."""
CACHE_ARGUMENT = (
    "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
)
"""Its name since transformers 5.24, and before."""


@torch.inference_mode()
def generate_answer(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    combiner: Combiner | None = None,
    judged_ids: list[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> str:
    """Return the greedy answer to one prompt, of a conversation for instance.

    Args:
        combiner: weighs the two adapters by the prompt, or by ``judged_ids`` if they are given.
        streamer: is given the prompt's tokens and then each new one.
    """
    model.eval()
    stop_ids = find_stop_ids(tokenizer)
    ((weights, _),) = group_by_weights(model, combiner, [judged_ids or prompt_ids])
    with combined_answering(model, combiner), weighted_pair(model, weights):
        (text,) = generate(model, tokenizer, [prompt_ids], stop_ids, max_new_tokens, streamer)
    return text


def generate(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Return the greedy answers, padded on the left and masked while batched.

    Args:
        stop_ids: tokens that end an answer, beside those that the model ships.
    """
    answers = generate_ids(model, tokenizer, prompt_ids, stop_ids, max_new_tokens, streamer)
    return [decode(tokenizer, ids) for ids in answers]


def generate_ids(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the greedy answers' tokens, as ``generate`` has them.

    Answers that have ended leave the batch, so that those that have not are computed alone.
    """
    base = model.get_base_model()
    ends = find_ends(base, stop_ids)
    batch = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(
        model.device
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]  # (B, T)
    first, rows = ids.shape[1], list(range(len(prompt_ids)))
    leaving = _Leaving(ends, first, _make_cache(base) if len(rows) > 1 else None)
    answers: dict[int, list[int]] = {}
    while rows:
        generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=first + max_new_tokens - ids.shape[1],
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = base.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation,
            streamer=streamer,
            **leaving.arguments,
        )
        has_ended = leaving.find_ended(ids)
        if leaving.cache is None or ids.shape[1] == first + max_new_tokens:
            has_ended[:] = True
        for row, new, is_done in zip(rows, ids[:, first:].tolist(), has_ended, strict=True):
            if is_done:
                answers[row] = new
        kept = (~has_ended).nonzero()[:, 0]
        rows = [rows[place] for place in kept.tolist()]
        if rows:
            ids = ids[kept]
            ones = mask.new_ones((len(kept), ids.shape[1] - mask.shape[1]))
            mask = torch.cat([mask[kept], ones], dim=1)
            leaving.cache.batch_select_indices(kept)
    return [answers[row] for row in range(len(prompt_ids))]


class _Leaving(StoppingCriteria):
    """Has transformers return from generating once it pays that rows leave the batch.

    Args:
        first: how many tokens the padded prompts have.
        cache: the keys and values, None where no row can be taken out of them.
    """

    def __init__(self, ends: list[int], first: int, cache: DynamicCache | None) -> None:
        self.cache = cache
        self._ends, self._first = torch.tensor(ends), first

    @property
    def arguments(self) -> dict[str, object]:
        """What ``generate`` has to be told, if rows are to leave."""
        if self.cache is None:
            return {}
        return {"stopping_criteria": [self], CACHE_ARGUMENT: self.cache}

    def find_ended(self, ids: torch.Tensor) -> torch.Tensor:
        """Return which rows (B, T) have ended, (B,)."""
        return torch.isin(ids[:, self._first :], self._ends.to(ids.device)).any(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Return (B,): all of them, or none beside those that transformers knows of."""
        num_ended = self.find_ended(input_ids).sum()
        enough = num_ended >= max(1.0, LEAVING_SHARE * len(input_ids))
        return enough.expand(len(input_ids))


def _make_cache(base: PreTrainedModel) -> DynamicCache | None:
    """Return keys and values of which rows can be taken out, None where a model has others."""
    # Old families (MPT) that bring their whole attention along do not go on where they were left.
    if not (base._supports_default_dynamic_cache() and base._supports_attention_backend):
        return None
    cache = DynamicCache(config=base.config.get_text_config())
    return cache if all(hasattr(layer, "batch_select_indices") for layer in cache.layers) else None


def find_ends(base: PreTrainedModel, stop_ids: list[int]) -> list[int]:
    """Return all tokens that end an answer: these, and those that the model ships."""
    shipped = base.generation_config.eos_token_id
    further = shipped if isinstance(shipped, list) else [shipped]
    return sorted({*stop_ids, *further} - {None})


def find_stop_ids(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str = "", question: str = "?"
) -> list[int]:
    """Return the tokens that end an answer: the template's end-of-turn mark, and end of text."""
    end_of_turn = encode_answer(tokenizer, system_prompt, question, "x")[-1]
    return sorted({end_of_turn, tokenizer.eos_token_id} - {None})
