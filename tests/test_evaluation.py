from __future__ import annotations

import random

import pytest
import torch

from fedlora_app.adapters import GLOBAL, LOCAL, activate, base_only
from fedlora_app.config import EvaluationConfig
from fedlora_app.data import ConflictRecord, Record
from fedlora_app.evaluation import (
    Question,
    build_conflict_questions,
    build_questions,
    evaluate_questions,
    matches_exactly,
    summarise,
)
from fedlora_app.tokens import encode_answer, encode_prompt

PROMPT = "You help."
QUESTIONS = [
    Question("How much is a passport?", ("The fee is 30 dollars.", "Nothing.", "Ask the town.")),
    Question("Where?", ("At the town hall, on the left.", "No.")),
    Question("A rather long question about garden waste, is it not?", ("Yes.", "Perhaps so.")),
    Question("When does the museum open on a Monday?", ("At ten.", "At nine.", "At one.")),
]


def evaluate(model, tokenizer, questions=QUESTIONS, active=(GLOBAL, LOCAL), **settings):
    return evaluate_questions(
        model,
        tokenizer,
        questions,
        active=active,
        system_prompt=PROMPT,
        settings=EvaluationConfig(**({"batch_size": 3, "max_new_tokens": 6} | settings)),
    )


def likelihood(model, tokenizer, question: str, candidate: str) -> float:
    """One unbatched forward pass with transformers' own logits."""
    prompt = encode_prompt(tokenizer, PROMPT, question)
    answer = encode_answer(tokenizer, PROMPT, question, candidate)
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def test_ranking_equals_one_forward_pass_per_candidate(adapted, tokenizer):
    scores = evaluate(adapted, tokenizer)
    activate(adapted, (GLOBAL, LOCAL))
    for question, score in zip(QUESTIONS, scores, strict=True):
        raw = [likelihood(adapted, tokenizer, question.text, c) for c in question.candidates]
        per_byte = [v / len(c.encode()) for v, c in zip(raw, question.candidates, strict=True)]
        assert score.ranked_first == (raw[0] > max(raw[1:]))
        assert score.ranked_first_per_byte == (per_byte[0] > max(per_byte[1:]))
        assert score.margin_per_byte == pytest.approx(per_byte[0] - max(per_byte[1:]), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_neither_batch_size_nor_order_changes_a_score(adapted, tokenizer, batch_size):
    expected = evaluate(adapted, tokenizer)
    order = random.Random(batch_size).sample(range(len(QUESTIONS)), len(QUESTIONS))
    shuffled = [QUESTIONS[index] for index in order]
    scores = evaluate(adapted, tokenizer, shuffled, batch_size=batch_size)
    for index, score in zip(order, scores, strict=True):
        assert score.generated == expected[index].generated
        assert score.margin_per_byte == pytest.approx(expected[index].margin_per_byte, abs=1e-5)


def test_generation_is_greedy(adapted, tokenizer):
    scores = evaluate(adapted, tokenizer)
    activate(adapted, (GLOBAL, LOCAL))
    for question, score in zip(QUESTIONS, scores, strict=True):
        ids = encode_prompt(tokenizer, PROMPT, question.text)
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                token = adapted(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert score.generated == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_what_is_generated_is_compared_with_the_answer(adapted, tokenizer):
    for question, score in zip(QUESTIONS, evaluate(adapted, tokenizer), strict=True):
        assert score.generated and not score.exact_match
        echo = Question(question.text, (score.generated, "Wrong."))
        assert evaluate(adapted, tokenizer, [echo])[0].exact_match


def test_the_adapters_that_are_asked_for_answer(adapted, tokenizer):
    base = evaluate(adapted, tokenizer, active=())
    with base_only(adapted):
        raw = [
            likelihood(adapted, tokenizer, QUESTIONS[0].text, c) for c in QUESTIONS[0].candidates
        ]
    sizes = [len(candidate.encode()) for candidate in QUESTIONS[0].candidates]
    per_byte = [value / size for value, size in zip(raw, sizes, strict=True)]
    assert base[0].margin_per_byte == pytest.approx(per_byte[0] - max(per_byte[1:]), abs=1e-5)
    margins = {
        active: evaluate(adapted, tokenizer, active=active)[0].margin_per_byte
        for active in ((), (GLOBAL,), (LOCAL,), (GLOBAL, LOCAL))
    }
    assert len(set(margins.values())) == 4


def test_facts_without_training_records_are_unseen():
    records = [Record("q1", "a1", fact="f1"), Record("q2", "a2", fact="f2"), Record("q3", "a3")]
    flags = [question.is_unseen for question in build_questions(records, frozenset({"f1"}))]
    assert flags == [False, True, False]
    assert not any(question.is_unseen for question in build_questions(records))


def test_distractors_are_drawn_without_the_answer_and_whatever_the_order():
    records = [Record(f"q{i}", f"a{i % 6}") for i in range(12)]
    one = {q.text: q.candidates for q in build_questions(records)}
    other = {q.text: q.candidates for q in build_questions(records[::-1])}
    assert one == other
    for record in records:
        candidates = one[record.instruction]
        assert candidates[0] == record.output and len(set(candidates)) == len(candidates) == 4


def test_conflict_candidates_are_own_answer_then_the_others():
    records = [
        ConflictRecord("q", answers={"a": "A", "b": "B", "c": "C"}, distractors=("D",)),
        ConflictRecord("q", answers={"b": "B"}),
        ConflictRecord("q", keywords={"a": ("k",)}),
    ]
    questions = build_conflict_questions(records, "a")
    assert [question.candidates for question in questions] == [("A", "B", "C", "D")]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("The fee is 30 dollars.", "the fee is  30 dollars", True),
        ("Ｔhe fee！", "the fee", True),
        ("不可以。", "不可以", True),
        ("不可以", "可以", False),
        ("-5", "5", False),
        ("10 %", "10 $", False),
        ("कि", "का", False),
        ("C++", "C#", False),
        ("...", "", False),
        ("30 dollars", "3 0 dollars", False),
    ],
)
def test_normalisation(one, other, equal):
    assert matches_exactly(one, other) is equal


def test_a_question_without_a_rival_is_not_ranked(adapted, tokenizer):
    questions = [Question("Where?", ("Here.",)), QUESTIONS[0]]
    scores = evaluate(adapted, tokenizer, questions)
    assert scores[0].ranked_first is None and scores[1].ranked_first is not None
    summary = summarise(scores)
    assert (summary["n"], summary["n_ranked"]) == (2, 1)
    assert summary["rank_accuracy"] == float(scores[1].ranked_first)
    assert "rank_accuracy" not in summarise(scores[:1])


def test_an_empty_set_has_no_summary():
    assert summarise([]) == {}
