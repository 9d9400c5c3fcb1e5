"""The command as users type it, on a tiny project with a finished run."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from conftest import ROOT, build_tiny_config
from federation import Federation

from fedlora_app import command
from fedlora_app.saved_run import load_run
from fedlora_app.study import StudyConfig, load_study, measure, tabulate


@pytest.fixture(scope="module")
def project(tiny_project):
    """The tiny project with two finished runs below its results."""
    for name, mode in (("pair", "dual"), ("one", "fedavg")):
        config = build_tiny_config(
            ("ann", "bob", "cy"),
            federated={"mode": mode, "num_rounds": 1},
            evaluation={"batch_size": 8, "max_new_tokens": 4, "local_scales": [1.0]},
        )
        Federation(tiny_project, tiny_project / "results", config).run(name)
    return tiny_project


@pytest.fixture
def fedlora(capsys, monkeypatch):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_evaluate_and_compare(fedlora, project):
    runs = [project / "results" / name for name in ("pair", "one")]
    status, _, err = fedlora("compare", *runs)
    assert status == 2 and "is not evaluated yet. Run: fedlora evaluate" in err
    for run in runs:
        status, out, _ = fedlora("evaluate", run)
        assert status == 0 and "Swap table" in out and str(run / "evaluation.json") in out
    evaluation = load_run(runs[0]).evaluation
    assert evaluation["round"] == 1 and evaluation["membership"] is None
    status, out, _ = fedlora("compare", *runs, "--json")
    assert status == 0 and [run["name"] for run in json.loads(out)["runs"]] == ["pair", "one"]
    status, out, _ = fedlora("compare", *runs)
    assert status == 0 and "pair" in out and "one" in out
    status, _, err = fedlora("compare", runs[0], runs[0])
    assert status == 2 and "given twice" in err


def test_membership_is_an_option(fedlora, project):
    status, out, _ = fedlora("evaluate", project / "results" / "one", "--membership", "--json")
    rows = json.loads(out)["membership"]
    assert status == 0 and {row["client"] for row in rows} == {"ann", "bob", "cy"}
    assert all(0 <= row["auc"]["value"] <= 1 for row in rows if row["auc"]["n"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "no-such-run"], "There is no run no-such-run"),
        (["check", "conf/no-such.yaml"], "does not exist"),
        (["study", "conf/no-such.yaml"], "cannot be read"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_message_and_status_2(fedlora, arguments, message):
    status, _, err = fedlora(*arguments)
    assert status == 2 and message in err and "Traceback" not in err


def test_ctrl_c_says_that_the_work_is_kept(fedlora, project, monkeypatch):
    from fedlora_app.evaluation import answering

    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering, "score_prompts", interrupt)
        status, _, err = fedlora("evaluate", project / "results" / "pair")
    assert status == 130 and "the same command goes on from here" in err


def test_a_round_that_is_not_complete_is_an_error(fedlora, project):
    status, _, err = fedlora("evaluate", project / "results" / "pair", "--round", "5")
    assert status == 2 and "has no complete round 5. Complete: 0, 1." in err


def test_check_finds_what_is_wrong_with_the_questions(fedlora, project, tmp_path):
    path = project / "checked.yaml"
    path.write_text(yaml.safe_dump(build_tiny_config().dump()))
    status, out, _ = fedlora("check", path)
    assert status == 2 and "ann_local.json, record 1" in out  # tested on what is trained on
    status, out, _ = fedlora("check", ROOT / "conf" / "demo.yaml", "--json")
    assert status == 0 and not [f for f in json.loads(out) if f["severity"] == "error"]


def test_every_command_has_help_with_an_example(fedlora):
    for name in ("check", "evaluate", "compare", "study"):
        status, out, _ = fedlora(name, "--help")
        assert status == 0 and "Example: fedlora" in " ".join(out.split())


def test_every_study_loads_and_opens_with_its_question_and_command():
    paths = sorted((ROOT / "conf").glob("study-*.yaml"))
    assert paths
    for path in paths:
        study = load_study(path)
        first, *rest = path.read_text().splitlines()
        assert first.startswith("# ") and first.endswith("?")
        assert f"#   fedlora study conf/{path.name}" in rest
        assert (ROOT / study.config).exists() and len(set(study.seeds)) == len(study.seeds)


def test_a_study_s_table_is_made_from_the_swap_tables(fedlora, project):
    fedlora("evaluate", project / "results" / "pair")
    evaluation = load_run(project / "results" / "pair").evaluation
    figures = measure(evaluation)
    assert {"base", "global", "global+local:own", "global+local:foreign", "local:own"} <= set(
        figures
    )
    for who, label in (("base", "base"), ("global", "global")):
        rows = [
            row["exact_match"]
            for row in evaluation["swap_table"]
            if row["adapters"] == label and row["question_set"] == "local"
        ]
        assert figures[who]["exact_match/local"] == pytest.approx(sum(rows) / 3)
    summary = evaluation["summary"]
    own = figures["global+local:own"]
    assert own["accuracy/pass_rate"] == summary["conflict_pass_rate"]["value"]
    lines = list(tabulate({"dual": [figures]}, {"dual": [12]}, "accuracy"))
    assert any("| dual | global + own local |" in line and "| 12 |" in line for line in lines)


def test_a_study_refuses_unknown_keys(tmp_path, fedlora):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nconfig: y\nseeds: [1]\nvariants: {a: ''}\nsedes: [2]\n")
    status, _, err = fedlora("study", path)
    assert status == 2 and "sedes" in err
    assert StudyConfig(name="x", config="y", seeds=[1], variants={"a": ""}).overrides == ""
