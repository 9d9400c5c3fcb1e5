from __future__ import annotations

import pytest
import torch

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import encode_prompt
from fedlora_app.evaluation.gate import compute_features, fit_gate
from fedlora_app.evaluation.scoring import Prompt, score_prompts
from fedlora_app.model.adapters import activate, scaled_local

SYSTEM = "You help."
LOCAL_RECORDS = [
    Record(f"What is the penalty for {what}?", "A fine.")
    for what in ("noise at night", "a lost key", "late books", "wild parking", "a dirty yard")
]
UNIVERSAL_RECORDS = [
    Record(f"How much does {what} cost?", "Ten dollars.")
    for what in ("a passport", "a visa", "a birth certificate", "a fishing licence")
]


@pytest.fixture
def gate(adapted, tokenizer):
    return fit_gate(adapted, tokenizer, SYSTEM, LOCAL_RECORDS, UNIVERSAL_RECORDS)


def encode(tokenizer, *questions: str) -> list[list[int]]:
    return [encode_prompt(tokenizer, SYSTEM, question) for question in questions]


def test_the_gate_opens_for_local_questions(adapted, tokenizer, gate):
    local = encode(tokenizer, "What is the penalty for loud music?")
    universal = encode(tokenizer, "How much does a hunting licence cost?")
    open_, closed = gate.weigh(adapted, local + universal).tolist()
    assert open_ > 0.8 and closed < 0.2


def test_the_gate_does_not_depend_on_the_adapters(adapted, tokenizer, gate):
    activate(adapted, (GLOBAL, LOCAL))
    prompts = encode(tokenizer, "Why?", "What is the penalty for noise, and where is it paid?")
    before = gate.weigh(adapted, prompts)
    for parameter in adapted.parameters():
        if parameter.shape and parameter.shape[-1] in (2, 4):
            parameter.data.add_(1.0)
    torch.testing.assert_close(gate.weigh(adapted, prompts), before)


def test_neighbours_change_no_feature(adapted, tokenizer):
    prompts = encode(tokenizer, "Why?", "A much longer question about nothing at all, is it?")
    together = compute_features(adapted, prompts)
    for prompt, expected in zip(prompts, together, strict=True):
        torch.testing.assert_close(
            compute_features(adapted, [prompt])[0], expected, atol=1e-5, rtol=0
        )


def test_each_row_is_weighed_by_its_own_prompt(adapted, tokenizer, gate):
    prompts = [
        Prompt(SYSTEM, "What is the penalty for loud music?", ("A fine.", "None.")),
        Prompt(SYSTEM, "How much does a hunting licence cost?", ("Ten.", "Twelve dollars.")),
        Prompt(SYSTEM, "Why?", ("So.",)),
    ]
    activate(adapted, (GLOBAL, LOCAL))
    settings = {"batch_size": 8, "max_new_tokens": 6}
    gated = score_prompts(adapted, tokenizer, prompts, gate=gate, **settings)
    for prompt, answered in zip(prompts, gated, strict=True):
        weight = gate.weigh(adapted, encode(tokenizer, prompt.question)).item()
        with scaled_local(adapted, weight):
            (expected,) = score_prompts(adapted, tokenizer, [prompt], **settings)
        assert answered.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
        assert answered.generated == expected.generated
