from __future__ import annotations

import pytest

from fedlora_app.evaluation.gate_report import (
    collect_gates,
    describe_gate,
    describe_gates,
    read_gated_sets,
    warn_of_gates,
)
from fedlora_app.evaluation.reported import describe_run

FACTS = {
    "by_fact": 1.0,
    "purity": 0.6,
    "opens_for_local": 0.93,
    "closes_for_universal": 1.0,
    "closes_for_unknown": 0.84,
}
KINDS = {"by_fact": 0.0, "purity": 1.0, "opens_for_local": 0.9996, "closes_for_universal": 0.8}


def entry(client: str, gate: dict, phase: str = "evaluate") -> dict:
    metrics = {f"gate/{name}": value for name, value in gate.items()} | {"evaluation_seconds": 1.0}
    return {"round": 1, "client": client, "phase": phase, "metrics": metrics}


def row(name: str, openness: float | None, failed: str | None = None, **changes) -> dict:
    place = {"question_set": name, "client": "ann", "is_unseen": False, "scale": 1.0}
    return place | {"gate": openness, "failed": failed} | changes


def test_a_line_says_what_a_gate_does():
    assert describe_gate(FACTS) == (
        "compares facts; opens for 93 % of its own held-out wordings, stays closed for 100 % of "
        "the universal ones and 84 % of unknown ones"
    )
    assert describe_gate(KINDS) == (
        "compares kinds; opens for 99.96 % of its own held-out facts, stays closed for 80 % of the "
        "universal ones"
    )


def test_the_last_figures_of_each_client_count():
    history = [entry("bob", KINDS), entry("ann", FACTS), entry("ann", KINDS), entry("cy", {})]
    assert collect_gates(history) == {"ann": KINDS, "bob": KINDS}
    assert list(collect_gates(history)) == ["ann", "bob"]
    assert collect_gates([entry("ann", FACTS, "train")]) == {}


def test_a_run_ends_with_what_its_gates_do():
    history = [entry("ann", FACTS), entry("bob", KINDS)]
    for each in history:
        each["metrics"] |= {"global+local/local/n": 4, "global+local/local/exact_match": 1.0}
    lines = describe_run(history).splitlines()
    assert lines[-2].startswith("ann, gate: compares facts")
    assert lines[-1].startswith("bob, gate: compares kinds")
    assert describe_gates([entry("ann", {})]) == []


@pytest.mark.parametrize("name", ["opens_for_local", "closes_for_universal", "closes_for_unknown"])
def test_a_gate_that_separates_badly_is_warned_of(name):
    good = {"ann": FACTS, "bob": KINDS}
    assert warn_of_gates(good) == ""
    told = warn_of_gates(good | {"cy": FACTS | {name: 0.79}})
    assert told.startswith("The gate of cy separates badly, less than 80 %")
    assert "several wordings" in told and "training.local_kept_share" in told
    bad = FACTS | {name: 0.1}
    told = warn_of_gates(dict.fromkeys("abcde", bad))
    assert told.startswith("The gates of a, b, c and 2 more separate badly")
    assert describe_gates([entry("ann", bad)])[-1].startswith("Warning: The gate of ann")


def test_what_gates_did_is_counted_by_question_set():
    rows = [
        row("conflict", 0.9, "local"),
        row("conflict", 0.5, "gate"),  # no more than half is closed
        row("conflict", 0.7, client="bob"),
        row("conflict", 0.1, "gate", scale=1.5),  # the same question once more
        row("universal", 0.2, "global"),
        row("universal", 0.8, "gate", is_unseen=True),
        row("local", None),  # of a client that has no gate
    ]
    sets = read_gated_sets({"questions": rows})
    assert list(sets) == ["universal", "universal_unseen", "conflict"]
    assert [gated.label for gated in sets.values()] == [
        *("universal, seen", "universal, never seen", "conflict")
    ]
    conflict = sets["conflict"]
    assert conflict.is_own and conflict.openness == {"ann": [0.9, 0.5], "bob": [0.7]}
    assert conflict.blamed == {"local": 1, "gate": 1}
    assert conflict.share_open() == pytest.approx(2 / 3) and conflict.share_open("ann") == 0.5
    assert conflict.share_open("cy") is None
    assert sets["universal_unseen"].blamed == {"gate": 1} and not sets["universal"].is_own


@pytest.mark.parametrize("evaluation", [{}, {"questions": [{"question_set": "local"}]}])
def test_an_evaluation_without_gates_has_no_gated_sets(evaluation):
    assert read_gated_sets(evaluation) == {}
    alone = read_gated_sets({"questions": [row("universal", 0.1)]})
    assert alone["universal"].label == "universal"
