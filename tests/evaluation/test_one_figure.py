"""What is shown in two places of one run has one value, one interval and one chance."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import build_tiny_config
from loopback import Federation

from fedlora_app.evaluation.chance import find_reported_chances, read_chances
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.comparison import compare_evaluations
from fedlora_app.evaluation.comparison_text import describe_comparison
from fedlora_app.evaluation.names import MEASURES, PASS_RATE, figure_key
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.reported import collect_reports
from fedlora_app.evaluation.statistics import Estimate
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.foundation.percent import format_n, format_percent
from fedlora_app.report.numbers import measure_run
from fedlora_app.report.page import write_report
from fedlora_app.runs.history import read_history
from fedlora_app.runs.reading import load_run
from fedlora_app.study import measure

CLIENTS = ("ann", "bob", "cy")
TOPICS = ("red", "blue", "green", "black", "white", "brown")
PAIR = "global+local:own"


@pytest.fixture(scope="module")
def asked(tiny_project, tmp_path_factory):
    """An evaluated run with paraphrases of facts, and with questions that name no fact."""
    project = shutil.copytree(tiny_project, tmp_path_factory.mktemp("asked") / "project")
    universal = [
        {"instruction": text.format(topic), "output": f"The {topic} one.", "fact": topic}
        for topic in TOPICS
        for text in ("Name the {} office.", "Which one is {}?", "Tell me of {}.")
    ]
    universal += [{"instruction": "Name a lamp.", "output": "The old lamp."}]
    conflict = [
        {
            "instruction": text.format(topic),
            "answers": {client: f"{client} says {topic}." for client in CLIENTS},
            "fact": f"{topic} rule",
        }
        for topic in TOPICS[:4]
        for text in ("Tell me the {} rule.", "What is ruled on {}?")
    ]
    conflict.append({"instruction": "Tell me.", "answers": {c: f"{c} tells." for c in CLIENTS}})
    (project / "universal_test.json").write_text(json.dumps(universal))
    (project / "conflict.json").write_text(json.dumps(conflict))
    lengths = {"max_new_tokens": 12, "interval": 1}
    config = build_tiny_config(CLIENTS, federated={"num_rounds": 1}, evaluation=lengths)
    run = Federation(project, project / "results", config).run()
    evaluate_round(open_round(load_run(run), project), lambda *_: None)
    return run


@pytest.fixture(params=["asked", "imported"])
def run(request, unrendered):
    return request.getfixturevalue(request.param)


def same(one: Estimate, other: Estimate) -> bool:
    return one.dump() == pytest.approx(other.dump())


def test_the_run_and_its_evaluation_say_the_same(run):
    """What the server knows of a run, without its data, and what the data's holder does."""
    history, evaluation = read_history(run), load_run(run).evaluation
    before, after = measure_run(history, None), measure_run(history, evaluation)
    assert {"base", "global", PAIR} <= before.keys() & after.keys()
    for who, figures in before.items():
        for name, passed in figures.passes.items():
            assert same(passed, after[who].passes[name])
        for name, by_set in figures.shares.items():
            for question_set, share in by_set.items():
                other = after[who].shares[name][question_set]
                if question_set == "local":  # nobody but the clients knows what their facts are
                    assert (share.low, share.facts) == (None, None)
                    share = Estimate(share.value, other.low, other.high, share.n, other.facts)
                assert same(share, other), (who, name, question_set)
    reported = find_reported_chances(collect_reports(history))
    assert reported == pytest.approx(read_chances(evaluation)) and reported


def test_evaluate_report_compare_and_study_show_the_same(run):
    evaluation = load_run(run).evaluation
    shares = measure_run(read_history(run), evaluation)[PAIR].shares
    studied = measure(evaluation)[PAIR]
    text = " ".join(describe_evaluation(evaluation).split())
    twice = describe_comparison(compare_evaluations({"one": evaluation, "two": evaluation}))
    twice, page = " ".join(twice.split()), write_report(run).read_text()
    for name, by_set in shares.items():
        for question_set, share in by_set.items():
            key = figure_key(question_set, MEASURES[name])
            assert share.dump() == evaluation["summary"][key]
            assert share == studied[f"{name}/{question_set}"]
            shown = format_percent(share.value, share.low, share.high)
            assert shown.replace("100.0", "100") in text
            assert shown in twice and format_n(share.n, share.facts) in twice
            low, high = (format_percent(end, digits=0) for end in (share.low, share.high))
            assert f"[{low}, {high}] n {format_n(share.n, share.facts)}" in page or name != (
                evaluation["leading"].get(question_set, "exact_match")
            )


def test_a_shared_question_is_one_fact_whoever_answers_it(asked):
    summary = load_run(asked).evaluation["summary"]
    counts = {name: (summary[name]["n"], summary[name]["facts"]) for name in summary}
    assert counts["universal_exact_match"] == (19, 7)
    assert counts["conflict_exact_match"] == counts["conflict_pass_rate"] == (9, 5)


def test_chance_stands_beside_every_ranking(run):
    evaluation = load_run(run).evaluation
    chances = read_chances(evaluation)
    assert evaluation["chances"] == chances and chances["local"] < 1
    text, page = describe_evaluation(evaluation), write_report(run).read_text()
    compared = describe_comparison(compare_evaluations({"one": evaluation, "two": evaluation}))
    for name, chance in chances.items():
        told = f"chance {format_percent(chance, digits=None)} %"
        assert told in page and told in compared
        assert told in text or name == PASS_RATE
    if PASS_RATE in chances:  # three candidates at each of three clients
        assert chances[PASS_RATE] == pytest.approx(chances["conflict"] ** 3)
