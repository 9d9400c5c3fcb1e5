"""That nothing was learned is said only where neither answers nor rankings show anything."""

from __future__ import annotations

import math

import pytest
from conftest import build_tiny_config

from fedlora_app.evaluation.learning import describe_end, find_loss, find_nothing_learned

FALLING, FLAT = [3.0, 2.5, 2.1, 1.8], [2.0, 2.03, 1.98, 2.01]
PHASES = ("global", "local")


def write_history(
    exact=0, ranked=6, losses=FALLING, *, base_exact=0, base_ranked=6, n=24, lists=True
):
    """Return what two clients report: right answers of ``n`` local questions, and losses by round.

    Args:
        exact, ranked: how many answers match, and are ranked first, under the clients' adapters.
        losses: of each round, a little higher at the second client.
    """
    history = []
    for number, client in enumerate(("ann", "bob")):
        for label, right, first in (
            ("base", base_exact, base_ranked),
            ("global+local", exact, ranked),
        ):
            each = {"exact_match": right, "ranked_first": first}
            metrics = {
                "n": n,
                "n_ranked": n,
                "n_facts": n,
                "n_open": 0,
                "rank_chance": 0.25,
                "exact_match": right / n,
                "rank_accuracy": first / n,
            }
            if lists:
                metrics |= {f"{k}_each": [int(i < v) for i in range(n)] for k, v in each.items()}
                metrics |= {"fact_each": list(range(-n, 0))} if label == "base" else {}
            named = {f"{label}/local/{name}": value for name, value in metrics.items()}
            history.append(entry(0 if label == "base" else len(losses), client, "evaluate", named))
        for round_, loss in enumerate(losses, 1):
            for phase in PHASES:
                name, value = f"train_{phase}", loss * (1 + 0.05 * number)
                metrics = {f"{name}/train_loss": value, f"{name}/final_train_loss": 0.9 * value}
                history.append(entry(round_, client, phase, metrics))
    return history


def entry(round_, client, phase, metrics):
    return {"round": round_, "client": client, "phase": phase, "metrics": metrics}


@pytest.mark.parametrize(
    ("losses", "headline", "advice"),
    [
        (FALLING, "Nothing was learned yet, and the training loss is still falling.", "More round"),
        (FLAT, "Nothing was learned, and the training loss is flat.", "will not help"),
        ([2.0, 2.5, 3.1], "Nothing was learned, and the training loss is rising.", "Try a lower"),
        ([2.0, math.nan], "Nothing was learned: the training loss is not a number.", "Try a lower"),
        ([2.0], "Nothing was learned yet, and the training loss is still falling.", "More rounds"),
        ([2.0, 1.9], "Nothing was learned yet, and the training loss is still falling.", "1.95 na"),
        ([], "Nothing was learned that the questions show.", ""),
        # What is trained on is known by heart, and none of it is asked.
        (
            [3.0, 0.3, 0.05, 0.05, 0.051, 0.05],
            "Nothing was learned, and the training loss is flat.",
            "ask for something else: fedlora check",
        ),
    ],
)
def test_where_all_is_near_zero_the_loss_says_what_to_do(losses, headline, advice):
    found = find_nothing_learned(write_history(losses=losses))
    assert found.headline == headline and advice in found.sentence
    assert "local 0 % (base 0 %)" in found.sentence


@pytest.mark.parametrize(
    "history",
    [
        write_history(exact=1),  # nobody says a right answer word for word by chance
        write_history(exact=3, n=3, ranked=1, base_ranked=1),  # however few are asked
        write_history(ranked=16),
        write_history(ranked=16, lists=False),
        write_history()[1:2],  # the base model was not asked
        [],
    ],
)
def test_what_was_learned_or_not_measured_is_not_denied(history):
    assert find_nothing_learned(history) is None


@pytest.mark.parametrize("ranked", [6, 16])
def test_who_did_not_report_in_the_last_round_takes_nothing_from_the_others(ranked):
    missing = ("bob", len(FALLING), "evaluate")
    history = [
        entry
        for entry in write_history(ranked=ranked)
        if (entry["client"], entry["round"], entry["phase"]) != missing
    ]
    assert (find_nothing_learned(history) is None) == (ranked == 16)


@pytest.mark.parametrize("lists", [True, False])
def test_a_ranking_that_chance_explains_is_nothing_learned(lists):
    assert find_nothing_learned(write_history(ranked=8, lists=lists)) is not None
    assert find_nothing_learned(write_history(ranked=2, lists=lists)) is not None


def test_one_round_in_which_the_loss_stays_tells_no_trend():
    history = write_history(losses=[2.0])
    for one in history:
        finals = {k: v / 0.9 for k, v in one["metrics"].items() if k.endswith("final_train_loss")}
        one["metrics"] |= finals
    found = find_nothing_learned(history)
    assert found.headline == "Nothing was learned that the questions show."
    assert "2.05 nats per answer token after one round, which tells no trend" in found.sentence


def test_the_loss_is_that_of_the_rounds_that_a_history_has():
    loss = find_loss(write_history(losses=FALLING))
    assert (loss.first, loss.last) == pytest.approx((3.0 * 1.025, 1.8 * 1.025))
    assert loss.has_fallen and find_loss([]) is None
    steep_then_flat = find_loss(write_history(losses=[5.0, 1.0, 0.99, 1.01, 1.0, 1.0]))
    assert (steep_then_flat.trend, steep_then_flat.has_fallen) == ("flat", True)


def test_a_run_that_learned_nothing_ends_with_that_and_no_other_advice():
    config = build_tiny_config()
    assert "Nothing was learned yet" in describe_end(write_history(), config)
    assert "mode='fedavg'" not in describe_end(write_history(), config)
    assert "mode='fedavg'" in describe_end(write_history(exact=20), config)


def test_a_base_model_that_was_asked_a_sample_is_said_to_be():
    sampled = build_tiny_config(evaluation={"sample": 2})
    said = "The base model's figures are of at most 2 questions of each set"
    assert said in describe_end(write_history(), sampled)
    assert said not in describe_end(write_history()[1:2], sampled)
    assert said not in describe_end(write_history(), build_tiny_config())


def test_one_right_answer_more_than_the_base_has_is_not_yet_something_learned():
    """The share of clients' own questions has no interval, but facts can be told apart."""
    assert find_nothing_learned(write_history(exact=3, base_exact=2)) is not None
    assert find_nothing_learned(write_history(exact=8, base_exact=2)) is None
