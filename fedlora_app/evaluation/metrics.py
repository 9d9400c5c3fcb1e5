"""What one answer is worth, by one measure: pure functions of a question and what a model said.

*Ranking*, the primary measure: the right answer must be more likely than every other candidate,
by the sum of its tokens' log-likelihoods (raw), per UTF-8 byte, and relative to the answer's
likelihood without the question (PMI). *Generation*: the greedy answer must equal the right
one after normalisation; ROUGE-L, the keyword rule where a record carries keywords, and where a
sentence-embedding model was asked, the candidate that the answer is nearest to in meaning.

A measure is None where it cannot be taken: a ranking without another candidate, a comparison
without a right answer, the keyword rule without keywords. ``names.MEASURES`` registers them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from fedlora_app.data.keywords import passes_keyword_rule, split_words
from fedlora_app.data.questions import Question
from fedlora_app.data.similarity import normalise_answer

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

    from fedlora_app.evaluation.scoring import Answered


def margin(question: Question, answered: Answered) -> float | None:
    """Return the right answer's log-likelihood minus the best wrong one's, in nats."""
    return _margin(answered.log_likelihoods)


def margin_per_byte(question: Question, answered: Answered) -> float | None:
    """Return the same of the likelihoods per UTF-8 byte, in nats per byte."""
    pairs = zip(answered.log_likelihoods, question.candidates, strict=True)
    return _margin([value / len(text.encode()) for value, text in pairs])


def margin_pmi(question: Question, answered: Answered) -> float | None:
    """Return the same relative to the answers' likelihoods without the question, in nats."""
    if answered.priors is None:
        return None
    pairs = zip(answered.log_likelihoods, answered.priors, strict=True)
    return _margin([value - prior for value, prior in pairs])


def margin_semantic(question: Question, answered: Answered) -> float | None:
    """Return how much nearer in meaning the greedy answer is to the right one than to any other."""
    return None if answered.similarities is None else _margin(answered.similarities)


def exact_match(question: Question, answered: Answered) -> bool | None:
    """Return whether the greedy answer is the right one after normalisation."""
    return None if question.answer is None else matches_exactly(answered.generated, question.answer)


def rouge_l(question: Question, answered: Answered) -> float | None:
    """Return the greedy answer's ROUGE-L against the right one, in [0, 1]."""
    return None if question.answer is None else compute_rouge_l(answered.generated, question.answer)


def keyword(question: Question, answered: Answered) -> bool | None:
    """Return whether the greedy answer passes the keyword rule."""
    if not question.own_keywords:
        return None
    own, others = question.own_keywords, question.other_keywords
    return passes_keyword_rule(answered.generated, own, others)


def matches_exactly(generated: str, answer: str) -> bool:
    """Return whether two texts are the same after normalisation, and not both empty."""
    return normalise_answer(generated) == normalise_answer(answer) != ""


def compute_rouge_l(generated: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words, in [0, 1].

    Lin 2004, https://aclanthology.org/W04-1013. Chinese, Japanese and Korean characters count as
    words of their own; rouge-score's own tokenizer would drop them.
    """
    return _rouge().score(answer, generated)["rougeL"].fmeasure


class _WordTokenizer:
    """The form in which rouge-score takes ``split_words``."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # takes two seconds

    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer())


def _margin(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return values[0] - (math.nan if any(map(math.isnan, values)) else max(values[1:]))
