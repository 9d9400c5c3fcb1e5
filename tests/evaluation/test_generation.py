from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import build_tiny_model

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.evaluation.generation import generate
from fedlora_app.model.adapters import activate, attach_adapters

QUESTIONS = [f"{'Well, ' * (n % 3)}what is rule number {n}, and who says so?" for n in range(12)]
LENGTH = 16


@pytest.fixture(params=["full", "sliding"])
def model(request, tokenizer, adapters_config):
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    base = build_tiny_model(len(tokenizer), **(changes if request.param == "sliding" else {}))
    adapted = attach_adapters(base, adapters_config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    activate(adapted, (GLOBAL, LOCAL))
    return adapted


def find_ends(model, prompts: Sequence[list[int]]) -> list[int]:
    """Return tokens that end these prompts' answers at different places, and some never."""
    with torch.inference_mode():
        rows = [
            model.generate(input_ids=torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)
            for ids in prompts
        ]
    answers = [row[0, len(ids) :].tolist() for row, ids in zip(rows, prompts, strict=True)]
    return [answer[2 + row] for row, answer in enumerate(answers)]


@torch.inference_mode()
def test_answers_that_have_ended_leave_the_batch(model, tokenizer):
    """They are those of each prompt alone, whoever else is in its batch."""
    prompts = [encode_prompt(tokenizer, "", question) for question in QUESTIONS]
    ends = find_ends(model, prompts)
    rows = []
    handle = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _, args, settings: rows.append(len(settings["input_ids"])), with_kwargs=True
    )

    def answer(places: list[int]) -> list[str]:
        return generate(model, tokenizer, [prompts[place] for place in places], ends, LENGTH)

    together = answer(list(range(len(prompts))))
    handle.remove()
    assert rows == sorted(rows, reverse=True) and rows[0] == len(prompts) > rows[-1] > 0
    assert len(rows) <= LENGTH and len(set(rows)) > 2
    assert together == [answer([place])[0] for place in range(len(prompts))]
    assert len({len(tokenizer(text)["input_ids"]) for text in together}) > 3
