from __future__ import annotations

import pytest

from fedlora_app.evaluation.reported import (
    collect_reports,
    describe_headline,
    describe_round,
    describe_run,
    judge_conflicts,
    sort_labels,
)
from fedlora_app.report.numbers import measure_run

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


def evaluated(server_round: int, client: str, metrics: dict) -> dict:
    return {"phase": "evaluate", "round": server_round, "client": client, "metrics": metrics}


def test_figures_of_two_rounds_are_not_put_together():
    """Neither clients' nor adapters', and where clients differ in their rounds they are named."""

    def of(label: str, each: list[int]) -> dict:
        ending = {"exact_match": sum(each) / len(each), "exact_match_each": each, "n": len(each)}
        return {f"{label}/conflict/{name}": value for name, value in ending.items()}

    clients = ("ann", "bob", "cy")
    history = [evaluated(0, client, of("base", [0, 0])) for client in clients]
    history += [evaluated(2, c, of("global+local", [1, 1]) | of("global", [1, 0])) for c in clients]
    history += [evaluated(3, client, of("global+local", [0, 1])) for client in clients[:2]]
    reports = collect_reports(history)
    assert sort_labels(reports) == ["base", "global+local"]  # global alone is of round 2
    assert list(reports) == ["ann", "bob"]
    text = " ".join(describe_run(history).replace("│", " ").split())
    assert "cy, round 2 100.0 %" in text and "ann 50.0 % " in text and "ann, round" not in text
    assert "local: 1 of 2 conflict questions answered in its own way by every client" in text
    assert "cy reports last of round 2, and is left out of what is said of all clients" in text
    expected = "conflict 0.50, every client right 1/2 (without cy)"
    assert describe_headline(history) == expected
    assert measure_run(history, None)["global+local:own"].passed().n == 2


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
    history = [evaluated(1, client, metrics) for client, metrics in clients.items()]
    text = " ".join(describe_run(history).replace("│", " ").split())
    assert closing in text and f"ann {cell}" in text
