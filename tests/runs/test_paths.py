from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

from fedlora_app.runs.paths import RunDirectoryError, RunPaths, find_run, list_rounds


def test_no_other_module_knows_a_name_in_a_run_directory():
    files = {path.name for path in vars(RunPaths(Path("run"))).values() if path.suffix}
    names = files - {"config.json"}  # base models have one, too
    assert {"manifest.json", "history.csv", "metrics.jsonl", "evaluation.json"} <= names
    for path in (ROOT / "fedlora_app").rglob("*.py"):
        if path != ROOT / "fedlora_app" / "runs" / "paths.py":
            texts = [n.value for n in ast.walk(ast.parse(path.read_text())) if is_text(n)]
            assert not names & set(texts) and "round_" not in texts, path


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_rounds_are_listed_by_number_and_other_folders_left_out(tmp_path):
    paths = RunPaths(tmp_path)
    for number in (1000, 2, 10):
        paths.local_adapter("ann", number).mkdir(parents=True)
    paths.received_global("ann").mkdir()
    (paths.client("ann") / "round_new").mkdir()
    assert list(list_rounds(paths.client("ann"))) == [2, 10, 1000]
    assert list_rounds(paths.client("ann"))[2] == paths.local_adapter("ann", 2)
    assert list_rounds(paths.client("bob")) == {}


def test_a_run_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    for name in ("one", "study/two"):
        paths = RunPaths(tmp_path / "results" / name)
        paths.folder.mkdir(parents=True)
        paths.manifest.write_text("{}")
    assert find_run("study/two", tmp_path) == tmp_path / "results" / "study" / "two"
    with pytest.raises(RunDirectoryError, match="There is no run three") as caught:
        find_run("three", tmp_path)
    assert set(str(caught.value).split()[-2:]) == {"one", "study/two"}
