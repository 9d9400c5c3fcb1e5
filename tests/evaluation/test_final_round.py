"""Which round validation chooses, from what clients report."""

from __future__ import annotations

import pytest

from fedlora_app.evaluation.final_round import choose_round, score_client


def report(server_round, client, **figures):
    metrics = {f"validation/{name}": value for name, value in figures.items()}
    return {"round": server_round, "client": client, "phase": "evaluate", "metrics": metrics}


def test_a_client_s_score_is_the_mean_over_its_sets_of_what_was_measured_of_each():
    figures = {"local_rank_accuracy": 1.0, "local_exact_match": 0.5, "conflict_exact_match": 0.25}
    metrics = {f"validation/{k}": v for k, v in figures.items()} | {"validation/local_n": 8}
    assert score_client(metrics) == pytest.approx((0.75 + 0.25) / 2)
    assert score_client({"global/local/exact_match": 1.0}) is None


def test_the_highest_mean_over_clients_is_chosen_and_the_earliest_of_several():
    scores = {1: (0.5, 0.5), 2: (1.0, 0.6), 3: (0.6, 1.0), 4: (0.9, 0.5)}
    history = [
        report(number, client, local_exact_match=score)
        for number, pair in scores.items()
        for client, score in zip("ab", pair, strict=True)
    ]
    base = report(0, "a", local_exact_match=1.0)  # is no round's adapters
    found = choose_round([base, *history], 4)
    assert found.server_round == 2
    assert found.scores == pytest.approx({1: 0.5, 2: 0.8, 3: 0.8, 4: 0.7})
    assert choose_round(history[:2], 1).describe(1).endswith("validation questions: 0.500.")


def test_only_clients_that_tell_of_every_round_have_a_say():
    history = [report(n, "a", local_exact_match=v) for n, v in ((1, 0.2), (2, 0.9), (3, 0.4))]
    history += [report(n, "b", local_exact_match=1.0) for n in (1, 3)]  # failed in round 2
    history += [report(n, "c", local_exact_match=1.0) for n in (1, 2)]
    found = choose_round(history, 3)
    assert found.server_round == 2 and found.scores == {1: 0.2, 2: 0.9, 3: 0.4}


def test_where_nothing_can_be_compared_it_is_the_last_round():
    first = [report(1, "a", local_exact_match=1.0), report(1, "b")]
    history = [*first, report(2, "b", local_exact_match=0.0)]
    found = choose_round(history, 2)
    assert (found.server_round, found.scores) == (2, {})
    assert "none could be chosen" in found.dump(2)["why"]
    assert choose_round([], 2).server_round == 2


def test_rounds_before_a_client_has_come_are_none_to_choose():
    early = [report(1, "a", local_exact_match=1.0), report(2, "a", local_exact_match=0.2)]
    late = [report(n, "b", local_exact_match=0.4) for n in (2, 3)]
    history = [*early, late[0], report(3, "a", local_exact_match=0.3), late[1]]
    found = choose_round(history, 3)
    assert found.server_round == 3 and found.scores == pytest.approx({2: 0.3, 3: 0.35})
