from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import pytest

from fedlora_app.evaluation.comparison import (
    adjust_holm,
    compare_evaluations,
    group_by_mode,
)
from fedlora_app.evaluation.comparison_text import describe_comparison
from fedlora_app.evaluation.statistics import paired_difference

CLIENTS = ("north", "river")
TRUE, FALSE = True, False
ALL_RIGHT = {
    "universal": ([TRUE] * 8, [TRUE] * 8),
    "local": ([TRUE] * 6, [TRUE] * 6),
    "conflict": ([TRUE] * 4, [TRUE] * 4),
}


def build_evaluation(mode="dual", seed=42, **outcomes):
    """Make an evaluation from outcomes of north and river by question set.

    Questions 2i and 2i + 1 are about one fact; north never saw the first half of the universal
    facts and river never saw the second.
    """
    answering = {"dual": "global+local", "fedavg": "global", "local-only": "local"}[mode]
    sets = {**ALL_RIGHT, **outcomes}
    questions = [
        {
            "question_set": name,
            "client": client,
            "record": record,
            "fact": f"{name} fact {record // 2}",
            "is_unseen": name == "universal" and (record < 4) == (client == "north"),
            "instruction": f"{name} question {record}",
            "adapters": answering,
            "scale": 1.0,
            "correct": outcome,
            "exact_match": outcome,
        }
        for name, columns in sets.items()
        for client, column in zip(CLIENTS, columns, strict=True)
        for record, outcome in enumerate(column)
    ]
    roles = ["universal_train", "local_train", *(name for name, rows in sets.items() if rows[0])]
    return {
        "format": 1,
        "mode": mode,
        "seed": seed,
        "round": 3,
        "base_model": {"name": "tiny", "fingerprint": "f" * 64},
        "answering": answering,
        "files": {c: {role: f"{c}-{role}".ljust(64, "0") for role in roles} for c in CLIENTS},
        "system_prompts": {c: f"You are the help desk of the city of {c}." for c in CLIENTS},
        "num_steps": 120,
        "max_new_tokens": 64,
        "num_parameters": {"global": 1000, "local": 500},
        "summary": {
            "local_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 12},
            "local_exact_match": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 12},
            "conflict_pass_rate": {"value": None, "low": None, "high": None, "n": 0},
        },
        "questions": questions,
    }


def compare(one, other):
    return compare_evaluations({"one": one, "other": other})


def find(comparison, measure, run="other"):
    entries = [e for e in comparison["differences"] if (e["run"], e["measure"]) == (run, measure)]
    assert len(entries) <= 1
    return entries[0] if entries else None


LOSES_SIX_OF_SEVEN = {
    # Of twelve questions six are lost, one is won, five are right in both.
    "one": ([TRUE, TRUE, TRUE, TRUE, TRUE, TRUE], [FALSE, TRUE, TRUE, TRUE, TRUE, TRUE]),
    "other": ([FALSE, FALSE, FALSE, FALSE, TRUE, TRUE], [TRUE, FALSE, FALSE, TRUE, TRUE, TRUE]),
}


def test_a_difference_is_that_of_the_same_questions():
    comparison = compare(
        build_evaluation(local=LOSES_SIX_OF_SEVEN["one"]),
        build_evaluation(local=LOSES_SIX_OF_SEVEN["other"]),
    )
    entry = find(comparison, "local_accuracy")
    assert (entry["reference"], entry["n"]) == ("one", 12)
    assert (entry["only_run"], entry["only_reference"]) == (1, 6)
    assert entry["difference"]["value"] == pytest.approx(-5 / 12)
    # Two of the three facts differ, both the same way: two of the four choices of their signs.
    assert (entry["facts"], entry["p_value"]) == (3, 2 / 4)
    assert find(comparison, "local_exact_match")["p_value"] == entry["p_value"]


def test_the_interval_is_over_facts_which_clients_share():
    comparison = compare(
        build_evaluation(local=LOSES_SIX_OF_SEVEN["one"]),
        build_evaluation(local=LOSES_SIX_OF_SEVEN["other"]),
    )
    facts = [0, 0, 1, 1, 2, 2] * 2
    ones, others = ([x for c in LOSES_SIX_OF_SEVEN[name] for x in c] for name in ("other", "one"))
    expected = paired_difference(ones, others, facts).dump()
    assert find(comparison, "local_accuracy")["difference"] == expected
    alone = paired_difference(ones, others, range(12))
    assert expected["low"] < alone.low


def test_questions_are_paired_by_key_and_not_by_position():
    one = build_evaluation(local=LOSES_SIX_OF_SEVEN["one"])
    other = build_evaluation(local=LOSES_SIX_OF_SEVEN["other"])
    shuffled = copy.deepcopy(other)
    shuffled["questions"].reverse()
    straight, reverse = (compare(one, e)["differences"] for e in (other, shuffled))
    for a, b in zip(straight, reverse, strict=True):
        keys = ("measure", "p_value", "only_run", "only_reference", "n")
        assert [a[k] for k in keys] == [b[k] for k in keys]
        assert a["difference"]["value"] == b["difference"]["value"]


def test_the_first_run_is_the_reference_of_all_others():
    runs = {
        "a": build_evaluation(local=([FALSE] * 6, [TRUE] * 6)),
        "b": build_evaluation(seed=43),
        "c": build_evaluation(seed=44, local=([FALSE] * 6, [FALSE] * 6)),
    }
    comparison = compare_evaluations(runs)
    assert [run["name"] for run in comparison["runs"]] == ["a", "b", "c"]
    assert {(e["run"], e["reference"]) for e in comparison["differences"]} == {
        ("b", "a"),
        ("c", "a"),
    }
    values = [find(comparison, "local_accuracy", run)["difference"]["value"] for run in "bc"]
    assert values == [0.5, -0.5]
    swapped = compare_evaluations({"b": runs["b"], "a": runs["a"]})
    assert find(swapped, "local_accuracy", "a")["difference"]["value"] == -0.5


def test_unseen_facts_are_compared_apart():
    # North never saw records 0 to 3: the fifth is wrong, but not among them.
    other = build_evaluation(
        universal=([FALSE, TRUE, TRUE, TRUE, FALSE, TRUE, TRUE, TRUE], [TRUE] * 8)
    )
    comparison = compare(build_evaluation(), other)
    unseen = find(comparison, "universal_unseen_accuracy")
    assert (unseen["n"], unseen["only_reference"]) == (8, 1)
    assert unseen["difference"]["value"] == -1 / 8
    everything = find(comparison, "universal_accuracy")
    assert (everything["n"], everything["only_reference"]) == (8, 2)
    assert everything["p_value"] == 2 / 2**2


def test_a_conflict_is_passed_only_by_all_clients_together():
    conflict = ([TRUE, FALSE, TRUE, TRUE], [TRUE, TRUE, FALSE, TRUE])
    comparison = compare(build_evaluation(), build_evaluation(conflict=conflict))
    passed, answered = (find(comparison, f"conflict_{k}") for k in ("pass_rate", "accuracy"))
    assert (passed["n"], passed["only_reference"], passed["difference"]["value"]) == (4, 2, -0.5)
    assert (answered["n"], answered["difference"]["value"]) == (4, -0.25)


def test_a_question_that_two_clients_answer_is_one_question():
    # Both clients lose every universal question: eight questions about four facts.
    lost = find(
        compare(build_evaluation(), build_evaluation(universal=([FALSE] * 8, [FALSE] * 8))),
        "universal_accuracy",
    )
    assert (lost["n"], lost["facts"], lost["only_reference"]) == (8, 4, 8)
    assert lost["p_value"] == 2 / 2**4  # not 2 / 2**16, as of sixteen questions
    assert (lost["difference"]["n"], lost["difference"]["facts"]) == (8, 4)


def test_a_record_of_one_client_is_no_conflict():
    # River has an answer to the first two records only.
    one = build_evaluation(conflict=([TRUE] * 4, [TRUE] * 2))
    other = build_evaluation(conflict=([TRUE, FALSE, FALSE, FALSE], [TRUE] * 2))
    passed = find(compare(one, other), "conflict_pass_rate")
    assert (passed["n"], passed["only_reference"]) == (2, 1)


def test_what_is_not_scored_does_not_count():
    runs = [build_evaluation(), build_evaluation()]
    for evaluation in runs:
        for row in evaluation["questions"]:
            if (row["question_set"], row["client"]) == ("conflict", "river"):
                row["correct"] = None
            if row["question_set"] == "local":
                row["correct"] = None
    comparison = compare(*runs)
    assert find(comparison, "local_accuracy") is None
    assert find(comparison, "local_exact_match")["n"] == 12
    assert find(comparison, "conflict_accuracy")["n"] == 4
    assert find(comparison, "conflict_pass_rate") is None
    assert find(comparison, "conflict_pass_rate_exact_match")["n"] == 4


def test_a_question_scored_in_one_run_only_is_not_dropped_in_silence():
    other = build_evaluation()
    next(r for r in other["questions"] if r["question_set"] == "local")["correct"] = None
    comparison = compare(build_evaluation(), other)
    assert find(comparison, "local_accuracy") is None
    assert any("other local questions" in s for s in comparison["not_comparable"])


def test_rows_at_another_scale_are_left_out():
    other = build_evaluation()
    rows = [{**row, "scale": 0.5, "correct": False} for row in other["questions"]]
    other["questions"] += rows
    assert find(compare(build_evaluation(), other), "local_accuracy")["difference"]["value"] == 0


def test_a_question_that_stands_twice_raises():
    other = build_evaluation()
    other["questions"].append(other["questions"][0])
    with pytest.raises(ValueError, match="other: .* record 0 of north's universal .* twice"):
        compare(build_evaluation(), other)


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert adjust_holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert adjust_holm([0.6, 0.7]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_p_values_are_adjusted_over_all_differences():
    comparison = compare(build_evaluation(), build_evaluation(local=([FALSE] * 6, [FALSE] * 6)))
    assert len(comparison["differences"]) == 10
    p_values = [e["p_value"] for e in comparison["differences"]]
    assert [e["p_value_holm"] for e in comparison["differences"]] == adjust_holm(p_values)
    assert find(comparison, "local_accuracy")["p_value_holm"] == 1.0  # 10 * 2 / 2**3


def test_equal_conditions_leave_nothing_to_say():
    comparison = compare(build_evaluation(), build_evaluation(seed=43))
    assert comparison["not_comparable"] == comparison["notes"] == []


def test_a_single_adapter_is_comparable_but_has_fewer_parameters():
    comparison = compare(build_evaluation(), build_evaluation("fedavg"))
    assert comparison["not_comparable"] == []
    assert comparison["notes"] == ["one answers with 1,500 adapter parameters, other with 1,000."]
    assert len(comparison["differences"]) == 10
    wide = build_evaluation("fedavg")
    wide["num_parameters"] = {"global": 1500, "local": 1500}
    assert compare(build_evaluation(), wide)["notes"] == []


def test_a_run_without_conflict_questions_is_compared_on_the_rest():
    without = build_evaluation(conflict=([], []))
    comparison = compare(build_evaluation(), without)
    assert comparison["not_comparable"] == [
        "one and other were asked other conflict questions, so they are not paired: 8 and 0, "
        "0 in common."
    ]
    measures = {e["measure"] for e in comparison["differences"]}
    assert len(measures) == 6 and not any("conflict" in measure for measure in measures)
    neither = compare(without, build_evaluation(conflict=([], [])))
    assert neither["not_comparable"] == [] and len(neither["differences"]) == 6


def change(evaluation, path, value):
    *parents, last = path
    for key in parents:
        evaluation = evaluation[key]
    evaluation[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            ("files", "river", "local_train"),
            "e" * 64,
            "have other training data: local_train of river (sha256) river-local_ and "
            "eeeeeeeeeeee.",
        ),
        (
            ("base_model", "fingerprint"),
            "e" * 64,
            "have other base models: tiny (ffffffffffff) and tiny (eeeeeeeeeeee).",
        ),
        (
            ("system_prompts", "north"),
            "You are it.",
            'have other system prompts: for north "You are the help desk of the city of north." '
            'and "You are it.".',
        ),
        (
            ("num_steps",),
            1240,
            "have other numbers of optimizer steps: 120 and 1,240.",
        ),
        (
            ("max_new_tokens",),
            8,
            "generated answers of other numbers of tokens at most: 64 and 8.",
        ),
    ],
)
def test_each_other_condition_is_a_sentence(path, value, expected):
    other = build_evaluation()
    change(other, path, value)
    comparison = compare(build_evaluation(), other)
    assert comparison["not_comparable"] == [f"one and other {expected}"]
    assert len(comparison["differences"]) == 10


def test_other_test_files_are_not_paired():
    other = build_evaluation()
    change(other, ("files", "north", "universal"), "e" * 64)
    comparison = compare(build_evaluation(), other)
    assert comparison["not_comparable"] == [
        "one and other have other universal test files, so they are not paired: universal of "
        "north (sha256) north-univer and eeeeeeeeeeee."
    ]
    assert len(comparison["differences"]) == 6
    assert find(comparison, "universal_unseen_accuracy") is None


def test_other_questions_in_the_same_files_are_not_paired():
    other = build_evaluation()
    del other["questions"][-1]
    comparison = compare(build_evaluation(), other)
    assert comparison["not_comparable"] == [
        "one and other were asked other conflict questions, so they are not paired: 8 and 7, "
        "7 in common."
    ]
    assert find(comparison, "conflict_accuracy") is find(comparison, "conflict_pass_rate") is None


def test_a_limit_that_an_earlier_version_did_not_note_is_no_other_one():
    other = build_evaluation()
    del other["max_new_tokens"]
    assert compare(build_evaluation(), other)["not_comparable"] == []


def test_other_candidates_to_the_same_questions_are_not_paired():
    """An earlier version may have drawn them from the same files in another way."""
    one, other = build_evaluation(), build_evaluation()
    for evaluation, wrong in ((one, ["b", "c"]), (other, ["c", "b"])):
        for row in evaluation["questions"]:
            row["candidates"] = ["a", *wrong]
    assert compare(one, other)["not_comparable"] == []
    other["questions"][-1]["candidates"] = ["a", "d"]
    comparison = compare(one, other)
    assert comparison["not_comparable"] == [
        "one and other ranked other candidates in 1 of 8 conflict questions, so they are not "
        "paired. Write both again with: fedlora evaluate"
    ]
    assert find(comparison, "conflict_accuracy") is find(comparison, "conflict_pass_rate") is None


def test_other_unseen_facts_are_not_paired():
    other = build_evaluation()
    other["questions"][0]["is_unseen"] = False
    comparison = compare(build_evaluation(), other)
    assert comparison["not_comparable"] == [
        "one and other had other facts that clients never saw, so they are not paired on these: "
        "8 and 7 questions, 7 in common."
    ]
    assert find(comparison, "universal_unseen_accuracy") is None
    assert find(comparison, "universal_accuracy")["n"] == 8


def test_other_clients_are_named():
    other = build_evaluation()
    other["files"]["harbour"] = other["files"].pop("river")
    other["system_prompts"]["harbour"] = other["system_prompts"].pop("river")
    for row in other["questions"]:
        row["client"] = row["client"].replace("river", "harbour")
    comparison = compare(build_evaluation(), other)
    assert comparison["not_comparable"][0] == (
        "one and other have other clients: (north, river) and (harbour, north)."
    )
    assert comparison["differences"] == []


def test_long_prompts_are_cut_to_where_they_differ():
    one, other = build_evaluation(), build_evaluation()
    for evaluation, end in ((one, "politely"), (other, "rudely")):
        evaluation["system_prompts"]["north"] = "You answer the citizens. " * 20 + end
    (sentence,) = compare(one, other)["not_comparable"]
    assert len(sentence) < 160 and 'politely" and "' in sentence and 'rudely".' in sentence


def test_seeds_are_averaged_within_a_mode():
    runs = {
        f"{mode}-{seed}": build_evaluation(mode, seed)
        for mode in ("dual", "fedavg")
        for seed in (1, 2, 3)
    }
    for name, value in {"dual-1": 0.4, "dual-2": 0.5, "dual-3": 0.6}.items():
        runs[name]["summary"]["local_accuracy"]["value"] = value
    runs["dual-3"]["summary"]["local_exact_match"]["value"] = None
    groups, notes = group_by_mode(runs)
    assert [g["runs"] for g in groups] == [
        ["dual-1", "dual-2", "dual-3"],
        ["fedavg-1", "fedavg-2", "fedavg-3"],
    ]
    assert (groups[0]["label"], groups[0]["seeds"]) == ("dual, 1,500 parameters", [1, 2, 3])
    mean = groups[0]["figures"]["local_accuracy"]
    # Student's t for two degrees of freedom at 97.5 % is 4.3027; the deviation is 0.1.
    assert mean["value"] == pytest.approx(0.5)
    assert mean["high"] - 0.5 == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert (mean["n"], mean["facts"]) == (12, None)
    assert groups[0]["figures"]["local_exact_match"]["value"] is None
    assert notes == []


def test_only_like_runs_of_other_seeds_are_averaged():
    other_rank = build_evaluation(seed=2)
    other_rank["num_parameters"] = {"global": 2000, "local": 1000}
    longer = build_evaluation(seed=3)
    longer["num_steps"] = 240
    runs = {"a": build_evaluation(seed=1), "b": other_rank, "c": longer}
    assert group_by_mode(runs) == ([], [])
    groups, notes = group_by_mode({"a": build_evaluation(), "b": build_evaluation()})
    assert groups == []
    assert notes == [
        "a, b (dual, 1,500 parameters) share seeds (42, 42), so no mean over seeds is given for "
        "them."
    ]


def test_the_result_is_plain_json():
    runs = {
        "a": build_evaluation(),
        "b": build_evaluation(seed=43),
        "c": build_evaluation("fedavg", local=([FALSE] * 6, [TRUE] * 6), conflict=([], [])),
    }
    before = copy.deepcopy(runs)
    comparison = compare_evaluations(runs)
    assert runs == before
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison
    assert describe_comparison(json.loads(json.dumps(comparison))) == describe_comparison(
        comparison
    )
    assert comparison["groups"][0]["runs"] == ["a", "b"]
    assert set(comparison["runs"][0]) >= {"name", "mode", "seed", "round", "figures"}


def test_fewer_than_two_runs_raise():
    with pytest.raises(ValueError, match="two or more different runs; given: none"):
        compare_evaluations({})
    with pytest.raises(ValueError, match="given: alone"):
        compare_evaluations({"alone": build_evaluation()})


@pytest.mark.parametrize("version", [None, 2, "1"])
def test_an_unknown_format_raises(version):
    other = {**build_evaluation(), "format": version}
    with pytest.raises(ValueError, match="other: .* format .* expected 1.*fedlora evaluate other"):
        compare(build_evaluation(), other)


def test_the_text_says_first_what_speaks_against_the_comparison():
    other = build_evaluation(local=LOSES_SIX_OF_SEVEN["other"])
    other["num_steps"] = 240
    text = describe_comparison(compare(build_evaluation(local=LOSES_SIX_OF_SEVEN["one"]), other))
    lines = text.splitlines()
    assert lines[0] == "NOT LIKE FOR LIKE:" and "120 and 240" in lines[1]
    assert max(map(len, lines)) <= 100 and "\x1b" not in text
    row = next(line for line in lines if "-41.7" in line)
    assert "-41.7 [-73.8, -9.4]" in row and "12/3" in row and "0.500" in row and "1.000" in row
    assert "50.0 [40.0, 60.0]" in text
    assert "other minus one" in text and "adjusted for the 10 tests" in text
    figures, differences = text.split("other minus one")
    assert "conflict, every client" in differences
    assert "conflict, every client" not in figures  # Neither summary has one.


def test_names_are_shown_as_they_are():
    names = ("[bold]study[/bold]", ":apple: " + "run" * 40)
    text = describe_comparison(
        compare_evaluations({name: build_evaluation(seed=i) for i, name in enumerate(names)})
    )
    assert "[bold]study[/bold]" in text and ":apple:" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_text_shows_means_and_the_keyword_ceiling_only_where_there_are_some():
    runs = {"a": build_evaluation(), "b": build_evaluation(seed=43)}
    text = describe_comparison(compare_evaluations(runs))
    assert "dual, 1,500 parameters: runs 1, 2" in text and "Keyword" not in text
    for key, value in (("keyword_pass_rate", 0.2), ("keyword_ceiling", 0.32)):
        runs["b"]["summary"][key] = {"value": value, "low": 0.1, "high": 0.4, "n": 50}
    row = describe_comparison(compare_evaluations(runs)).split("Keyword")[1].split("\n\n")[0]
    assert "20.0 [10.0, 40.0]" in row and "32.0 [10.0, 40.0]" in row
    del runs["b"]["summary"]["local_accuracy"]
    runs["b"]["seed"] = 42
    text = describe_comparison(compare_evaluations(runs))
    assert "Means over seeds" not in text and "share seeds" in text


def test_comparing_needs_no_torch():
    code = (
        "import sys, fedlora_app.evaluation.comparison\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
