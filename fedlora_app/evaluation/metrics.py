"""What a model's answers to a question set are worth.

*Ranking*, the primary measure: the right answer must be more likely than every other candidate,
by the sum of its tokens' log-likelihoods (raw), per UTF-8 byte, and relative to the answer's
likelihood without the question (PMI). *Generation*: the greedy answer must equal the right
one after normalisation; ROUGE-L, and the keyword rule where a record carries keywords.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import EvaluationConfig
from fedlora_app.data.keywords import UNSPACED, continues_word, passes_keyword_rule
from fedlora_app.data.questions import Question
from fedlora_app.evaluation.gate import Gate
from fedlora_app.evaluation.scoring import Answered, Progress, Prompt, score_prompts
from fedlora_app.model.adapters import AdaptedModel, activate, base_only

SENTENCE_PUNCTUATION = r"""[.,;:!?'"`…、。·()\[\]{}«»‹›“”„‘’「」『』《》【】¡¿]"""


@dataclass(frozen=True)
class Score:
    """How one question went.

    ``margin`` is the right answer's log-likelihood minus the best wrong one's, in nats, and
    ``margin_per_byte`` and ``margin_pmi`` likewise. What concerns the ranking is None where
    there was no other candidate, what concerns the right answer where none is known, and
    ``keyword`` where the record carries no keywords.
    """

    margin: float | None
    margin_per_byte: float | None
    margin_pmi: float | None
    exact_match: bool | None
    rouge_l: float | None
    keyword: bool | None
    generated: str
    log_likelihoods: tuple[float, ...] = ()

    @property
    def ranked_first(self) -> bool | None:
        """Whether the right answer is the most likely; a tie is not enough."""
        return None if self.margin is None else self.margin > 0

    @property
    def ranked_first_per_byte(self) -> bool | None:
        """Likewise by the likelihood per UTF-8 byte."""
        return None if self.margin_per_byte is None else self.margin_per_byte > 0

    @property
    def ranked_first_pmi(self) -> bool | None:
        """Likewise relative to the answers' likelihoods without the question."""
        return None if self.margin_pmi is None else self.margin_pmi > 0


def evaluate_questions(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    active: Sequence[str],
    system_prompt: str,
    settings: EvaluationConfig,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Score every question with the adapters ``active`` (none: the base model alone)."""
    prompts = [Prompt(system_prompt, q.text, q.candidates) for q in questions]

    def answer() -> list[Answered]:
        return score_prompts(
            model,
            tokenizer,
            prompts,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            gate=gate,
            progress=progress,
        )

    if active:
        activate(model, active)
        answers = answer()
    else:
        with base_only(model):
            answers = answer()
    return [score_answer(q, answered) for q, answered in zip(questions, answers, strict=True)]


def score_answer(
    question: Question, answered: Answered, unconditional: Mapping[str, float] | None = None
) -> Score:
    """Compare what the model made of a question with its right answer.

    Args:
        unconditional: each candidate's log-likelihood without the question, for PMI.
    """
    raw = answered.log_likelihoods
    candidates = question.candidates
    per_byte = [v / len(text.encode()) for v, text in zip(raw, candidates, strict=True)]
    pmi = []
    if unconditional is not None:
        pmi = [v - unconditional[text] for v, text in zip(raw, candidates, strict=True)]
    answer, generated = question.answer, answered.generated
    keyword = None
    if question.own_keywords:
        keyword = passes_keyword_rule(generated, question.own_keywords, question.other_keywords)
    return Score(
        margin=_margin(raw),
        margin_per_byte=_margin(per_byte),
        margin_pmi=_margin(pmi),
        exact_match=None if answer is None else matches_exactly(generated, answer),
        rouge_l=None if answer is None else compute_rouge_l(generated, answer),
        keyword=keyword,
        generated=generated,
        log_likelihoods=tuple(raw),
    )


def compute_interaction(
    own: Mapping[str, float], other: Mapping[str, float], own_answer: str, other_answer: str
) -> float:
    """Return [ll_i(a_i) - ll_i(a_j)] - [ll_j(a_i) - ll_j(a_j)], in nats.

    The priors of question and answers cancel: above 0, client i leans more to its own answer
    than client j does.

    Args:
        own, other: the log-likelihoods of the answers at clients i and j.
        own_answer, other_answer: a_i and a_j.
    """
    difference = own[own_answer] - own[other_answer]
    return difference - (other[own_answer] - other[other_answer])


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Return the means over a question set; empty for an empty one."""
    if not scores:
        return {}
    summary: dict[str, float] = {"n": len(scores)}
    answered = [score.exact_match for score in scores if score.exact_match is not None]
    if answered:
        summary["exact_match"] = _mean(answered)
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
    """Return whether two texts are the same after normalisation, and not both empty."""
    return normalise_answer(generated) == normalise_answer(answer) != ""


def compute_rouge_l(generated: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words, in [0, 1].

    Lin 2004, https://aclanthology.org/W04-1013. Chinese, Japanese and Korean characters count as
    words of their own; rouge-score's own tokenizer would drop them.
    """
    return _ROUGE.score(answer, generated)["rougeL"].fmeasure


def split_words(text: str) -> list[str]:
    """Return the words of a text, case folded; scripts without spaces by the character."""
    words: list[str] = []
    is_open = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        continues = continues_word(character)
        if continues and is_open:
            words[-1] += character
        elif continues or UNSPACED.match(character):
            words.append(character)
        is_open = continues
    return words


class _WordTokenizer:
    """The form in which rouge-score takes ``split_words``."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


_ROUGE = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())


def _margin(values: Sequence[float]) -> float | None:
    return values[0] - max(values[1:]) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
