from __future__ import annotations

import pytest

from fedlora_app.evaluation.reported import describe_round

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
