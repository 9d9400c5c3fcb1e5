from __future__ import annotations

import copy

import pytest

from fedlora_app.evaluation.comparison import compare_evaluations
from fedlora_app.evaluation.shares import read_shares, read_summary, read_unknown
from fedlora_app.evaluation.statistics import Estimate, proportion, share_of_facts
from fedlora_app.report.numbers import measure_run

CLIENTS = ("ann", "bob")
OWN = "global+local:own"
FACTS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
RIGHT = {"ann": [1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1], "bob": [1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1]}
PASSED = [one and other for one, other in zip(*RIGHT.values(), strict=True)]


def build_evaluation(*, is_old: bool) -> dict:
    """Twelve conflict questions about four facts at two clients, as of this or an old version."""
    both = [right for client in CLIENTS for right in RIGHT[client]]
    each = proportion(both, FACTS * 2, [*range(12)] * 2)
    passes = proportion(PASSED, FACTS)
    if is_old:  # every answer for itself, and no word of facts
        each, passes = proportion(both), proportion(PASSED)
    summary = {
        "conflict_accuracy": each,
        "conflict_exact_match": each,
        "conflict_pass_rate": passes,
        "conflict_pass_rate_exact_match": passes,
    }
    rows = [{"record": i, "fact": f"fact {f}", "instruction": f"{i}?"} for i, f in enumerate(FACTS)]
    swap_table = [
        {"question_set": "conflict", "client": client, "adapters": adapters, "scale": 1.0}
        | {"accuracy": share, "n": 12, "exact_match": share, "n_generated": 12}
        for client in CLIENTS
        for adapters, share in (
            ("global", 0.5),
            (f"global+local:{client}", sum(RIGHT[client]) / 12),
        )
    ]
    answer = {"question_set": "conflict", "is_unseen": False, "scale": 1.0}
    content = {
        "format": 1,
        "mode": "dual",
        "seed": 7,
        "round": 1,
        "settings": "s",
        "answering": "global+local",
        "base_model": {"name": "model", "fingerprint": "f" * 64},
        "files": {client: {"conflict": "c"} for client in CLIENTS},
        "system_prompts": dict.fromkeys(CLIENTS, "You are it."),
        "num_steps": 8,
        "num_parameters": {"global": 100, "local": 50},
        "summary": {key: estimate.dump() for key, estimate in summary.items()},
        "scales": {},
        "swap_table": swap_table,
        "conflicts": [
            row | {"passed": bool(p), "passed_exact_match": bool(p)}
            for row, p in zip(rows, PASSED, strict=True)
        ],
        "questions": [
            answer | row | {"client": client, "correct": bool(right), "exact_match": bool(right)}
            for client in CLIENTS
            for row, right in zip(rows, RIGHT[client], strict=True)
        ],
    }
    if is_old:
        for entry in content["summary"].values():
            del entry["facts"]
    else:
        half = proportion([1, 0] * 12, FACTS * 2, [*range(12)] * 2)
        content["shares"] = [
            {"answered_by": who, "question_set": "conflict"}
            | {"accuracy": estimate.dump(), "exact_match": estimate.dump()}
            for who, estimate in (("global", half), (OWN, each))
        ]
    return content


@pytest.mark.parametrize("is_old", [False, True])
def test_one_figure_has_one_interval_wherever_it_stands(is_old):
    expected = proportion(RIGHT["ann"] + RIGHT["bob"], FACTS * 2, [*range(12)] * 2)
    passed = proportion(PASSED, FACTS)
    assert (expected.n, expected.facts, passed.n, passed.facts) == (12, 4, 12, 4)
    evaluation = build_evaluation(is_old=is_old)
    summary = read_summary(evaluation)
    assert Estimate(**summary["conflict_exact_match"]) == expected
    assert Estimate(**summary["conflict_pass_rate"]) == passed
    in_report = measure_run([], evaluation)[OWN]
    assert in_report.share("conflict") == in_report.share("conflict", "accuracy") == expected
    assert in_report.passed() == passed
    compared = compare_evaluations({"a": evaluation, "b": copy.deepcopy(evaluation)})
    assert compared["runs"][0]["figures"]["conflict_accuracy"] == expected.dump()


def test_an_old_interval_is_wider_now():
    old = build_evaluation(is_old=True)
    was, now = old["summary"]["conflict_exact_match"], read_summary(old)["conflict_exact_match"]
    assert (was["n"], was["value"]) == (24, now["value"])
    assert now["high"] - now["low"] > 1.5 * (was["high"] - was["low"])
    assert "facts" not in was


def test_where_an_old_file_holds_no_single_answers_those_about_a_fact_agree():
    shares = read_shares(build_evaluation(is_old=True))["global"]
    assert shares["exact_match"]["conflict"] == share_of_facts(0.5, 12, 4)


def test_a_figure_that_the_rows_do_not_give_stays_as_it_was():
    old = build_evaluation(is_old=True)
    del old["questions"][3]
    assert read_summary(old)["conflict_accuracy"]["n"] == 24
    assert read_summary(old)["conflict_pass_rate"]["facts"] == 4


def test_facts_that_the_base_model_does_not_know_are_told_by_client():
    """It knows Ann's second fact in one of three wordings, and no other, nor Bob's second."""
    evaluation = build_evaluation(is_old=False)
    for row in evaluation["questions"]:
        row["base_exact_match"] = False
        row["base_correct"] = row["client"] == "ann" and row["record"] == 4
    shares, extents = read_unknown(evaluation)
    right, facts = RIGHT["ann"][:3] + RIGHT["ann"][6:] + RIGHT["bob"], FACTS[:3] + FACTS[6:] + FACTS
    records = [*range(3), *range(6, 12), *range(12)]
    assert shares["exact_match"] == {"conflict": proportion(right, facts, records)}
    assert extents["accuracy"]["conflict"].value == 21 / 24
    for row in evaluation["questions"]:
        row["base_correct"] = True
    shares, extents = read_unknown(evaluation)
    assert shares == {} and extents["accuracy"]["conflict"].value == 0


def test_an_old_evaluation_does_not_say_what_the_base_model_knows():
    assert read_unknown(build_evaluation(is_old=False)) == ({}, {})
