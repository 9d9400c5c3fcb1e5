from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
from conftest import build_tiny_model

from fedlora_app.config.schema import GLOBAL, LOCAL, EvaluationConfig
from fedlora_app.data.dialogue import encode_answer, encode_prompt
from fedlora_app.data.questions import Question
from fedlora_app.evaluation import scoring
from fedlora_app.evaluation.client_round import evaluate_questions
from fedlora_app.evaluation.decoding import strip_reasoning
from fedlora_app.evaluation.names import ACCURACY
from fedlora_app.evaluation.scoring import Prompt, score_prompts, shares_prefix
from fedlora_app.model.adapters import activate, attach_adapters, base_only

SYSTEM = "You help."
PROMPTS = [
    Prompt(SYSTEM, "How much is a passport?", ("The fee is 30 dollars.", "Nothing.", "Ask.")),
    Prompt(SYSTEM, "Where?", ("At the town hall, on the left.", "No.")),
    Prompt("", "A rather long question about garden waste, is it not?", ("Yes.", "Perhaps so.")),
    Prompt(SYSTEM, "When does the museum open on a Monday?", ("At ten.", "At nine.", "At one.")),
    Prompt("Another prompt.", "Why?"),
    Prompt(SYSTEM, "", tuple(f"Answer number {n}." for n in range(20)), generates=False),
]


def score(model, tokenizer, prompts=PROMPTS, active=(GLOBAL, LOCAL), **settings):
    activate(model, active)
    settings = {"batch_size": 3, "max_new_tokens": 6} | settings
    return score_prompts(model, tokenizer, prompts, **settings)


def likelihood(model, tokenizer, prompt: Prompt, candidate: str) -> float:
    """One unbatched forward pass with transformers' own logits."""
    ids = encode_prompt(tokenizer, prompt.system_prompt, prompt.question)
    answer = encode_answer(tokenizer, prompt.system_prompt, prompt.question, candidate)
    with torch.no_grad():
        log_probs = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(ids) - 1 + i, token].item() for i, token in enumerate(answer))


def generate(model, tokenizer, prompt: Prompt, max_new_tokens: int = 6) -> str:
    """Greedy decoding, one token and one forward pass at a time."""
    ids = encode_prompt(tokenizer, prompt.system_prompt, prompt.question)
    start = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_likelihoods_equal_one_forward_pass_per_candidate(adapted, tokenizer, batch_size):
    order = random.Random(batch_size).sample(range(len(PROMPTS)), len(PROMPTS))
    prompts = [PROMPTS[index] for index in order]
    for prompt, answered in zip(
        prompts, score(adapted, tokenizer, prompts, batch_size=batch_size), strict=True
    ):
        expected = [likelihood(adapted, tokenizer, prompt, c) for c in prompt.candidates]
        assert answered.log_likelihoods == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sliding"])
def test_prompts_are_shared_only_where_that_is_exact(tokenizer, adapters_config, attention):
    """A sliding window is counted in positions of the packed row, so packing would be wrong."""
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    base = build_tiny_model(len(tokenizer), **(changes if attention == "sliding" else {}))
    if attention != "sliding":
        base.set_attn_implementation(attention)
    model = attach_adapters(base, adapters_config)
    assert shares_prefix(model) == (attention != "sliding")
    for prompt, answered in zip(PROMPTS, score(model, tokenizer), strict=True):
        expected = [likelihood(model, tokenizer, prompt, c) for c in prompt.candidates]
        assert answered.log_likelihoods == pytest.approx(expected, abs=1e-5)


def test_packed_and_separate_rows_agree(adapted, tokenizer, monkeypatch):
    packed = score(adapted, tokenizer)
    monkeypatch.setattr(scoring, "shares_prefix", lambda model: False)
    separate = score(adapted, tokenizer)
    for one, other in zip(packed, separate, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)
        assert one.generated == other.generated


def test_a_row_holds_many_candidates(adapted, tokenizer, monkeypatch):
    """The prompt is computed once for all of its candidates."""
    assert shares_prefix(adapted)  # tried out before the lengths are counted
    lengths = []
    inner = adapted.get_base_model().base_model
    forward = inner.forward

    def count(*args, **kwargs):
        lengths.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(inner, "forward", count)
    prompt = Prompt(SYSTEM * 10, "Where?", ("Here.", "There.", "Nowhere."), generates=False)
    score(adapted, tokenizer, [prompt])
    prompt_length = len(encode_prompt(tokenizer, prompt.system_prompt, prompt.question))
    answers = [encode_answer(tokenizer, SYSTEM, "Where?", c) for c in prompt.candidates]
    assert lengths == [prompt_length + len(list(chain(*answers)))]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generation_is_greedy_token_for_token(adapted, tokenizer, batch_size):
    answers = score(adapted, tokenizer, batch_size=batch_size)
    for prompt, answered in zip(PROMPTS, answers, strict=True):
        expected = generate(adapted, tokenizer, prompt) if prompt.generates else ""
        assert answered.generated == expected


def test_a_candidate_that_is_the_greedy_answer_is_not_generated_again(
    adapted, tokenizer, monkeypatch
):
    """Whatever the shortcut says must be what generation would have said."""
    questions = [prompt for prompt in PROMPTS if prompt.generates]
    # A model that ends its turn by itself: the greedy answers stop after two tokens.
    texts = [generate(adapted, tokenizer, prompt, 2) for prompt in questions]
    head = adapted.get_base_model().get_output_embeddings()
    forward = type(head).forward
    stop = tokenizer.eos_token_id
    prompts = [
        Prompt(q.system_prompt, q.question, ("Other.", text))
        for q, text in zip(questions, texts, strict=True)
    ]
    answers = [encode_answer(tokenizer, SYSTEM, "q", text) for text in texts]
    assert all(ids[-1] == stop for ids in answers)

    calls = []
    original = scoring.generate

    def counted(*args, **settings):
        calls.append(len(args[2]))
        return original(*args, **settings)

    monkeypatch.setattr(scoring, "generate", counted)
    before = score(adapted, tokenizer, prompts)
    assert sum(calls) == len(prompts)  # no candidate ends where the model would not end
    assert [a.generated for a in before] == [generate(adapted, tokenizer, p) for p in prompts]

    bias = torch.zeros(head.weight.shape[0])
    bias[stop] = 1e4
    monkeypatch.setattr(head, "forward", lambda x: forward(head, x) + bias)
    calls.clear()
    empty = [Prompt(q.system_prompt, q.question, ("Other.", "")) for q in questions]
    answers = score(adapted, tokenizer, empty)
    assert not calls and [a.generated for a in answers] == [""] * len(empty)


def test_an_answer_over_the_limit_is_cut_as_generation_cuts_it(adapted, tokenizer):
    prompt = PROMPTS[0]
    text = generate(adapted, tokenizer, prompt, 12)
    candidate = Prompt(prompt.system_prompt, prompt.question, (text,))
    answered = score(adapted, tokenizer, [candidate], max_new_tokens=4)[0]
    assert answered.generated == generate(adapted, tokenizer, prompt, 4) != text


def test_progress_ends_at_the_number_of_prompts(adapted, tokenizer):
    seen = []
    score(adapted, tokenizer, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == len(PROMPTS)


def test_the_adapters_that_are_asked_for_answer(adapted, tokenizer):
    question = Question(PROMPTS[0].question, PROMPTS[0].candidates)
    margins = {
        active: evaluate_questions(
            adapted,
            tokenizer,
            [question],
            active=active,
            system_prompt=SYSTEM,
            settings=EvaluationConfig(batch_size=3, max_new_tokens=6),
        )[0].value(ACCURACY)
        for active in ((), (GLOBAL,), (LOCAL,), (GLOBAL, LOCAL))
    }
    assert len(set(margins.values())) == 4
    with base_only(adapted):
        raw = [likelihood(adapted, tokenizer, PROMPTS[0], c) for c in question.candidates]
    assert margins[()] == pytest.approx(raw[0] - max(raw[1:]), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\n</think>\n\nAt noon.", "At noon."),
        ("<think>Is it noon?</think>At noon.", "At noon."),
        ("It may be noon.\n</think>\n\nAt noon.", "At noon."),  # the prompt had opened the block
        ("</think>\nAt noon.", "At noon."),
        ("It may be noon.\r\n </think> \r\nAt noon.", "At noon."),
        ("Write </think> behind it.", "Write </think> behind it."),
        ("It is 5 </think>\nand 6.", "It is 5 </think>\nand 6."),
        ("<think>a\n</think>\nAt </think>\n</think>\nnoon.", "At </think>\n</think>\nnoon."),
        ("<think>Let me think, and think", ""),
        (" At noon. ", "At noon."),
        ("I say <think> is a word.", "I say <think> is a word."),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert strip_reasoning(text) == answer
