"""A measure is one entry: from there it reaches every row, table and page."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, build_tiny_config
from loopback import Federation

from fedlora_app.evaluation import names
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.comparison import compare_evaluations
from fedlora_app.evaluation.comparison_text import describe_comparison
from fedlora_app.evaluation.names import FIGURES, MEASURES, Measure, figure_key, shown_measures
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.federation.messages import DECLARED_METRICS
from fedlora_app.report import drawing
from fedlora_app.report.page import write_report
from fedlora_app.runs.reading import load_run
from fedlora_app.study import measure as measure_study

CLIENTS = ("ann", "bob", "cy")


def load_example() -> Measure:
    """Return the measure that the documentation shows."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module: dict = {}
    exec(re.search(r"```python\n(.*?)```", text.split("## A metric")[1], re.S).group(1), module)
    return module["NUMBERS"]


LENGTH = Measure("length", "length", lambda question, answered: len(answered.generated) / 100)
ADDED = (load_example(), LENGTH)


@pytest.fixture(scope="module")
def evaluated(tiny_project, tmp_path_factory):
    """A run whose evaluation holds two more measures, and the texts that are made of it."""
    folder = tmp_path_factory.mktemp("run")
    config = build_tiny_config(CLIENTS, federated={"num_rounds": 1})
    run = Federation(tiny_project, folder, config).run("run")
    with pytest.MonkeyPatch.context() as patch:
        for measure in ADDED:
            patch.setitem(names.MEASURES, measure.name, measure)
        patch.setattr(drawing, "save_plot", lambda figure, folder, name: f"<svg>{name}</svg>")
        found = evaluate_round(open_round(load_run(run), tiny_project), lambda *_: None)
        comparison = compare_evaluations({"one": found, "other": found})
        texts = {
            "evaluate": describe_evaluation(found),
            "compare": describe_comparison(comparison),
            "report": write_report(run).read_text(),
        }
        yield found, comparison, measure_study(found), texts


@pytest.mark.parametrize("measure", ADDED, ids=lambda measure: measure.name)
def test_a_measure_is_one_entry(evaluated, measure):
    found, comparison, study, texts = evaluated
    name, passes = measure.name, measure.passes_above is not None
    assert all(row[name] is not None for key in ("swap_table", "questions") for row in found[key])
    figures = {key for key, entry in found["summary"].items() if entry["n"] and name in key}
    expected = {f for f in FIGURES if f != "conflict_pass_rate" or passes}
    assert figures == {figure_key(figure, measure) for figure in expected}
    assert all((f"passed_{name}" in row) == passes for row in found["conflicts"])
    value = found["summary"][f"local_{name}"]["value"]
    rows = [r for r in found["questions"] if r["question_set"] == "local" and r["scale"] == 1.0]
    assert value == pytest.approx(sum(r[name] for r in rows) / len(rows))
    assert measure.label in texts["evaluate"] and measure.label in texts["compare"]
    assert f"swap_table_{name}" in texts["report"]
    assert f"{name}/local" in study["global+local:own"]
    differences = [e for e in comparison["differences"] if e["scored_by"] == measure.label]
    assert len(differences) == 4 + passes
    assert {entry["p_value"] for entry in differences} == {1.0}


def test_what_clients_report_of_a_measure_is_declared():
    for measure in MEASURES.values():
        for question_set in names.QUESTION_SETS:
            if measure.reported:
                assert DECLARED_METRICS.fullmatch(f"global/{question_set}/{measure.reported}")
        if measure.reported_each:
            assert DECLARED_METRICS.fullmatch(f"global+local/conflict/{measure.reported_each}")


def test_no_two_figures_share_a_key():
    keys = [figure_key(figure, m) for figure in FIGURES for m in shown_measures(with_variants=True)]
    assert len(set(keys)) == len(keys)
    assert len({measure.row_key for measure in MEASURES.values()}) == len(MEASURES)


@pytest.mark.parametrize(
    ("adapters", "client", "expected"),
    [
        ("base", "ann", "base model"),
        ("global", "ann", "global alone"),
        ("local:ann", "ann", "own local alone"),
        ("global+local:ann", "ann", "global + own local"),
        ("global+local:bob", "ann", "global + foreign local"),
        ("local:bob", "ann", "foreign local alone"),
    ],
)
def test_who_answers_is_said_as_the_client_sees_it(adapters, client, expected):
    row = {"adapters": adapters, "client": client}
    assert names.ANSWERERS[names.relative_label(row)] == expected
