from __future__ import annotations

import json

import pytest
from conftest import ROOT, build_tiny_config
from loopback import Federation

from fedlora_app.config.schema import ConfigError
from fedlora_app.evaluation.statistics import proportion
from fedlora_app.study import (
    StudyConfig,
    _describe,
    _describe_unknown,
    describe_percent,
    load_study,
    run_study,
)

SETTINGS = {"seeds": [7], "variants": {"sum": "", "searched": ""}}


@pytest.mark.usefixtures("unrendered")
def test_a_variant_is_evaluated_as_the_study_says(tiny_project, tmp_path):
    """Of finished runs, which a study does not repeat."""
    changes = {"interval": 0, "protocol": "core", "max_new_tokens": 2}
    config = build_tiny_config(federated={"num_rounds": 1}, evaluation=changes)
    path = tiny_project / "combined.yaml"
    path.write_text(json.dumps(config.dump()))
    kept = {"combine": {"searched": "search"}, "kept": str(tmp_path / "kept")}
    study = StudyConfig(name="tiny", config=path.name, **kept, **SETTINGS)
    for variant in study.variants:
        Federation(tiny_project, tmp_path / "tiny", config).run(f"{variant}-seed7")
    text = run_study(study, tiny_project, tmp_path, lambda *_: None)
    assert "| sum | global + own local |" in text and "| searched | global + own local |" in text
    unknown = text[text.index("of the facts that the base model does not know") :].splitlines()
    assert unknown[2].startswith("| variant | answers with | universal | never seen |")
    assert unknown[4].startswith("| sum | share of all questions | ")
    assert unknown[5].startswith("| sum | global + own local | ")
    files = {p.parent.name: p.name for p in (tmp_path / "tiny").glob("*-seed7/evaluation*.json")}
    assert files == {"sum-seed7": "evaluation.json", "searched-seed7": "evaluation_search.json"}
    changed = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").glob("*-seed7/evaluation*.json")
    }
    assert run_study(study, tiny_project, tmp_path, lambda *_: None) == text
    assert changed == {path: path.stat().st_mtime_ns for path in changed}


def test_of_what_was_not_measured_there_is_no_table():
    """Without candidates nothing is ranked; a base model may know all that a variant is asked."""
    some, all_, none = (
        {"exact_match": {"local": proportion(found)}} for found in ([1, 0, 1], [1] * 3, [0] * 3)
    )
    unknown = {"a": [(all_, all_)], "b": [({}, none)], "c": [(some, all_)], "old": [({}, {})]}
    lines = list(_describe_unknown(unknown, dict.fromkeys(unknown, "global")))
    assert [line.split(" | ")[:2] for line in lines if line.startswith("| ")] == [
        ["| variant", "answers with"],
        *(["| a", "share of all questions"], ["| a", "global alone"]),
        ["| b", "share of all questions"],
        ["| c", "global alone"],
    ]
    figures = {"a": [{"global": {"exact_match/local": proportion([1, 0, 1])}}]}
    study = StudyConfig(name="tiny", config="x", **SETTINGS)
    text = "\n".join(_describe(study, figures, {"a": [8]}, {}))
    assert "Greedy answer exact, %" in text and "Ranked first" not in text


def test_an_experiment_is_no_study():
    path = ROOT / "conf" / "demo.yaml"
    with pytest.raises(ConfigError, match=f"run by: fedlora train {path}"):
        load_study(path)


def test_a_combination_of_no_variant_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"name": "x", "config": "y", "combine": {"sun": "gate"}} | SETTINGS))
    with pytest.raises(ConfigError, match="combine names sun, which is no variant"):
        load_study(path)


def test_a_seed_that_is_named_twice_is_refused(tmp_path):
    """One run would count as two seeds that agree."""
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"name": "x", "config": "y"} | SETTINGS | {"seeds": [1, 2, 1]}))
    with pytest.raises(ConfigError, match="seeds names 1 more than once"):
        load_study(path)


def test_seeds_that_agree_are_given_no_interval():
    """Of width 0 it would say that any other seed gives the same."""
    assert describe_percent([1.0, 1.0, 1.0]) == "100.0"
    assert describe_percent([0.9, 1.0, 0.95]) == "95.0 ± 12.4"
    assert describe_percent([0.9, None]) == ""
