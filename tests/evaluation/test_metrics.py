from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rouge_score.tokenizers import DefaultTokenizer

from fedlora_app.config.schema import EvaluationConfig
from fedlora_app.data.keywords import passes_keyword_rule, split_words
from fedlora_app.data.questions import (
    Question,
    build_conflict_questions,
    build_questions,
)
from fedlora_app.data.records import ConflictRecord, Record
from fedlora_app.evaluation.client_round import evaluate_questions
from fedlora_app.evaluation.metrics import compute_rouge_l, matches_exactly
from fedlora_app.evaluation.names import ACCURACY, EXACT_MATCH, KEYWORD, PER_BYTE, PMI, ROUGE_L
from fedlora_app.evaluation.scores import compute_interaction, score_answer, summarise
from fedlora_app.evaluation.scoring import Answered

RECORDS = [
    Record("How much is a passport?", "The fee is 30 dollars.", distractors=("Nothing.",)),
    Record("When does the museum open?", "At ten.", distractors=("At nine.", "At one.")),
    Record("护照多少钱？", "三十元。", distractors=("免费。", "五十元。")),
    Record("Where is the town hall?", "On the left."),
    Record("May I park there?", "Yes.", keywords={"strict": ("yes",), "mild": ("no",)}),
]
CONFLICTS = [
    ConflictRecord(
        "可以在这里停车吗？",
        answers={"strict": "不可以，罚款80元。", "mild": "可以。"},
        keywords={"strict": ("不可以",), "mild": ("可以",)},
    ),
    ConflictRecord(
        "How is littering punished?",
        answers={"strict": "A fine of 80 dollars.", "mild": "No fine, but a course."},
        keywords={"strict": ("fine",), "mild": ("course",)},
        distractors=("A written warning.",),
    ),
    ConflictRecord(
        "Who decides?",
        answers={"strict": "The court decides.", "mild": "The neighbours decide."},
        keywords={"strict": ("mayor",), "mild": ("neighbours",)},  # beyond strict's gold answer
    ),
]


def question_sets() -> list[list[Question]]:
    conflicts = [build_conflict_questions(CONFLICTS, client) for client in ("strict", "mild")]
    return [build_questions(RECORDS, client_id="strict"), *conflicts]


def answered_as(question: Question, index: int) -> Answered:
    """A model for which the candidate at ``index`` is likeliest by far, and which says it."""
    values = [-500.0 - position for position in range(len(question.candidates))]
    values[index] = -1.0
    return Answered(tuple(values), question.candidates[index])


def scored_as(question: Question, index: int):
    priors = (-9.0,) * len(question.candidates)
    return score_answer(question, replace(answered_as(question, index), priors=priors))


@pytest.mark.parametrize("number", range(3))
def test_gold_answers_earn_every_point_and_the_keyword_rules_ceiling(number):
    questions = question_sets()[number]
    assert len(questions) == len([RECORDS, CONFLICTS, CONFLICTS][number])
    scores = [scored_as(question, 0) for question in questions]
    for question, score in zip(questions, scores, strict=True):
        assert score.value(EXACT_MATCH) is True and score.value(ROUGE_L) == 1.0
        assert score.outcome(ACCURACY) is score.outcome(PER_BYTE) is score.outcome(PMI) is True
        assert score.value(ACCURACY) >= 499 and score.value(PMI) == score.value(ACCURACY)
        assert score.generated == question.answer
        ceiling = passes_keyword_rule(
            question.answer, question.own_keywords, question.other_keywords
        )
        assert score.value(KEYWORD) is (ceiling if question.own_keywords else None)
    known = [score.value(KEYWORD) for score in scores if score.value(KEYWORD) is not None]
    assert (sum(known), len(known)) == [(1, 1), (2, 3), (3, 3)][number]


@pytest.mark.parametrize("number", range(3))
def test_wrong_answers_earn_nothing(number):
    for question in question_sets()[number]:
        for index in range(1, len(question.candidates)):
            score = scored_as(question, index)
            assert score.value(EXACT_MATCH) is False and score.value(ROUGE_L) < 1
            ranks = (score.outcome(ACCURACY), score.outcome(PER_BYTE), score.outcome(PMI))
            assert ranks == (False, False, False) and score.value(ACCURACY) < 0
            assert not score.value(KEYWORD)


def test_saying_nothing_at_all_earns_nothing():
    question = question_sets()[0][0]
    score = score_answer(question, replace(answered_as(question, 0), generated=""))
    assert (score.value(EXACT_MATCH), score.value(ROUGE_L)) == (False, 0.0)
    assert score.outcome(ACCURACY) is True  # the ranking does not look at what is generated


QUESTION = Question("q", ("A long right answer.", "No."))


def score(*log_likelihoods, candidates=QUESTION.candidates, priors=None):
    question = replace(QUESTION, candidates=candidates)
    return score_answer(question, Answered(tuple(log_likelihoods), "", priors))


def test_the_margin_is_that_to_the_best_wrong_answer():
    result = score(-2.0, -6.0, -3.5, candidates=("right", "bad", "worst"))
    assert result.value(ACCURACY) == 1.5
    assert result.value(PER_BYTE) == pytest.approx(-2 / 5 - -3.5 / 5)
    assert result.log_likelihoods == (-2.0, -6.0, -3.5)


def test_the_likelihood_per_byte_does_not_favour_short_answers():
    result = score(-10.0, -4.0)
    assert result.outcome(ACCURACY) is False
    assert result.outcome(PER_BYTE) is True
    assert result.value(PER_BYTE) == pytest.approx(-10 / 20 + 4 / 3)


def test_bytes_are_those_of_utf8():
    result = score(-6.0, -6.0, candidates=("可以", "可以的"))
    assert result.value(PER_BYTE) == pytest.approx(-6 / 6 + 6 / 9)


def test_pmi_takes_out_an_answers_prior():
    result = score(-10.0, -4.0, priors=(-14.0, -4.5))
    assert result.outcome(ACCURACY) is False and result.value(ACCURACY) == -6.0
    assert result.outcome(PMI) is True and result.value(PMI) == pytest.approx(4.0 - 0.5)
    misled = score(-4.0, -10.0, priors=(-4.0, -14.0))
    assert misled.outcome(ACCURACY) is True and misled.outcome(PMI) is False


def test_without_priors_there_is_no_pmi():
    result = score(-4.0, -10.0)
    assert result.value(PMI) is None and result.outcome(PMI) is None


def test_a_tie_is_not_first():
    result = score(-3.0, -3.0, candidates=("one", "two"), priors=(-1.0, -1.0))
    assert result.value(ACCURACY) == result.value(PER_BYTE) == result.value(PMI) == 0
    ranks = (result.outcome(ACCURACY), result.outcome(PER_BYTE), result.outcome(PMI))
    assert ranks == (False, False, False)


@pytest.mark.parametrize(
    "likelihoods", [(math.nan, -3.0), (-3.0, -4.0, math.nan), (-3.0, math.nan)]
)
def test_where_a_likelihood_is_no_number_nothing_is_first(likelihoods):
    names = ("one", "two", "six")[: len(likelihoods)]
    assert score(*likelihoods, candidates=names).outcome(ACCURACY) is False


def test_a_question_without_a_rival_is_not_ranked():
    result = score(-3.0, candidates=("Here.",), priors=(-1.0,))
    assert (result.value(ACCURACY), result.value(PER_BYTE), result.value(PMI)) == (None, None, None)
    ranks = (result.outcome(ACCURACY), result.outcome(PER_BYTE), result.outcome(PMI))
    assert ranks == (None, None, None)
    assert [result.value(m) for m in (EXACT_MATCH, ROUGE_L, KEYWORD)] == [False, 0, None]


def test_without_a_known_answer_only_the_keyword_rule_applies():
    question = Question("q", (), own_keywords=("course",), other_keywords=("fine",))
    says = score_answer(question, Answered((), "No fine, but a course.", ()))
    assert [says.value(m) for m in (EXACT_MATCH, ROUGE_L, ACCURACY)] == [None] * 3
    assert says.outcome(ACCURACY) is None
    assert says.value(KEYWORD) is True and says.generated == "No fine, but a course."
    for wrong in ("A fine.", "A course and a fine.", "No course."):
        assert score_answer(question, Answered((), wrong)).value(KEYWORD) is False


@pytest.mark.parametrize(
    ("generated", "answer", "expected"),
    [
        ("the fee is 30 dollars", "the fee is 30 dollars", 1.0),
        ("the fee is 80 dollars", "the fee is 30 dollars", 4 / 5),
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, section 3.2
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("fee 30", "the fee is 30 dollars", 2 * 1 * 0.4 / 1.4),
        ("The FEE, is: 30 dollars!", "the fee is 30 dollars", 1.0),
        ("nothing", "the fee is 30 dollars", 0.0),
        ("", "the fee", 0.0),
        ("...", "...", 0.0),
        ("不可以", "可以", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("罚款80元", "罚款30元", 3 / 4),
        ("罚款８０元。", "罚款80元", 1.0),
        ("元80款罚", "罚款80元", 1 / 4),
        ("可以park", "可以 park", 1.0),
        ("कि", "का", 0.0),
    ],
)
def test_rouge_l(generated, answer, expected):
    assert compute_rouge_l(generated, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "the fee is 30 dollars",
        "the fee, in all, is: 30.50 dollars! (or less)",
        "don't pay; well-known no_tax zones",
        "",
    ],
)
def test_words_are_those_of_rouge_score_in_lower_case_english(text):
    assert split_words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_words_of_other_scripts_are_not_dropped():
    assert split_words("在Riverton罚款80元。") == ["在", "riverton", "罚", "款", "80", "元"]
    assert split_words("カタカナ") == list("カタカナ")
    assert split_words("Müllgebühr für ÉTÉ") == ["müllgebühr", "für", "été"]
    assert split_words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]


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


def test_interaction():
    own = {"a fine": -2.0, "a course": -5.0, "nothing": -1.0}
    other = {"a fine": -4.0, "a course": -3.0, "nothing": -1.0}
    assert compute_interaction(own, other, "a fine", "a course") == 3.0 - -1.0
    assert compute_interaction(other, own, "a course", "a fine") == 4.0  # seen from the other side
    assert compute_interaction(own, own, "a fine", "a course") == 0.0
    assert compute_interaction(other, own, "a fine", "a course") == -4.0


def test_priors_cancel_in_the_interaction():
    own, other = {"a fine": -2.0, "a course": -5.0}, {"a fine": -4.0, "a course": -3.0}
    expected = compute_interaction(own, other, "a fine", "a course")
    prior = {"a fine": -8.0, "a course": 3.5}  # the same answer is favoured at both clients

    def shifted(values, by_question=0.0):
        return {text: value + prior[text] + by_question for text, value in values.items()}

    one, two = shifted(own), shifted(other)
    assert compute_interaction(one, two, "a fine", "a course") == pytest.approx(expected)
    one, two = shifted(own, 7.0), shifted(other, -2.0)  # and a client finds all of them likelier
    assert compute_interaction(one, two, "a fine", "a course") == pytest.approx(expected)
    assert compute_interaction(shifted(own), other, "a fine", "a course") != expected


def test_the_summary_holds_means_over_what_was_scored():
    first, second, alone = (
        score(-1.0, -3.0, candidates=("Yes.", "No.")),
        score(-5.0, -4.5, candidates=("Yes, of course.", "No.")),
        score(-1.0, candidates=("Here.",)),
    )
    keyword_only = score_answer(Question("q", (), own_keywords=("k",)), Answered((), "k"))
    right = replace(first, values={**first.values, "exact_match": True})
    summary = summarise([first, second, alone, keyword_only, right])
    assert (summary["n"], summary["n_ranked"]) == (5, 3)
    assert summary["exact_match"] == 1 / 4
    assert summary["rank_accuracy"] == pytest.approx(2 / 3)
    assert summary["rank_accuracy_per_byte"] == 1.0
    margins = [-1 / 4 + 3 / 3, -5 / 15 + 4.5 / 3, -1 / 4 + 3 / 3]
    assert summary["margin_per_byte"] == pytest.approx(sum(margins) / 3)


def test_the_summary_leaves_out_what_nothing_was_scored_for():
    assert summarise([]) == {}
    keyword_only = score_answer(Question("q", (), own_keywords=("k",)), Answered((), "k"))
    assert summarise([keyword_only]) == {"n": 1}
    assert summarise([score(-1.0, candidates=("Here.",))]) == {"n": 1, "exact_match": 0.0}


@pytest.mark.parametrize("active", [(), ("global", "local")])
def test_what_a_model_says_is_scored_question_by_question(adapted, tokenizer, active):
    questions = question_sets()[0]
    settings = EvaluationConfig(batch_size=3, max_new_tokens=6)

    def evaluate(asked):
        return evaluate_questions(
            adapted, tokenizer, asked, active=active, system_prompt="You help.", settings=settings
        )

    scores = evaluate(questions)
    assert all(score.generated and not score.value(EXACT_MATCH) for score in scores)
    echoes = [
        replace(question, candidates=(score.generated, *question.candidates))
        for question, score in zip(questions, scores, strict=True)
    ]
    for echo, before in zip(evaluate(echoes), scores, strict=True):
        assert echo.value(EXACT_MATCH) and echo.value(ROUGE_L) == 1.0
        assert echo.log_likelihoods[1:] == pytest.approx(before.log_likelihoods, abs=1e-3)
