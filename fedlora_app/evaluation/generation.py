"""A model's own greedy answers, of several prompts at once or streamed for one."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from fedlora_app.data.dialogue import encode_answer
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.gate import Gate, split_by_gate
from fedlora_app.model.adapters import AdaptedModel, scaled_local
from fedlora_app.model.fused import fused_answering


@torch.inference_mode()
def generate_answer(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    gate: Gate | None = None,
    gate_ids: list[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> str:
    """Return the greedy answer to one prompt, of a conversation for instance.

    Args:
        gate: decides by the prompt, or by ``gate_ids`` if they are given, whether the local
            adapter answers.
        streamer: is given the prompt's tokens and then each new one.
    """
    model.eval()
    stop_ids = find_stop_ids(tokenizer)
    ((factor, _),) = split_by_gate(model, gate, [gate_ids or prompt_ids])
    with fused_answering(model), scaled_local(model, factor):
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
    base = model.get_base_model()
    shipped = base.generation_config.eos_token_id
    further = shipped if isinstance(shipped, list) else [shipped]
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*stop_ids, *further} - {None}),
        pad_token_id=tokenizer.pad_token_id,
    )
    batch = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(
        model.device
    )
    output = base.generate(**batch, generation_config=generation, streamer=streamer)
    return [decode(tokenizer, ids) for ids in output[:, batch["input_ids"].shape[1] :]]


def find_stop_ids(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str = "", question: str = "?"
) -> list[int]:
    """Return the tokens that end an answer: the template's end-of-turn mark, and end of text."""
    end_of_turn = encode_answer(tokenizer, system_prompt, question, "x")[-1]
    return sorted({end_of_turn, tokenizer.eos_token_id} - {None})
