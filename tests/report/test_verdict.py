"""The verdict and the figures behind it: no more than the numbers say."""

from __future__ import annotations

import pytest

from fedlora_app.evaluation.comparison import Paired, compare_evaluations
from fedlora_app.evaluation.comparison_text import describe_comparison
from fedlora_app.evaluation.learning import NothingLearned
from fedlora_app.evaluation.statistics import Estimate, proportion, share_of_facts
from fedlora_app.report.numbers import EXACT, RANKED, Figures, measure_run
from fedlora_app.report.verdict import BOTH, judge_run, judge_runs
from fedlora_app.runs.reading import OWN_AVERAGES, find_kind

CLIENTS = ("ann", "bob")
NUM_FACTS = 16  # of three paraphrases each


def figures(who: str, right: int, n: int = 48, **shares: float) -> Figures:
    passed = share_of_facts(right / n, n)
    exact = {name: share_of_facts(value, 100) for name, value in shares.items()}
    return Figures(who, {EXACT: exact}, {EXACT: passed, RANKED: passed})


def swap_row(question_set: str, client: str, adapters: str, value: float | None, n: int, **other):
    row = {"question_set": question_set, "client": client, "adapters": adapters, "scale": 1.0}
    row |= {"accuracy": value, "n": n, "exact_match": value, "n_generated": n}
    return row | other


def evaluate(mode: str, right: int | list[bool], *, seed: int = 7, n: int = 48, **other) -> dict:
    """Return an ``evaluation.json`` whose first conflict questions all clients passed."""
    verdicts = [i < right for i in range(n)] if isinstance(right, int) else right
    passes = proportion(verdicts, [i % NUM_FACTS for i in range(len(verdicts))]).dump()
    records = [
        {"record": i, "fact": f"fact {i % NUM_FACTS}", "instruction": f"Question {i}?"}
        for i in range(len(verdicts))
    ]
    answer = {"question_set": "conflict", "scale": 1.0, "is_unseen": False, "correct": None}
    content = {
        "format": 1,
        "mode": mode,
        "seed": seed,
        "round": 1,
        "settings": mode,
        "answering": "global+local" if mode == "dual" else "global",
        "base_model": {"name": "model", "fingerprint": "f" * 64},
        "files": {c: {"conflict": "c"} for c in CLIENTS},
        "system_prompts": {c: f"You are {c}." for c in CLIENTS},
        "num_steps": 8,
        "num_parameters": {"global": 100, "local": 50},
        "summary": {"conflict_pass_rate": passes, "conflict_pass_rate_exact_match": passes},
        "scales": {},
        "swap_table": [],
        "conflicts": [
            row | {"passed_exact_match": passed}
            for row, passed in zip(records, verdicts, strict=True)
        ],
        "questions": [
            answer | row | {"client": client, "exact_match": passed}
            for row, passed in zip(records, verdicts, strict=True)
            for client in CLIENTS
        ],
    }
    return content | other


def judge(evaluations: dict[str, dict]):
    """Judge runs by their evaluations, as the page does."""
    own = {"dual": BOTH, "fedavg": "global"}
    found = {name: measure_run([], e)[own[e["mode"]]] for name, e in evaluations.items()}
    return judge_runs(found, {name: e["mode"] for name, e in evaluations.items()}, evaluations)


@pytest.mark.parametrize(
    ("two", "one", "prompts", "headline"),
    [
        (48, 0, ["a", "a"], "Two adapters: 100 % of the conflicts, where one adapter can"),
        (9, 0, ["a", "a"], "Two adapters: 19 % of the conflicts, where one adapter can"),
        (48, 0, ["a", "b"], "Two adapters beat the shared one alone on conflict questions."),
        (48, 0, [None, None], "Two adapters beat the shared one alone on conflict questions."),
        (48, 0, [], "Two adapters beat the shared one alone on conflict questions."),
        (2, 1, ["a", "b"], "No difference between two adapters and the shared one alone on"),
        (0, 48, ["a", "b"], "Two adapters do worse than the shared one alone on conflict"),
    ],
)
def test_the_verdict_says_no_more_than_the_numbers(two, one, prompts, headline):
    found = {BOTH: figures(BOTH, two), "global": figures("global", one)}
    verdict = judge_run(found, prompts)
    assert verdict.headline.startswith(headline)
    assert f"{two} of 48 conflict questions" in verdict.sentence
    is_any_other = "where one adapter can" in headline
    assert any("mode='fedavg'" in caveat for caveat in verdict.caveats) != is_any_other


def test_no_conflict_passed_is_not_told_as_a_merit_of_two_adapters():
    found = {BOTH: figures(BOTH, 0), "global": figures("global", 0)}
    verdict = judge_run(found, ["a", "a"])
    assert verdict.headline.startswith("No difference between two adapters and the shared one")
    assert "can reach none" not in verdict.headline


def test_that_nothing_was_learned_comes_before_all_else():
    found = {BOTH: figures(BOTH, 0), "global": figures("global", 0)}
    nothing = NothingLearned("Nothing was learned yet.", "No question set is better.")
    verdict = judge_run(found, ["a", "a"], "phased", nothing)
    assert verdict.headline == "Nothing was learned yet."
    assert "to 0 of 48 conflict questions" in verdict.sentence
    assert judge_run({}, [], None, nothing).headline == "Nothing was learned yet."


@pytest.mark.parametrize(
    ("prompts", "schedule", "said"),
    [
        (["a", "b"], "phased", "on universal data alone"),
        (["a", "b"], "joint", "on local data too"),
        (["a", "b"], None, None),
        ([None, None], "phased", None),
    ],
)
def test_what_the_shared_adapter_was_trained_on_is_said_only_where_known(prompts, schedule, said):
    found = {BOTH: figures(BOTH, 48), "global": figures("global", 0)}
    caveat = judge_run(found, prompts, schedule).caveats[0]
    assert (said in caveat) if said else caveat.startswith("How one adapter does")


def test_what_two_adapters_lose_stands_in_the_headline():
    both = figures(BOTH, 9, universal=0.72, universal_unseen=0.27)
    found = {BOTH: both, "global": figures("global", 0, universal=0.77, universal_unseen=0.66)}
    verdict = judge_run(found, ["a", "a"])
    assert verdict.headline.endswith(", at a cost: never seen 27 % instead of 66 %.")
    assert "66 % (56 to 75) with the shared one alone, a loss beyond" in verdict.sentence
    assert "77 % (68 to 84) with the shared one alone." in verdict.sentence


def test_without_conflict_questions_there_is_no_verdict():
    assert judge_run({}, ["a"]).headline == "No verdict."
    assert judge_run({BOTH: Figures(BOTH)}, ["a"]).headline == "No verdict."
    assert judge_runs({"a": figures(BOTH, 48)}, {"a": "dual"}, {}).headline == "No verdict."


def test_one_fact_asked_48_times_tells_nothing():
    def pair(num_facts):
        facts = {record: f"fact {record % num_facts}" for record in range(48)}
        both, one = figures(BOTH, 48), figures("global", 0)
        both.verdicts.update(dict.fromkeys(facts, True))
        both.facts.update(facts)
        one.verdicts.update(dict.fromkeys(facts, False))
        return judge_run({BOTH: both, "global": one}, ["a", "b"])

    assert pair(1).headline.startswith("No difference")
    assert pair(16).headline.startswith("Two adapters beat")
    assert "+100 points" in pair(16).sentence


def test_conflicts_judged_by_keywords_alone_are_not_called_unmeasured():
    nothing, rate = proportion([]).dump(), proportion([True] * 3 + [False]).dump()
    summary = {"conflict_pass_rate": nothing, "conflict_pass_rate_exact_match": nothing}
    summary |= {"keyword_pass_rate": rate, "keyword_ceiling": proportion([True] * 10).dump()}
    rows = [swap_row("conflict", c, f"global+local:{c}", None, 0, n_keyword=2) for c in CLIENTS]
    evaluation = evaluate("dual", [], summary=summary, swap_table=rows)
    verdict = judge_run(measure_run([], evaluation), ["a", "b"])
    assert verdict.headline == "By keywords only: 75 % of the answers fit."
    assert "of the right answers in the files 100 %" in verdict.sentence
    evaluation["swap_table"] = []  # the keywords are of other questions
    assert judge_run(measure_run([], evaluation), ["a", "b"]).headline == "No verdict."


@pytest.mark.parametrize(("num_two", "num_one"), [(2, 1), (1, 2)])
def test_the_one_run_of_a_side_is_its_own(num_two, num_one):
    runs = {f"dual-{seed}": evaluate("dual", 48, seed=seed) for seed in range(num_two)}
    runs |= {f"fedavg-{seed}": evaluate("fedavg", 0, seed=seed) for seed in range(num_one)}
    verdict = judge(runs)
    assert verdict.headline == "Two adapters beat one averaged adapter on conflict questions."
    names = ", ".join(f"fedavg-{seed}" for seed in range(num_one))
    assert f"to 0 of 48, 0 % (0 to 19), with one averaged adapter ({names})" in verdict.sentence


def test_seeds_that_agree_are_no_certainty():
    for other_seeds in ((1, 2), (3, 4)):
        runs = {f"dual-{seed}": evaluate("dual", 24, seed=seed) for seed in (1, 2)}
        runs |= {f"fedavg-{seed}": evaluate("fedavg", 23, seed=seed) for seed in other_seeds}
        verdict = judge(runs)
        assert verdict.headline.startswith("No difference")
        assert "50 to 50" not in verdict.sentence and "50 %, 95 % interval 36" in verdict.sentence


def test_several_seeds_are_judged_by_their_spread():
    def run(two, one):
        evaluations = {f"t{i}": evaluate("dual", right, seed=i) for i, right in enumerate(two)}
        evaluations |= {f"o{i}": evaluate("fedavg", right, seed=i) for i, right in enumerate(one)}
        return judge(evaluations)

    assert run([48, 47, 46], [0, 1, 0]).headline.startswith("Two adapters beat one")
    assert run([48, 10, 0], [0, 20, 40]).headline.startswith("No difference")
    assert "21 % (0 to 100), with" in run([48], [0, 20]).sentence  # clipped, not -244 to 286


def test_only_like_runs_speak_for_a_side():
    runs = {f"joint-{s}": evaluate("dual", 30, seed=s, num_steps=9) for s in (1, 2)}
    runs |= {f"dual-{s}": evaluate("dual", 48, seed=s) for s in (1, 2)}
    runs |= {f"fedavg-{s}": evaluate("fedavg", 0, seed=s) for s in (1, 2)}
    runs |= {"large": evaluate("fedavg", 40, seed=1, num_parameters={"global": 200})}
    runs |= {"dual-again": evaluate("dual", 0, seed=1)}
    verdict = judge(runs)
    assert "48 of 48 conflict questions" in verdict.sentence  # comparable, though not the first
    assert "(dual-1, dual-2)" in verdict.sentence and "(fedavg-1, fedavg-2)" in verdict.sentence
    told = " ".join(verdict.caveats)
    assert "Other variants stand in the table: joint-1, joint-2, large." in told
    assert "a like run has the same seed: dual-again." in told


def test_runs_that_are_not_evaluated_give_no_verdict():
    found = {"a": figures(BOTH, 48), "b": figures("global", 0)}
    verdict = judge_runs(found, {"a": "dual", "b": "fedavg"}, {"a": evaluate("dual", 48)})
    assert verdict.headline == "No verdict."
    assert verdict.sentence.startswith("Not evaluated, so nothing tells what they are like: b.")


def test_what_is_not_comparable_is_not_judged():
    runs = {"a": evaluate("dual", 48), "b": evaluate("fedavg", 0, num_steps=9)}
    verdict = judge(runs)
    assert verdict.headline == "Not comparable." and "optimizer steps: 9 and 8" in verdict.sentence
    assert "beat" not in verdict.headline + verdict.sentence


def test_a_difference_is_told_only_if_interval_and_test_agree():
    assert Paired(Estimate(0.1, 0.02, 0.2, 48), 0.06).sign == 0
    assert Paired(Estimate(0.1, 0.0, 0.2, 48), 0.01).sign == 0
    assert Paired(Estimate(0.1, None, None, 48), 0.01).sign == 0
    assert Paired(Estimate(-0.1, -0.2, -0.02, 48), 0.01).sign == -1
    # Five of 48 more, all of other facts: the exact p is 0.0625.
    runs = {"a": evaluate("dual", 25), "b": evaluate("fedavg", 20)}
    assert judge(runs).headline.startswith("No difference")
    assert "-3 to +23 (sign-flip test over facts: p 0.062)" in judge(runs).sentence


@pytest.mark.parametrize("key", ["format", "questions", "files", "seed", "num_parameters"])
@pytest.mark.parametrize("value", [None, [5], {"a": 1}, "x"])
def test_an_evaluation_of_another_shape_raises_what_the_page_catches(key, value):
    runs = {"a": evaluate("dual", 48), "b": evaluate("fedavg", 0) | {key: value}}
    found = {"a": figures(BOTH, 48), "b": figures("global", 0)}
    try:
        judge_runs(found, {"a": "dual", "b": "fedavg"}, runs)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return
    assert key == "seed"  # any is told apart from others


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (0.0004, "0.04 %"), (0.9996, "99.96 %"), (1.0, "100 %")]
)
def test_a_percentage_is_0_or_100_only_if_it_is(value, text):
    found = {BOTH: Figures(BOTH, {}, {EXACT: share_of_facts(value, 48)})}
    assert judge_run(found, []).headline == f"Two adapters: {text} of the conflicts."


def test_a_question_counts_once_however_many_clients_answer_it():
    rows = [
        swap_row(name, client, adapters, value, n)
        for name, n in (("universal", 144), ("conflict", 48), ("local", 40))
        for client, value in zip(CLIENTS, (0.5, 1.0), strict=True)
        for adapters in ("global", f"global+local:{client}", "global+local:cy", "global+local:di")
    ]
    found = measure_run([], evaluate("dual", 48, swap_table=rows))
    for who in ("global", BOTH, "global+local:foreign"):
        assert [found[who].share(s).n for s in ("universal", "conflict", "local")] == [144, 48, 80]
        assert found[who].share("universal").value == 0.75
        assert found[who].share("universal").low == proportion([True] * 108 + [False] * 36).low


def test_a_share_outside_0_to_1_is_an_error():
    for value in (float("nan"), float("inf"), 1.5):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            share_of_facts(value, 4)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_figures_at_the_chosen_scale_have_a_row_of_their_own(scale):
    chosen = {"ann": {"chosen": scale}, "bob": {"chosen": 1.0}}
    rows = [swap_row("local", c, f"global+local:{c}", 0.5, 10) for c in CLIENTS]
    rows.append(swap_row("local", "ann", "global+local:ann", 1.0, 10, scale=1.5))
    rates = dict.fromkeys(
        ("conflict_pass_rate", "conflict_pass_rate_exact_match"), proportion([True]).dump()
    )
    content = {"scales": chosen, "swap_table": rows, "summary_chosen_scale": rates}
    found = measure_run([], evaluate("dual", 24, **content))
    assert found[BOTH].share("local").value == 0.5
    assert (f"{BOTH}:chosen" in found) == (scale != 1.0)
    if scale != 1.0:
        at_chosen = found[f"{BOTH}:chosen"]
        assert at_chosen.label == "global + own local, chosen scale"
        assert at_chosen.share("local").value == 0.75 and at_chosen.passed().value == 1.0


def test_answers_that_can_never_match_are_judged_by_their_ranking():
    """38 of 40 conflicts are ranked right, and none of the free answers equals its own."""
    none = {"conflict_pass_rate_exact_match": proportion([False] * 40).dump()}
    evaluations = {}
    for name, mode, right in (("two", "dual", 38), ("one", "fedavg", 0)):
        found = evaluate(mode, right, n=40, leading={"conflict": "accuracy"})
        found["summary"] |= none
        for row in found["conflicts"]:
            row |= {"passed": row["passed_exact_match"], "passed_exact_match": False}
        for row in found["questions"]:
            row |= {"correct": row["exact_match"], "exact_match": False}
        evaluations[name] = found
    verdict = judge(evaluations)
    assert verdict.headline.startswith(
        "Two adapters beat one averaged adapter on conflict questions by likelihood, as most right"
    )
    assert "ranked its own answer first in 38 of 40" in verdict.sentence
    own = measure_run([], evaluations["two"])
    verdict = judge_run(own, ["a", "b"])
    assert verdict.headline.startswith("Two adapters: 95 % of the conflicts by likelihood")
    assert "Word for word every client gave its own answer to 0 of 40." in verdict.sentence
    text = describe_comparison(compare_evaluations(evaluations))
    assert "ranked first *" in text and "greedy answer exact *" not in text
    # Without the mark in the evaluation nothing could be told.
    for found in evaluations.values():
        found["leading"] = {}
    assert judge(evaluations).headline.startswith("No difference")


def test_a_copy_of_the_average_is_not_called_a_local_adapter():
    copy = judge_run({who: figures(who, 24) for who in ("local:own", "global")}, ["x", "y"])
    assert copy.headline == "A fine-tuned copy of the average: 50 % of the conflicts."
    alone = judge_run({"local:own": figures("local:own", 24)}, ["x", "y"])
    assert alone.headline == "A local adapter alone: 50 % of the conflicts."


def test_passes_are_about_no_more_facts_than_conflicts():
    """A set of ten facts, of which two clients have answers to five in common."""
    key = "global+local/conflict"
    history = [
        {"phase": "evaluate", "round": 1, "client": client, "metrics": metrics}
        for client, side in (("ann", [1] * 10), ("bob", [1] * 5 + [-1] * 5))
        for metrics in [
            {f"{key}/exact_match": 1.0, f"{key}/n": 10, f"{key}/n_facts": 10}
            | {f"{key}/exact_match_each": side}
        ]
    ]
    passed = measure_run(history, None)[BOTH].passed()
    assert (passed.n, passed.facts) == (5, 5)
    assert (passed.low, passed.high) == (proportion([True] * 5).low, 1.0)


def test_averages_of_each_clients_own_are_not_called_one():
    kinds = {
        rule: find_kind("fedavg", rule) for rule in ("fedavg", "share-a", "rest-of-world", None)
    }
    assert kinds == {
        "fedavg": "fedavg",
        "share-a": OWN_AVERAGES,
        "rest-of-world": OWN_AVERAGES,
        None: "fedavg",
    }
    assert find_kind("dual", "share-a") == "dual"
    own = {"two": figures(BOTH, 40), "other": figures("global", 0)}
    verdict = judge_runs(own, {"two": "dual", "other": OWN_AVERAGES}, {})
    assert verdict.headline == "No verdict." and "the same for all clients" in verdict.sentence
    verdict = judge_run({"global": figures("global", 0)}, ["a", "a"], kind=OWN_AVERAGES)
    assert verdict.headline.startswith("An averaged adapter of each client's own: 0 %")
    assert not any("any one adapter for all" in caveat for caveat in verdict.caveats)
