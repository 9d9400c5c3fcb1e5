from __future__ import annotations

import pytest

from fedlora_app.evaluation.reported import describe_round, describe_run, judge_conflicts

REPORTS = {
    "ann": {"global/universal/exact_match": 0.5, "global/conflict/exact_match_each": [1, 1]},
    "bob": {"global/universal/exact_match": 1.0, "global/conflict/exact_match_each": [0, 1]},
}
LINE = "round 3/8 [global] universal 0.75, every client right 1/2"


@pytest.mark.parametrize(
    ("reports", "seconds", "left", "expected"),
    [
        (REPORTS, 15.2, None, f"{LINE} (15 s)"),
        (REPORTS, 15.2, 76.0, f"{LINE} (15 s, about 1 min 16 s left)"),
        (REPORTS, 3700.0, 0.0, f"{LINE} (1 h 01 min)"),
        ({"ann": {}}, 15.2, 8000.0, "round 3/8 not evaluated (15 s, about 2 h 13 min left)"),
    ],
)
def test_the_line_of_a_round_ends_with_its_time_and_what_is_left(reports, seconds, left, expected):
    assert describe_round(3, 8, reports, seconds, left) == expected


def test_counts_that_contradict_one_another_end_no_run():
    """They are a client's words, and the line of a round is for reading."""
    key = "global+local/universal"
    odd = {"ann": {f"{key}/n_open": 1}, "bob": {f"{key}/n": 0, f"{key}/exact_match": 0.5}}
    assert describe_round(3, 8, odd, 15.2) == "round 3/8 [global+local] no question sets (15 s)"


def report(ranked: list[int], exact: list[int], num_open: int) -> dict:
    """Return a client's metrics on conflict questions that it has an answer to."""
    prefix = "global+local/conflict"
    return {
        f"{prefix}/n": len(ranked),
        f"{prefix}/n_open": num_open,
        f"{prefix}/exact_match": sum(exact) / len(exact),
        f"{prefix}/rank_accuracy": sum(ranked) / len(ranked),
        f"{prefix}/exact_match_each": exact,
        f"{prefix}/ranked_first_each": ranked,
    }


def test_a_client_without_conflict_questions_takes_nothing_from_the_others():
    key = "global/conflict/exact_match_each"
    three = {"ann": {key: [1, 0, 1]}, "bob": {key: [1, 1, -1]}, "cy": {"global/local/n": 4}}
    assert judge_conflicts(three, "global") == {0: True, 1: False}
    assert judge_conflicts({"cy": {}}, "global") == {}
    assert judge_conflicts({"ann": {key: [1]}, "bob": {key: [1, 1]}}, "global") == {}


@pytest.mark.parametrize(
    ("num_open", "line", "closing", "cell"),
    [
        (
            21,
            "conflict 0.97 ranked first (0.00 exact), every client right 38/40 ranked first "
            "(0/40 exact)",
            "38 of 40 conflict questions of which every client ranks its own answer "
            "first (0 exact)",
            "97.5 % (0.0 %)",
        ),
        (
            20,
            "conflict 0.00, every client right 0/40",
            "0 of 40 conflict questions answered in its own way by every client",
            "0.0 %",
        ),
    ],
)
def test_the_ranking_leads_where_most_right_answers_are_open(num_open, line, closing, cell):
    clients = {
        "ann": report([1] * 39 + [0], [0] * 40, num_open),
        "bob": report([0] + [1] * 39, [0] * 40, num_open),
    }
    assert describe_round(1, 2, clients, 1.0) == f"round 1/2 [global+local] {line} (1 s)"
    history = [{"phase": "evaluate", "client": c, "metrics": m} for c, m in clients.items()]
    text = " ".join(describe_run(history).replace("│", " ").split())
    assert closing in text and f"ann {cell}" in text


def test_figures_of_an_earlier_round_are_said_to_be_so():
    """A client that has failed since then stands in the closing table with what it had."""
    own = report([1, 0], [1, 0], 0)
    rounds = [(0, "ann"), (0, "bob"), (1, "ann"), (1, "bob"), (2, "ann")]
    history = [
        {"round": number, "client": client, "phase": "evaluate", "metrics": own}
        for number, client in rounds
    ]
    sentence = "These figures are of round 2, but bob's of round 1."
    assert sentence in describe_run(history)
    assert "These figures are of" not in describe_run(history[:-1])
