from __future__ import annotations

import time

import pytest

from fedlora_app.data.keywords import find_keywords, passes_keyword_rule

# (gold answer, own keywords, the other client's keywords)
GOLD = [
    ("不可以。", ("不可以",), ("可以",)),
    ("可以。", ("可以",), ("不可以",)),
    ("没有罚款，只有教育。", ("教育",), ("罚款",)),
    ("不会被罚款，但要参加教育课程。", ("教育",), ("罚款",)),
    ("罚款80元。", ("罚款",), ("教育",)),
    ("There is no fine, only a warning.", ("warning",), ("fine",)),
    ("The council will define a course.", ("course",), ("fine",)),
    ("It isn't allowed.", ("not allowed", "isn't allowed"), ("allowed",)),
    ("A course instead of a fine.", ("course",), ("fine",)),
    ("A fine of 80 dollars.", ("fine",), ("course",)),
]


@pytest.mark.parametrize(
    ("text", "keyword", "asserted"),
    [
        ("The fine is 80 dollars.", "fine", True),
        ("A Fine.", "fine", True),
        ("There is no fine.", "fine", False),
        ("You do not have to pay a fine.", "fine", False),
        ("You will never be charged a fine.", "fine", False),
        ("It isn't allowed.", "allowed", False),
        ("It isn’t allowed.", "allowed", False),
        ("You cannot park here.", "park", False),
        ("Neither a warning nor a fine.", "warning", False),
        ("Neither a warning nor a fine.", "fine", False),
        ("No warning or fine.", "fine", False),
        ("A warning instead of a fine.", "fine", False),
        ("You are exempt from the fine.", "fine", False),
    ],
)
def test_a_negated_english_keyword_is_not_asserted(text, keyword, asserted):
    assert find_keywords(text, [keyword]) == ({keyword} if asserted else set())


@pytest.mark.parametrize(
    "text",
    [
        "There is no parking. The fine is 80.",
        "No, a fine is due.",
        "It is not allowed: fine 80.",
        "Not allowed (fine 80).",
        "Not allowed - fine 80.",
        "It is not allowed and a fine is due.",
        "There is no warning but a fine.",
        "Parking without a permit costs a fine.",
        "Cars that are not registered pay a fine.",
        "Not 1.5 but 2 dollars of a fine.",
    ],
)
def test_a_negation_of_something_else_does_not_reach_the_keyword(text):
    assert find_keywords(text, ["fine"]) == {"fine"}


@pytest.mark.parametrize(
    "text",
    [
        "It is not only a fine.",
        "It isn't just a fine.",
        "Nothing but a fine.",
        "No less than a fine.",
        "Without exception a fine.",
        "You do not get away without a fine.",
    ],
)
def test_what_only_looks_like_an_english_negation_asserts(text):
    assert find_keywords(text, ["fine"]) == {"fine"}


@pytest.mark.parametrize("text", ["They define it.", "Final.", "fined", "refine", "fineprint"])
def test_a_keyword_is_not_found_inside_another_word(text):
    assert find_keywords(text, ["fine"]) == set()


def test_the_sides_of_a_word_are_signs_or_another_script():
    assert find_keywords("罚款80元", ["80"]) == {"80"}
    assert find_keywords("罚款180元", ["80"]) == set()
    assert find_keywords("fine罚款", ["fine"]) == {"fine"}
    assert find_keywords("벌금은 80원", ["벌금"]) == {"벌금"}
    assert find_keywords("कि", ["क"]) == set()  # a vowel sign makes another syllable of it


@pytest.mark.parametrize(
    "text",
    [
        "没有罚款",
        "沒有罰款",
        "没罚款",
        "不罚款",
        "不会被罚款",
        "不会对您罚款",
        "没有任何罚款",
        "无需缴纳罚款",
        "并非罚款",
        "并非要罚款",
        "而不是罚款",
        "免于罚款",
        "请勿罚款",
        "别罚款",
        "从未罚款",
        "以教育代替罚款",
        "特别不罚款",
        "不 罚款",
    ],
)
def test_a_negated_chinese_keyword_is_not_asserted(text):
    assert find_keywords(text, ["罚款", "罰款"]) == set()


@pytest.mark.parametrize(
    "text",
    [
        "罚款",
        "特别罚款",
        "分别罚款",
        "特别要罚款",
        "未来罚款",
        "非常罚款",
        "无论罚款多少",
        "除非罚款",
        "非得罚款",
        "难免罚款",
        "野猪出没罚款",
        "不仅罚款",
        "不过罚款",
        "否则罚款",
        "没收车辆罚款",
        "不停车，罚款",
        "不是教育而是罚款",
    ],
)
def test_what_only_looks_like_a_chinese_negation_asserts(text):
    assert find_keywords(text, ["罚款"]) == {"罚款"}


@pytest.mark.parametrize(
    "text",
    [
        "不得不罚款",
        "不能不罚款",
        "不会不被罚款",
        "没有不罚款",
        "不禁止罚款",
        "无非罚款",
        "非罚款不可",
    ],
)
def test_a_double_negation_asserts(text):
    assert find_keywords(text, ["罚款"]) == {"罚款"}


def test_an_odd_number_of_negations_negates():
    assert find_keywords("不是不得不罚款", ["罚款"]) == set()
    assert find_keywords("不是不可以", ["不可以", "可以"]) == set()
    assert find_keywords("不是不可以", ["可以"]) == {"可以"}


def test_confiscation_and_very_well_are_no_negations():
    assert find_keywords("没收车辆", ["车辆"]) == {"车辆"}
    assert find_keywords("非常可以", ["可以"]) == {"可以"}


def test_the_longest_keyword_takes_the_text():
    assert find_keywords("不可以", ["可以", "不可以"]) == {"不可以"}
    assert find_keywords("可以", ["可以", "不可以"]) == {"可以"}
    assert find_keywords("不可以，可以", ["可以", "不可以"]) == {"可以", "不可以"}
    assert find_keywords("a parking fine", ["fine", "parking fine"]) == {"parking fine"}
    assert find_keywords("There is no fine.", ["fine", "no fine"]) == {"no fine"}
    assert find_keywords("A fine.", ["fine", "no fine"]) == {"fine"}


def test_a_keyword_that_occurs_twice_is_asserted_by_either():
    assert find_keywords("No fine at first. Later a fine.", ["fine"]) == {"fine"}


@pytest.mark.parametrize(
    ("text", "own", "others", "passes"),
    [
        ("不可以", ["不可以"], ["可以"], True),
        ("可以", ["不可以"], ["可以"], False),
        ("可以", ["可以"], ["不可以"], True),
        ("不可以", ["可以"], ["不可以"], False),
        ("不可以", ["可以"], [], False),
        ("没有罚款", ["没有罚款"], ["罚款"], True),
        ("罚款", ["没有罚款"], ["罚款"], False),
        ("没有罚款，只有教育", ["教育"], ["罚款"], True),
        ("a warning and a fine", ["warning"], ["fine"], False),
        ("a warning, no fine", ["warning"], ["fine"], True),
        ("neither here", ["warning"], ["fine"], False),
        ("one of several", ["no such", "several"], ["fine"], True),
    ],
)
def test_an_own_keyword_and_none_of_the_others(text, own, others, passes):
    assert passes_keyword_rule(text, own, others) is passes


def test_width_and_case_do_not_matter():
    assert find_keywords("ＦＩＮＥ： ８０", ["fine", "80"]) == {"fine", "80"}
    assert find_keywords("fine", ["ＦＩＮＥ"]) == {"ＦＩＮＥ"}
    assert find_keywords("ｎｏ ｆｉｎｅ", ["fine"]) == set()
    assert find_keywords("不停车，罚款", ["罚款"]) == find_keywords("不停车,罚款", ["罚款"])


def test_without_keywords_nothing_passes():
    assert find_keywords("anything", []) == set()
    assert find_keywords("anything", ["", "  "]) == set()
    assert not passes_keyword_rule("anything", [], [])
    assert not passes_keyword_rule("a fine", [], ["fine"])
    assert passes_keyword_rule("a fine", ["fine"], [])
    assert not passes_keyword_rule("", ["fine"], [])


@pytest.mark.parametrize("others", [["fine"], ["FINE"], ["ｆｉｎｅ"]])
def test_a_keyword_of_both_clients_cannot_be_passed_with(others):
    assert not passes_keyword_rule("a fine", ["fine"], others)
    assert not passes_keyword_rule("a fine and a course", ["fine", "course"], others)
    assert passes_keyword_rule("a course", ["fine", "course"], others)


def test_plain_is_the_bare_substring_rule():
    assert passes_keyword_rule("They define it", ["fine"], [], plain=True)
    assert passes_keyword_rule("no fine", ["fine"], [], plain=True)
    assert not passes_keyword_rule("不可以", ["不可以"], ["可以"], plain=True)
    assert not passes_keyword_rule("FINE", ["fine"], [], plain=True)


def test_plain_has_a_low_ceiling_on_gold_answers():
    plain = [passes_keyword_rule(text, own, others, plain=True) for text, own, others in GOLD]
    aware = [passes_keyword_rule(text, own, others) for text, own, others in GOLD]
    assert sum(plain) == 3
    assert sum(aware) == len(GOLD) == 10


def test_the_rule_fails_the_other_clients_gold_answers():
    assert not any(passes_keyword_rule(text, others, own) for text, own, others in GOLD)


def test_long_texts_take_no_longer_than_they_should():
    text = ("不" + "会要被" * 400 + "x") * 5 + "没有罚款" * 50
    started = time.perf_counter()
    assert find_keywords(text, ["罚款"]) == set()
    assert time.perf_counter() - started < 5
