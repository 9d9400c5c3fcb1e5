"""One evaluator for every question set, by likelihood and by generation.

A question set is a list of questions with their candidate answers, the right one first.
*Ranking*: the right answer must be more likely than every other candidate, by the sum of
its tokens' log-likelihoods (raw) and by that sum per UTF-8 byte. *Generation*: the greedy
answer must equal the right one after normalisation.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedlora_app.adapters import AdaptedModel, activate, base_only
from fedlora_app.config import EvaluationConfig
from fedlora_app.data import ConflictRecord, Record, format_question
from fedlora_app.seeds import derive_seed
from fedlora_app.tokens import Example, encode_answer, encode_prompt
from fedlora_app.training import answer_log_likelihoods

UNIVERSAL, LOCAL_SET, CONFLICT = "universal", "local", "conflict"
NUM_DRAWN_DISTRACTORS = 3
SENTENCE_PUNCTUATION = r"""[.,;:!?'"`…、。·()\[\]{}«»‹›“”„‘’「」『』《》【】¡¿]"""


@dataclass(frozen=True)
class Question:
    """A question with its candidate answers, the right one first."""

    text: str
    candidates: tuple[str, ...]
    is_unseen: bool = False
    """The client had no training record about this question's fact."""
    record: int = 0
    """Position of its record in the file."""

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.candidates[0]


@dataclass(frozen=True)
class Score:
    """How one question went. ``margin_per_byte`` is right minus best wrong, in nats.

    What concerns the ranking is None where there was no other candidate.
    """

    ranked_first: bool | None
    ranked_first_per_byte: bool | None
    margin_per_byte: float | None
    exact_match: bool
    generated: str


def build_questions(
    records: Sequence[Record], trained_facts: frozenset[str] | None = None
) -> list[Question]:
    """Turn records into questions; distractors are drawn from the set where none are given.

    Args:
        trained_facts: facts of the client's training records, to tell what it never saw.
    """
    outputs = sorted({record.output for record in records})
    questions = []
    for position, record in enumerate(records):
        distractors = record.distractors or _draw_distractors(record, outputs)
        questions.append(
            Question(
                text=format_question(record),
                candidates=_unique([record.output, *distractors]),
                is_unseen=bool(trained_facts and record.fact and record.fact not in trained_facts),
                record=position,
            )
        )
    return questions


def build_conflict_questions(records: Sequence[ConflictRecord], client_id: str) -> list[Question]:
    """Turn conflict records into one client's questions: its answer against the others'."""
    questions = []
    for position, record in enumerate(records):
        if client_id not in record.answers:
            continue
        others = [answer for client, answer in record.answers.items() if client != client_id]
        candidates = _unique([record.answers[client_id], *others, *record.distractors])
        questions.append(Question(format_question(record), candidates, record=position))
    return questions


@torch.inference_mode()
def evaluate_questions(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    active: Sequence[str],
    system_prompt: str,
    settings: EvaluationConfig,
) -> list[Score]:
    """Score every question with the adapters ``active`` (none: the base model alone)."""
    model.eval()
    if not active:
        with base_only(model):
            return _evaluate(model, tokenizer, questions, system_prompt, settings)
    activate(model, active)
    return _evaluate(model, tokenizer, questions, system_prompt, settings)


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Return the means over a question set; empty for an empty one."""
    if not scores:
        return {}
    summary = {"n": len(scores), "exact_match": _mean([score.exact_match for score in scores])}
    ranked = [score for score in scores if score.ranked_first is not None]
    if ranked:
        summary |= {
            "n_ranked": len(ranked),
            "rank_accuracy": _mean([score.ranked_first for score in ranked]),
            "rank_accuracy_per_byte": _mean([score.ranked_first_per_byte for score in ranked]),
            "margin_per_byte": _mean([score.margin_per_byte for score in ranked]),
        }
    return summary


def normalise_answer(text: str) -> str:
    """Return the text for comparison: NFKC, case folded, without sentence punctuation.

    Signs that carry meaning (minus, percent, currencies) and combining marks stay.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(SENTENCE_PUNCTUATION, " ", folded).split())


def matches_exactly(generated: str, answer: str) -> bool:
    """Tell whether two texts are the same after normalisation, and not both empty."""
    return normalise_answer(generated) == normalise_answer(answer) != ""


def _evaluate(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    system_prompt: str,
    settings: EvaluationConfig,
) -> list[Score]:
    likelihoods = _rank(model, tokenizer, questions, system_prompt, settings)
    answers = _generate(model, tokenizer, questions, system_prompt, settings)
    scores = []
    for question, raw, generated in zip(questions, likelihoods, answers, strict=True):
        per_byte = [
            value / len(candidate.encode())
            for value, candidate in zip(raw, question.candidates, strict=True)
        ]
        margin = per_byte[0] - max(per_byte[1:]) if len(raw) > 1 else None
        scores.append(
            Score(
                ranked_first=None if margin is None else raw[0] > max(raw[1:]),
                ranked_first_per_byte=None if margin is None else margin > 0,
                margin_per_byte=margin,
                exact_match=matches_exactly(generated, question.answer),
                generated=generated,
            )
        )
    return scores


def _rank(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    system_prompt: str,
    settings: EvaluationConfig,
) -> list[list[float]]:
    """Return every candidate's log-likelihood, in nats, end-of-turn mark included."""
    examples: list[Example] = []
    for question in questions:
        prompt_ids = encode_prompt(tokenizer, system_prompt, question.text)
        for candidate in question.candidates:
            answer_ids = encode_answer(tokenizer, system_prompt, question.text, candidate)
            examples.append(Example(prompt_ids + answer_ids, len(prompt_ids)))
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    totals = [0.0] * len(examples)
    for start in range(0, len(by_length), settings.batch_size):
        indices = by_length[start : start + settings.batch_size]
        batch = [examples[index] for index in indices]
        log_likelihoods = answer_log_likelihoods(model, batch, tokenizer.pad_token_id, model.device)
        for index, values in zip(indices, log_likelihoods, strict=True):
            totals[index] = values.double().sum().item()
    per_candidate = iter(totals)
    return [[next(per_candidate) for _ in question.candidates] for question in questions]


def _generate(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    system_prompt: str,
    settings: EvaluationConfig,
) -> list[str]:
    """Return the greedy answers, padded on the left and masked while batched."""
    if not questions:
        return []
    prompts = [encode_prompt(tokenizer, system_prompt, question.text) for question in questions]
    end_of_turn = encode_answer(tokenizer, system_prompt, questions[0].text, "x")[-1]
    stop_ids = sorted({end_of_turn, tokenizer.eos_token_id} - {None})
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(by_length), settings.batch_size):
        indices = by_length[start : start + settings.batch_size]
        batch = tokenizer.pad(
            {"input_ids": [prompts[index] for index in indices]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        output = model.get_base_model().generate(**batch, generation_config=generation)
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text.strip()
    return answers


def _draw_distractors(record: Record, outputs: Sequence[str]) -> list[str]:
    """Draw other records' answers, the same ones whatever the order of the file."""
    others = [output for output in outputs if output != record.output]
    rng = random.Random(derive_seed("distractors", record.instruction, record.input))
    return rng.sample(others, min(NUM_DRAWN_DISTRACTORS, len(others)))


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
