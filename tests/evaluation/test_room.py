"""Evaluation where memory runs out: a model that cannot take many rows gives the same answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import build_tiny_model
from live_memory import LiveMemory

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.dialogue import encode_prompt, encode_with_answers
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.memory import MAX_TOKENS, AnswerBatch, count_answer_bytes, fit_tokens
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.evaluation.room import GENERATING, SCORING, EvaluationError, count_halvings
from fedlora_app.evaluation.scoring import Prompt, score_examples, score_prompts
from fedlora_app.model.adapters import (
    AdaptedModel,
    activate,
    adapter_parameters,
    attach_adapters,
)
from fedlora_app.training.activations import Numerics, read_shape

WORDS = ["passport", "museum", "garden", "waste", "school", "library", "dog", "bridge"]
PROMPTS = [
    Prompt(
        "You help.",
        f"{'Please say, ' * (number % 5)}what about the {word} number {number}?",
        tuple(f"The {word} costs {number + wrong} dollars." for wrong in range(number % 4)),
    )
    for number, word in enumerate(WORDS * 2)
]


@contextmanager
def memory_for(model: AdaptedModel, num_rows: int, num_tokens: int = 10**9) -> Iterator[list[int]]:
    """Have the decoder run out of memory with more rows, or tokens; yield the rows of each pass."""
    passes = []

    def check(module: torch.nn.Module, args: tuple, settings: dict) -> None:
        ids = settings.get("input_ids", args[0] if args else None)
        if len(ids) > num_rows or ids.numel() > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        passes.append(len(ids))

    handle = model.get_base_model().base_model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def score(model, tokenizer, **settings):
    activate(model, (GLOBAL, LOCAL))
    settings = {"batch_size": 16, "max_new_tokens": 5} | settings
    return score_prompts(model, tokenizer, PROMPTS, **settings)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_answers_are_the_same_where_memory_runs_out(adapted, tokenizer, num_rows, capsys):
    expected = score(adapted, tokenizer)
    assert count_halvings(adapted) == 0
    with memory_for(adapted, num_rows) as passes:
        found = score(adapted, tokenizer)
        assert max(passes) == num_rows
        said = capsys.readouterr().err
        for kind in (SCORING, GENERATING):
            assert f"out of memory while {kind}" in said
        once = count_halvings(adapted)
        passes.clear()
        assert [a.generated for a in score(adapted, tokenizer)] == [a.generated for a in found]
        # What did not fit is known: nearly all batches of the same questions are small at once.
        assert once > 0 and count_halvings(adapted) - once < once
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.generated == theirs.generated
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-5)


def test_a_row_that_does_not_fit_is_divided_by_its_candidates(adapted, tokenizer):
    prompt = Prompt("", "Which one?", tuple(f"It is number {n}." for n in range(9)), False)
    activate(adapted, (GLOBAL, LOCAL))
    ask = {"batch_size": 16, "max_new_tokens": 5}
    (expected,) = score_prompts(adapted, tokenizer, [prompt], **ask)
    prompt_length = len(encode_prompt(tokenizer, "", "Which one?"))
    done = []
    with memory_for(adapted, 16, prompt_length + 24) as passes:
        (found,) = score_prompts(adapted, tokenizer, [prompt], **ask, progress=done.append)
    assert len(passes) > 1 and done[-1] == 1
    assert found.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-5)


def test_one_question_that_does_not_fit_says_what_helps(adapted, tokenizer):
    with memory_for(adapted, 16, 4), pytest.raises(EvaluationError, match="with one row of .*4bit"):
        score(adapted, tokenizer)


def test_other_errors_are_not_taken_for_it(adapted, tokenizer):
    def fail(*args, **settings):
        raise RuntimeError("something else")

    handle = adapted.get_base_model().base_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="something else"):
        score(adapted, tokenizer)
    handle.remove()
    assert count_halvings(adapted) == 0


def test_the_gate_and_membership_survive_too(adapted, tokenizer):
    ids = [encode_prompt(tokenizer, p.system_prompt, p.question) for p in PROMPTS]
    rng = random.Random(0)
    examples = [Example([rng.randrange(3, 200) for _ in range(n)], n // 2) for n in range(4, 20)]
    features, scored = compute_features(adapted, ids), score_examples(adapted, examples, 8)
    with memory_for(adapted, 2, 90):
        for ours, theirs in zip(compute_features(adapted, ids), features, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        for ours, theirs in zip(score_examples(adapted, examples, 8), scored, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


# The memory model


SHAPES = [
    {"hidden_size": 128, "intermediate_size": 1000, "num_hidden_layers": 3},
    {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "vocab_size": 2000},
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("max_new_tokens", [0, 6])
def test_the_peak_of_a_real_batch(tokenizer, adapters_config, changes, max_new_tokens):
    base = build_tiny_model(**({"vocab_size": len(tokenizer)} | changes))
    model = attach_adapters(base, adapters_config)
    activate(model, (GLOBAL, LOCAL))
    question, candidates = "Why is that so, " * 9, () if max_new_tokens else ("Number 1.", "2.")
    prompts = [Prompt("", question, candidates, bool(max_new_tokens))] * 8
    settings = {"batch_size": 32, "max_new_tokens": max_new_tokens}
    with LiveMemory() as memory:
        score_prompts(model, tokenizer, prompts, **settings)
    prompt, answers = encode_with_answers(tokenizer, "", question, candidates)
    num_answers = sum(map(len, answers))
    length, num_logits = len(prompt) + num_answers, 8 * (num_answers or 1)
    predicted = count_answer_bytes(
        *(read_shape(base.config), Numerics(False, 4)),
        *(AnswerBatch(8, length, num_logits, max_new_tokens), 0),
        sum(p.numel() for name in (GLOBAL, LOCAL) for p in adapter_parameters(model, name)),
    )
    assert predicted == pytest.approx(memory.peak, rel=0.2)


def test_less_memory_means_fewer_tokens(tokenizer):
    shape, numerics = read_shape(build_tiny_model(len(tokenizer)).config), Numerics(False, 4)
    batch = AnswerBatch(163, 100, 256)
    needed = count_answer_bytes(shape, numerics, batch, 0, 0)
    found = [fit_tokens(shape, numerics, batch, 0, 0, needed * free) for free in (1, 0.7, 0.4)]
    assert found == [MAX_TOKENS, MAX_TOKENS // 2, MAX_TOKENS // 4]
    assert 100 <= fit_tokens(shape, numerics, batch, 0, 0, 0) < 200  # one row is always tried
