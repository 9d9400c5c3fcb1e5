"""What a report says of the gate, of a real tiny run and of made-up ones."""

from __future__ import annotations

import json
import re

import pytest
from conftest import build_tiny_config
from loopback import Federation
from synthetic import write_run

from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.gate_report import BLAMED, read_gated_sets
from fedlora_app.evaluation.names import QUESTION_SETS
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.report import questions
from fedlora_app.report.drawing import NothingToPlotError
from fedlora_app.report.page import write_report
from fedlora_app.report.plots import plot_gate
from fedlora_app.runs.reading import load_run

CLIENTS = ("ann", "bob", "cy")
WARNING = "The gate of client-00 separates badly"


@pytest.fixture(scope="module")
def gated(tiny_project, tmp_path_factory):
    """A run with a gate, and its evaluation before there is a report."""
    config = build_tiny_config(
        CLIENTS,
        adapters={"gate": "prompt"},
        federated={"num_rounds": 1},
        evaluation={"batch_size": 64, "max_new_tokens": 4},
    )
    run = Federation(tiny_project, tmp_path_factory.mktemp("gated"), config).run("run")
    return run, evaluate_round(open_round(load_run(run), tiny_project), lambda *_: None)


def section(run, name: str = "gate") -> str:
    html = (run / "report.html").read_text()
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    return found[0] if found else ""


def test_every_wrong_answer_of_a_real_run_has_its_cause(gated):
    _, evaluation = gated
    sets = read_gated_sets(evaluation)
    assert list(sets) == list(QUESTION_SETS)
    rows = [row for row in evaluation["questions"] if row["scale"] == 1.0]
    assert sum(len(found.values) for found in sets.values()) == len(rows)
    wrong = sum(row[find_leading(evaluation, row["question_set"]).row_key] is False for row in rows)
    assert sum(found.blamed.total() for found in sets.values()) == wrong > 0


def test_the_report_of_a_real_run_shows_its_gate(gated, unrendered):
    run, evaluation = gated
    write_report(run)
    text, sets = section(run), read_gated_sets(evaluation)
    assert len(plot_gate(evaluation).axes) == len(sets) and text.count("<svg") == 1
    for client in CLIENTS:
        assert f"<tr><td>{client}</td><td>kinds</td>" in text
    for found in sets.values():
        counts = "".join(f"<td>{found.blamed[who]}</td>" for who in BLAMED)
        assert f"<td>{found.blamed.total()}</td>{counts}" in text
    wrong = sets["universal"].blamed + sets["universal_unseen"].blamed
    for part, label in BLAMED.items():
        assert text.count(f'<td class="due">{label}</td>') == wrong[part]
    conflicts = section(run, "conflicts")
    for part, label in BLAMED.items():
        assert conflicts.count(f'<td class="due">{label}</td>') == sets["conflict"].blamed[part]


def test_the_printed_evaluation_says_what_the_gates_open_for(gated):
    _, evaluation = gated
    printed = describe_evaluation(evaluation)
    (line,) = re.findall(r"│ local +│([^\n]*)│\n", printed[printed.index("Gate: %") :])
    cells = [cell.strip() for cell in line.split("│")]
    local = read_gated_sets(evaluation)["local"]
    assert len(cells) == len(CLIENTS) + 1 + len(BLAMED)
    for client, cell in zip(CLIENTS, cells, strict=False):
        assert float(cell) == pytest.approx(100 * local.share_open(client), abs=0.06)
    counts = (local.blamed.total(), *(local.blamed[who] for who in BLAMED))
    assert cells[-4:] == [str(count) for count in counts]


def test_a_gate_that_separates_badly_is_told_in_the_head_and_its_section(tmp_path, unrendered):
    run = write_run(tmp_path / "run", gated=True)
    html = write_report(run).read_text()
    head, text = html[: html.index("<nav")], section(run)
    assert WARNING in head and "The section Gate says what to do" in head
    assert WARNING in text and "training.local_kept_share" in text
    assert "<td>61 % (low)</td><td>90 %</td><td></td></tr>" in text
    assert text.count("(low)") == 1
    evaluation = json.loads((run / "evaluation.json").read_text())
    blamed = [r for r in evaluation["questions"] if r["question_set"] == "universal"]
    assert text.count('<td class="due">gate</td>') == sum(r["failed"] == "gate" for r in blamed)
    first, last = text.index('"due">gate<'), text.rindex("<article")
    assert text.index("<article") < first < last and '"due">gate<' not in text[last:]


def test_a_run_that_is_not_evaluated_shows_how_its_gates_separate(tmp_path, unrendered):
    run = write_run(tmp_path / "run", gated=True, evaluated=False)
    config = json.loads((run / "config.json").read_text())
    config["federated"]["clients"].append(config["federated"]["clients"][0] | {"id": "new"})
    (run / "config.json").write_text(json.dumps(config))
    write_report(run)
    text = section(run)
    assert "93 %" in text and f"fedlora evaluate {run}" in text and "<article" not in text
    assert "<tr><td>new</td><td>no gate</td>" in text
    assert "trained on one kind of question alone, or has not told of one" in text


def test_where_there_are_no_conflict_questions_none_stand_further_down(tmp_path, unrendered):
    for num_conflicts in (12, 0):
        run = write_run(tmp_path / f"run{num_conflicts}", gated=True, num_conflicts=12)
        path = run / "evaluation.json"
        evaluation = json.loads(path.read_text())
        rows = evaluation["questions"]
        kept = [row for row in rows if num_conflicts or row["question_set"] != "conflict"]
        path.write_text(json.dumps(evaluation | {"questions": kept}))
        write_report(run)
        assert "wrong answers to universal questions" in section(run)
        assert ("stand further down" in section(run)) == bool(num_conflicts)


def test_a_run_without_a_gate_has_no_such_section(tmp_path, unrendered):
    run = write_run(tmp_path / "run")
    html = write_report(run).read_text()
    assert 'id="gate"' not in html and "due to" not in html
    with pytest.raises(NothingToPlotError, match="adapters.gate is none"):
        plot_gate(json.loads((run / "evaluation.json").read_text()))


def test_wrong_universal_answers_are_listed_as_far_as_they_fit(tmp_path, unrendered, monkeypatch):
    run = write_run(tmp_path / "run", gated=True)
    write_report(run)
    total = int(re.search(r"the (\d+) wrong answers", section(run))[1])
    assert section(run).count('class="due"') == total and "fit;" not in section(run)
    monkeypatch.setattr(questions, "MOST_BYTES_WRONG", 2000)
    write_report(run)
    shown = int(re.search(r"(\d+) fit; evaluation.json has all", section(run))[1])
    assert 0 < shown == section(run).count('class="due"') < total


@pytest.mark.parametrize(
    ("name", "value"), [("gate/opens_for_local", "much"), ("gate/by_fact", None), ("gate/", 1)]
)
def test_figures_of_another_shape_do_not_stop_the_report(tmp_path, unrendered, name, value):
    run = write_run(tmp_path / "run", gated=True)
    history = json.loads((run / "history.json").read_text())
    for entry in history:
        if "gate/by_fact" in entry["metrics"]:
            entry["metrics"] = {name: value}
    (run / "history.json").write_text(json.dumps(history))
    assert "Conflict questions" in write_report(run).read_text()


def test_a_panel_stands_for_each_question_set():
    rows = [
        {"question_set": name, "client": "ann", "is_unseen": False, "scale": 1.0, "gate": value}
        for name, value in (("universal", 0.2), ("universal", 0.8), ("local", 0.9), ("local", 0.6))
    ]
    figure = plot_gate({"questions": rows})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["universal\nopen for 50 % of 2", "local\nopen for 100 % of 2"]
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert [sum(found) for found in heights] == pytest.approx([1, 1])
    assert len(plot_gate({"questions": [*rows, rows[0] | {"is_unseen": True}]}).axes) == 4
