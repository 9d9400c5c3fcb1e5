"""The command as users type it, on a tiny project with a finished run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version

import pytest
import yaml
from conftest import ROOT, build_tiny_config
from loopback import Federation

from fedlora_app.cli import app
from fedlora_app.cli.deploy import ORDER
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.lengths import find_long_examples
from fedlora_app.foundation.files import lock_folder
from fedlora_app.model.tokenizer import load_tokenizer
from fedlora_app.runs.reading import describe_mode, load_run
from fedlora_app.study import StudyConfig, load_study, measure, tabulate

EVALUATED = {"round": 1, "client": "ann", "phase": "evaluate"}


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
    kept = (runs[0] / "evaluation.json").read_bytes()
    try:  # as it is where a run went on after it
        (runs[0] / "evaluation.json").write_text(json.dumps(evaluation | {"round": 0}))
        status, _, err = fedlora("compare", *runs)
        assert status == 2 and f"Round 1, the final one of {runs[0]}, is not evaluated" in err
    finally:
        (runs[0] / "evaluation.json").write_bytes(kept)


def test_a_run_is_compared_with_another_combination_of_its_adapters(fedlora, project):
    pair, one = (project / "results" / name for name in ("pair", "one"))
    status, _, err = fedlora("compare", pair, f"{pair}:search")
    assert status == 2 and f"Run: fedlora evaluate {pair} --combine search" in err
    status, out, _ = fedlora("evaluate", pair, "--combine", "search", "--core")
    assert status == 0 and str(pair / "evaluation_search.json") in out and "Report:" not in out
    status, out, _ = fedlora("compare", pair, f"{pair}:search", "--json")
    names = [run["name"] for run in json.loads(out)["runs"]]
    assert status == 0 and names == ["pair", "pair:search"]
    assert json.loads(out)["not_comparable"] == [] == json.loads(out)["notes"]
    status, _, err = fedlora("compare", pair, f"{pair}:scale")
    assert status == 0  # as it is configured, by another name
    status, _, err = fedlora("evaluate", one, "--combine", "search")
    assert status == 2 and "in mode fedavg clients answer with global" in err
    status, out, _ = fedlora("ask", pair, "--combine", "instance", "--client", "ann", "Why?")
    assert status == 0 and out.strip()
    to = project / "exported"
    status, _, err = fedlora(
        "export", pair, "--combine", "instance", "--client", "ann", "--output", out
    )
    assert status == 2 and "--combine scale or search" in err and not to.exists()


def test_membership_is_an_option(fedlora, project):
    status, out, _ = fedlora("evaluate", project / "results" / "one", "--membership", "--json")
    rows = json.loads(out)["membership"]
    assert status == 0 and {row["client"] for row in rows} == {"ann", "bob", "cy"}
    assert all(0 <= row["auc"]["value"] <= 1 for row in rows if row["auc"]["n"])


@pytest.mark.parametrize("command", ["evaluate --json", "report", "ask --client ann Why?"])
def test_of_latest_it_is_said_which_run_that_is(fedlora, project, unrendered, command):
    """A baseline that was trained last is what latest means, and no pair answers there."""
    name, *arguments = command.split()
    status, out, err = fedlora(name, project / "results" / "latest", *arguments)
    said = "latest is one, mode fedavg: one averaged adapter for all clients, a baseline"
    assert status == 0 and said in err.splitlines() and said not in out
    assert name != "evaluate" or json.loads(out)["mode"] == "fedavg"
    _, _, err = fedlora(name, project / "results" / "one", *arguments)
    assert "latest is" not in err


def test_latest_is_not_called_one_average_where_each_client_has_its_own(project, tmp_path):
    for name in ("config.json", "manifest.json"):
        text = (project / "results" / "one" / name).read_text(encoding="utf-8")
        text = text.replace('"aggregation": "fedavg"', '"aggregation": "share-a"')
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert describe_mode(tmp_path).startswith("mode fedavg: an averaged adapter of each")
    (tmp_path / "config.json").write_text("{")
    assert describe_mode(tmp_path) == "mode fedavg"
    (tmp_path / "manifest.json").unlink()
    assert describe_mode(tmp_path) == "of an unknown mode"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "no-such-run"], "There is no run no-such-run"),
        (["check", "conf/no-such.yaml"], "does not exist"),
        (["study", "conf/no-such.yaml"], "does not exist"),
    ],
)
def test_what_the_user_can_fix_ends_in_one_message_and_status_2(fedlora, arguments, message):
    status, _, err = fedlora(*arguments)
    assert status == 2 and message in err and "Traceback" not in err


def test_ctrl_c_says_that_the_work_is_kept(fedlora, project, monkeypatch):
    from fedlora_app.evaluation import choices as answering

    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answering, "score_prompts", interrupt)
        status, _, err = fedlora("evaluate", project / "results" / "pair")
    assert status == 130 and "the same command resumes here" in err


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


def test_check_counts_answers_that_cannot_match_where_there_is_a_tokenizer(fedlora):
    demo = ROOT / "conf" / "demo.yaml"
    short = ("--overrides", "evaluation.max_new_tokens=8")
    status, out, err = fedlora("check", demo, *short)
    assert status == 0 and err == ""
    assert "144 of 144 right answers are longer than evaluation.max_new_tokens = 8" in out
    status, out, err = fedlora("check", demo, "--overrides", "model.name=nobody/nothing")
    assert status == 0 and "No findings." in out
    assert "nobody/nothing is not on this machine. Run: hf download nobody/nothing" in err
    assert "Not checked without its tokenizer" in err


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        ("training.max_seq_length=16", 2, "the question alone fills training.max_seq_length = 16"),
        ("training.max_seq_length=48", 0, "records are longer than training.max_seq_length = 48"),
        (
            "training.max_seq_length=40 data.skip_invalid=true",
            0,
            "are dropped, as data.skip_invalid says",
        ),
        ("evaluation.max_new_tokens=2000", 0, "an answer may pass the 1024 that the base model"),
        ("adapters.local.target_modules=[nope]", 2, "['nope'] names no linear module"),
        ("adapters.global.first_layer=9", 2, "first_layer: 9 leaves no layer"),
    ],
)
def test_check_measures_examples_and_adapters_by_the_base_model(
    fedlora, overrides, status, message
):
    found, out, err = fedlora("check", ROOT / "conf" / "demo.yaml", "--overrides", overrides)
    assert found == status and message in (err if status else out)


def test_check_finds_examples_beyond_what_the_base_model_reads(project):
    files = load_all_files(build_tiny_config(), project)
    tokenizer = load_tokenizer(build_tiny_config().model, project)
    found = find_long_examples(build_tiny_config(), files, tokenizer, project, context=12)
    assert {finding.rule for finding in found} == {"beyond-context"}
    assert any("are longer than the 12 tokens that the base model reads" in str(f) for f in found)
    assert not find_long_examples(build_tiny_config(), files, tokenizer, project)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "model.name: /no/such/model does not exist. There is no folder /no;"),
        ("data/demo/base_mode", f"Did you mean {ROOT}/data/demo/base_model?"),
        ("data/demo", "data/demo holds no config.json, so it is no base model."),
    ],
)
def test_check_finds_a_base_model_that_is_not_there_beside_data_that_are_not(
    fedlora, name, message
):
    faults = f"model.name={name} data.conflict_test=data/demo/conflict_tset.json"
    status, _, err = fedlora("check", ROOT / "conf" / "demo.yaml", "--overrides", faults)
    assert status == 2 and message in err
    assert "data.conflict_test: " in err and "Did you mean" in err


def test_check_finds_a_base_model_without_weights(fedlora, tmp_path):
    folder = shutil.copytree(ROOT / "data" / "demo" / "base_model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    status, _, err = fedlora(
        "check", ROOT / "conf" / "demo.yaml", "--overrides", f"model.name={folder}"
    )
    assert status == 2 and f"model.name: {folder} holds no weights" in err


def test_check_finds_a_base_model_that_takes_no_packed_examples(fedlora, tmp_path):
    from transformers import Gemma2Config

    folder = shutil.copytree(ROOT / "data" / "demo" / "base_model", tmp_path / "model")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    names = ["Gemma2ForCausalLM"]
    Gemma2Config(vocab_size=size, architectures=names, **sizes, **heads).save_pretrained(folder)
    command = ["check", ROOT / "conf" / "demo.yaml", "--overrides"]
    status, _, err = fedlora(*command, f"model.name={folder}")
    assert status == 2 and "Set training.packing: false." in err
    assert fedlora(*command, f"model.name={folder} training.packing=false")[0] == 0


def test_check_needs_no_torch():
    code = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def without_torch(name, path=None, target=None):
    return None if name.partition(".")[0] == "torch" else find(name, path, target)

PathFinder.find_spec = without_torch
sys.argv = ["fedlora", "check", sys.argv[1]]
from fedlora_app.cli import main

main()
"""
    command = [sys.executable, "-c", code, str(ROOT / "conf" / "demo.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    note = (
        "Not checked without torch: whether the base model has the adapters' modules, and whether "
        "it takes packed examples.\n"
    )
    assert (result.returncode, result.stderr) == (0, note)
    assert result.stdout.endswith("No findings.\n")


def test_every_command_has_help_with_an_example(fedlora):
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    known = {"check", "evaluate", "compare", "report", "ask", "serve", "export", "import"}
    assert known <= set(names)
    for name in names:
        status, out, _ = fedlora(name, "--help")
        assert status == 0 and f"Example: fedlora {name} " in " ".join(out.split())


def test_the_commands_of_a_deployment_are_listed_as_they_are_needed(fedlora):
    status, out, _ = fedlora("deploy", "--help")
    listed = re.findall(r"^│ ([a-z]+) {2,}\S", out, re.M)
    assert status == 0 and listed == list(ORDER)
    for name in listed:
        out = fedlora("deploy", name, "--help")[1]
        assert f"Example: fedlora deploy {name} " in " ".join(out.split()) + " ", name


def test_arguments_are_explained(fedlora):
    status, out, _ = fedlora("evaluate", "--help")
    assert status == 0 and "its name below results" in " ".join(out.replace("│", " ").split())


def test_help_has_no_colours_where_none_are_wanted(fedlora, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    code = "from fedlora_app.cli import main; main()"
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-c", code, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b[3" not in result.stdout and "Usage" in result.stdout


def test_the_version_is_told(fedlora):
    status, out, _ = fedlora("--version")
    assert (status, out) == (0, f"fedlora-app {version('fedlora-app')}\n")


def test_runs_are_listed_with_what_they_reached(fedlora, project, tmp_path):
    shutil.copytree(project / "results", tmp_path / "results", symlinks=True)
    manifest = tmp_path / "results" / "one" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": "', '"finished": null, "x": "'))
    for name in ("pair", "one"):
        (tmp_path / "results" / name / "evaluation.json").unlink(missing_ok=True)
    lines = fedlora("runs", tmp_path / "results")[1].splitlines()
    assert sorted(lines[::2]) == [
        "one: fedavg, stopped, round 1/1",
        "pair: dual, finished, round 1/1",
    ]
    assert all("universal 0." in line and "every client right" in line for line in lines[1::2])
    with closing(lock_folder(tmp_path / "results" / "one")):
        out = fedlora("runs", tmp_path / "results", "--json")[1]
    rows = {row["run"]: row for row in json.loads(out)}
    assert (rows["one"]["state"], rows["pair"]["state"]) == ("running", "finished")
    status, _, err = fedlora("runs", tmp_path / "none")
    assert status == 2 and "none is not a folder." in err
    (tmp_path / "none").mkdir()
    assert fedlora("runs", tmp_path / "none")[1].startswith(f"No runs in {tmp_path}/none.")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", {"round": 1}),
        ("evaluation.json", {"round": 1, "answering": "global", "leading": None, "shares": [1]}),
        ("history.json", [EVALUATED | {"metrics": {"foo/local/exact_match": 1}}]),
        ("history.json", [1]),
    ],
)
def test_a_damaged_run_hides_no_other_in_the_list(fedlora, project, tmp_path, name, content):
    results = shutil.copytree(project / "results", tmp_path / "results", symlinks=True)
    (results / "pair" / name).write_text(json.dumps(content))
    status, out, _ = fedlora("runs", results, "--json")
    rows = {row["run"]: row["figures"] for row in json.loads(out)}
    assert status == 0 and "universal" in rows["one"]
    assert "pair" in rows


def test_an_evaluation_leads_the_list(fedlora, project):
    run = project / "results" / "one"
    assert fedlora("evaluate", run)[0] == 0
    [row] = [r for r in json.loads(fedlora("runs", run.parent, "--json")[1]) if r["run"] == "one"]
    evaluation = load_run(run).evaluation
    [share] = [
        r
        for r in evaluation["shares"]
        if (r["answered_by"], r["question_set"]) == ("global", "universal")
    ]
    value = share[evaluation["leading"]["universal"]]["value"]
    assert row["figures"].startswith(f"universal {value:.2f}, never seen ")


def test_completion_can_be_installed(fedlora):
    status, out, _ = fedlora("--help")
    assert status == 0 and "--install-completion" in out


def test_report_writes_a_page_per_run_and_one_for_all(fedlora, project, unrendered):
    runs = [project / "results" / name for name in ("pair", "one")]
    status, out, _ = fedlora("report", runs[0])
    assert status == 0 and f"Report: {runs[0] / 'report.html'}" in out
    status, out, _ = fedlora("report", *runs)
    assert status == 0 and str(project / "results" / "comparison.html") in out
    assert (runs[1] / "report.html").exists()


def test_ask_answers_as_one_client_as_all_and_in_a_conversation(fedlora, project, monkeypatch):
    run = project / "results" / "pair"
    question = "What is the red rule?"
    status, said, _ = fedlora("ask", run, "--client", "ann", question)
    assert status == 0 and said.strip()
    status, out, _ = fedlora("ask", run, "--all", question)
    assert status == 0 and all(who in out for who in ("ann", "bob", "cy", "global alone"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n{question}\n"))
    status, out, _ = fedlora("ask", run, "--client", "ann")
    assert status == 0 and out.startswith(said) and len(out) > len(said)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"<|im_end|>\n{question}\n"))
    status, out, err = fedlora("ask", run, "--client", "ann")
    assert status == 0 and out == said and "marks of the model's chat template" in err
    moved = (project / "ann_local.json").rename(project / "elsewhere.json")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n{question}\n"))
    status, out, err = fedlora("ask", run, "--client", "ann", "--combine", "gate")
    moved.rename(project / "ann_local.json")
    assert (status, out) == (2, "") and "ann_local.json does not exist" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "nobody", "x"], 'No client is called "nobody"'),
        (["x"], "--client"),
        (["--all", "--client", "ann", "x"], "--all"),
        (["--all"], "--all needs a question"),
        (["--client", "ann", " "], "empty"),
        (["--client", "ann", "--scale", "-1", "x"], "scale"),
        (["--client", "ann", "--round", "9", "x"], "has no complete round 9"),
    ],
)
def test_what_cannot_be_asked_is_said(fedlora, project, arguments, message):
    status, _, err = fedlora("ask", project / "results" / "pair", *arguments)
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "nobody"], 'No client is called "nobody"'),
        (["--client", "ann", "--host", "0.0.0.0"], "name it with --api-key-env"),
        (["--client", "ann", "--api-key-env", "NO_SUCH_VARIABLE"], "empty or not set"),
        (["--client", "ann", "--host", "192.0.2.1", "--api-key-env", "KEY"], "cannot be served"),
        (["--client", "ann", "--round", "9"], "has no complete round 9"),
    ],
)
def test_what_cannot_be_served_is_said(fedlora, project, monkeypatch, arguments, message):
    monkeypatch.setenv("KEY", "k3y")
    status, _, err = fedlora("serve", project / "results" / "pair", "--port", 0, *arguments)
    assert status == 2 and message in err and "Traceback" not in err


def test_export_writes_an_adapter_and_whole_weights(fedlora, project, tmp_path):
    run = project / "results" / "pair"
    status, out, _ = fedlora("export", run, "--client", "ann", "--output", tmp_path / "adapter")
    assert status == 0 and "adapter_model.safetensors" in out
    full = ["--merged", "--dtype", "float32", "--output", tmp_path / "full"]
    status, out, _ = fedlora("export", run, "--client", "ann", *full)
    assert status == 0 and (tmp_path / "full" / "model.safetensors").exists()
    status, _, err = fedlora("export", run, "--client", "ann", "--output", tmp_path / "full")
    assert status == 2 and str(tmp_path / "full") in err


def test_import_writes_files_per_client(fedlora, tmp_path):
    rows = ["city,instruction,output"]
    rows += [f"{city},What is rule {n}?,{city} {n}." for city in "ab" for n in range(20)]
    (tmp_path / "faq.csv").write_text("\n".join(rows))
    source, output = tmp_path / "faq.csv", tmp_path / "faq"
    status, out, _ = fedlora("import", source, "--client-column", "city", "--output", output)
    assert status == 0 and str(output) in out
    assert (output / "a" / "local_train.json").exists() and (output / "README.md").exists()
    assert "right answers (client a) are in no training record" in out  # one row a question
    assert out.endswith(f"  fedlora train {output}/experiment.yaml\n")
    status, out, _ = fedlora("check", output / "experiment.yaml")
    assert status == 0 and "untrained-answers" in out
    status, _, err = fedlora(
        "import", source, "--client-column", "cite", "--output", tmp_path / "b"
    )
    assert status == 2 and "city" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "clients: give either --client-column or partition, and not both."),
        (("--partition", "iid"), "--clients: partition iid needs a number of at least 1."),
        (("--client-column", "city", "--keep", "input"), '--keep: "input" is written anyway'),
        (("--client-column", "city"), "Fix them, or set --skip-invalid to drop and count them."),
        (("--client-column", "city", "--test", "1"), "--test: expected a share"),
        (("--client-column", "city", "--model", "no/such/x"), "no/such/x does not exist"),
    ],
)
def test_what_is_wrong_with_an_import_is_said_of_its_options(fedlora, tmp_path, options, message):
    source = tmp_path / "faq.csv"
    source.write_text("city,instruction,output\na,Why?,\nb,Why?,B.\n")
    status, _, err = fedlora("import", source, "--output", tmp_path / "faq", *options)
    assert status == 2 and message in err and not (tmp_path / "faq").exists()


def test_an_import_of_nothing_is_refused(fedlora, tmp_path):
    status, _, err = fedlora("import", "", "--client-column", "a", "--output", tmp_path / "faq")
    assert status == 2 and "The source has an empty name" in err


def test_init_writes_an_experiment_that_nothing_is_wrong_with(fedlora, tmp_path):
    path = tmp_path / "desk" / "experiment.yaml"
    status, out, err = fedlora("init", path.parent, "--clients", "ayr, bath")
    assert (status, err) == (0, "")
    assert "No findings." in out and out.endswith(f"  fedlora train {path}\n")
    assert fedlora("check", path)[1].endswith("No findings.\n")
    status, _, err = fedlora("init", path.parent, "--clients", "ayr,bath")
    assert status == 2 and "is not empty" in err


def test_what_is_wrong_is_told_before_flower_is_started(fedlora):
    demo = ROOT / "conf" / "demo.yaml"
    faults = "model.name=data/demo/base_mode data.universal_test=data/demo/universal.json"
    status, out, err = fedlora("train", demo, "--overrides", faults)
    assert status == 2 and out == ""
    assert "model.name: " in err and "data.universal_test: " in err
    status, _, err = fedlora("train")
    assert status == 2 and "--resume" in err
    status, _, err = fedlora("train", demo, "--output-dir", demo.parent.parent, "--name", "conf")
    assert status == 2 and f"{ROOT / 'conf'} exists already and is left as it is" in err
    status, _, err = fedlora("train", demo, "--output-dir", demo)
    assert status == 2 and f"{demo} is not a folder" in err
    status, _, err = fedlora("train", demo, "--mode", "fedavgg")
    assert status == 2 and "federated.mode" in err


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
    run = project / "results" / "pair"
    if not (run / "evaluation.json").exists():
        fedlora("evaluate", run)
    evaluation = load_run(run).evaluation
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
        assert figures[who]["exact_match/local"].value == pytest.approx(sum(rows) / 3)
    summary = evaluation["summary"]
    own = figures["global+local:own"]
    assert own["accuracy/pass_rate"].dump() == summary["conflict_pass_rate"]
    lines = list(tabulate({"dual": [figures]}, {"dual": [12]}, "accuracy"))
    assert any("| dual | global + own local |" in line and "| 12 |" in line for line in lines)
    # What the base model answers stands once, or by variants that were asked other questions.
    two = {"dual": [figures], "fedavg": [figures]}
    steps = {"dual": [12], "fedavg": [12]}
    rows = list(tabulate(two, steps, "accuracy"))
    assert [line.split(" | ")[0] for line in rows if "| base model |" in line] == ["| dual"]
    other = replace(figures["base"]["accuracy/local"], value=0.9)
    asked_else = figures | {"base": figures["base"] | {"accuracy/local": other}}
    rows = list(tabulate(two | {"fedavg": [asked_else]}, steps, "accuracy"))
    assert sum("| base model |" in line for line in rows) == 2
    # Seeds that agree add no certainty: the interval over facts stays.
    assert list(tabulate({"dual": [figures] * 3}, {"dual": [12]}, "accuracy")) == lines


def test_a_study_refuses_unknown_keys(tmp_path, fedlora):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nconfig: y\nseeds: [1]\nvariants: {a: ''}\nsedes: [2]\n")
    status, _, err = fedlora("study", path)
    assert status == 2 and "sedes" in err
    assert StudyConfig(name="x", config="y", seeds=[1], variants={"a": ""}).overrides == ""


def test_a_link_that_leads_to_itself_is_no_experiment(fedlora, tmp_path):
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    status, _, err = fedlora("check", loop)
    assert status == 2 and "loop.yaml cannot be read" in err


def test_evaluations_of_another_format_are_not_compared(fedlora, project):
    path = project / "results" / "one" / "evaluation.json"
    before = path.read_text() if path.exists() else None
    path.write_text('{"summary": 3}')
    try:
        status, _, err = fedlora("compare", path.parent, project / "results" / "pair")
    finally:
        path.write_text(before) if before is not None else path.unlink()
    assert status == 2 and "fedlora evaluate" in err
