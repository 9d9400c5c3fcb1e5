"""Scores on disk: found again by whom they are of, and by nobody else."""

from __future__ import annotations

import pytest

from fedlora_app.evaluation.score_store import ScoreStore
from fedlora_app.evaluation.scoring import Answered, Prompt

PROMPT = Prompt("You help.", "When?", ("At nine.", "At ten."))
ANSWER = Answered((-1.0, -2.0), "Um neun, im B\u00fcro.\u2028Bis zehn.", openness=0.25)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "scores"
    ScoreStore(path, "one").add("base ", [PROMPT], [ANSWER])
    return path


def test_a_score_is_found_again_where_it_is_of_the_same(path):
    assert ScoreStore(path, "one").get("base ", PROMPT) == ANSWER
    assert ScoreStore(path, "two").get("base ", PROMPT) is None
    assert ScoreStore(path, "one").get("global abc", PROMPT) is None
    other = Prompt("You are short.", "When?", PROMPT.candidates)
    assert ScoreStore(path, "one").get("base ", other) is None


@pytest.mark.parametrize("kept", [0, 1, 10, -3])
def test_what_was_written_before_and_after_a_cut_is_found(path, kept):
    later = Prompt("You help.", "Where?", PROMPT.candidates)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept] + "\u00fc".encode()[:1])
    ScoreStore(path, "one").add("base ", [later], [ANSWER])
    store = ScoreStore(path, "one")
    assert store.get("base ", PROMPT) == ANSWER == store.get("base ", later)


@pytest.mark.parametrize(
    "line", ["5", "null", "[]", "{", '["one", "base ", "x", null, "", null]', "\u2028"]
)
def test_a_damaged_line_is_no_score(path, line):
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    assert ScoreStore(path, "one").get("base ", PROMPT) == ANSWER


def test_a_score_of_other_candidates_is_none(tmp_path):
    store = ScoreStore(tmp_path / "scores", "one")
    store.add("base ", [PROMPT], [Answered((-1.0,), "At nine.")])
    assert store.get("base ", PROMPT) is None
