from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import build_tiny_config

from fedlora_app.foundation.files import (
    make_private_dir,
    replace_folder,
    write_atomically,
    write_json,
)
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.paths import RunDirectoryError, check_run_name, default_run_name
from fedlora_app.runs.resuming import suggest_earlier


def create(path, tmp_path):
    return RunDirectory.create(path, build_tiny_config(), tmp_path, clients={})


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a\n", "~", "x" * 65])
def test_names_that_are_no_folder_names_are_refused(name):
    with pytest.raises(RunDirectoryError, match="is not a folder name"):
        check_run_name(name)


def test_the_name_of_the_link_is_taken():
    with pytest.raises(RunDirectoryError, match="name of the link"):
        check_run_name("latest")


def test_the_default_name_says_what_the_run_is():
    assert default_run_name(build_tiny_config()).startswith("tiny-dual-seed7-2")
    long = build_tiny_config(experiment={"name": "x" * 64})
    assert check_run_name(default_run_name(long)).startswith("xxx")


def test_a_round_counts_when_the_manifest_says_so(tmp_path):
    run = create(tmp_path / "run", tmp_path)
    run.add_metrics(1, "ann", "evaluate", {"base/local/n": 3, "base/conflict/each": [1, 0]})
    assert json.loads((run.path / "manifest.json").read_text())["rounds"] == []
    assert not (run.path / "history.csv").exists()
    run.complete_round(1, {"global": "abc"}, seconds=1.5)
    (entry,) = json.loads((run.path / "manifest.json").read_text())["rounds"]
    assert (entry["round"], entry["adapters"], entry["seconds"]) == (1, {"global": "abc"}, 1.5)
    table = (run.path / "history.csv").read_text()
    assert table == "round,client,phase,metric,value\n1,ann,evaluate,base/local/n,3\n"


def test_the_history_is_extended_and_never_read_again(tmp_path):
    run = create(tmp_path / "run", tmp_path)
    expected = []
    for server_round in (1, 2, 3):
        for client in ("ann", "bö"):
            metrics = {"update_norm": 0.5 * server_round, "base/conflict/exact_match_each": [1, -1]}
            run.add_metrics(server_round, client, "evaluate", metrics)
            entry = {"round": server_round, "client": client, "phase": "evaluate"}
            expected.append(entry | {"metrics": metrics})
        run.complete_round(server_round, {})
        write_json(tmp_path / "whole.json", expected)
        whole = (tmp_path / "whole.json").read_bytes()
        assert (run.path / "history.json").read_bytes() == whole
        assert run._new_history == []
    rows = (run.path / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + len(expected) and rows[-1] == "3,bö,evaluate,update_norm,1.5"
    run.rewind(build_tiny_config(), after_round=1)
    assert json.loads((run.path / "history.json").read_text()) == expected[:2]
    assert len((run.path / "history.csv").read_text().splitlines()) == 3
    run.complete_round(2, {})  # with nothing to add
    assert json.loads((run.path / "history.json").read_text()) == expected[:2]


def test_latest_follows_the_newest_run(tmp_path):
    for name in ("one", "two"):
        create(tmp_path / name, tmp_path)
        assert (tmp_path / "latest").resolve() == (tmp_path / name).resolve()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="run cannot be made: "):
        create(tmp_path / "file" / "run", tmp_path)


def test_a_folder_is_made_although_another_process_removes_its_empty_parent(tmp_path, monkeypatch):
    original, folder = Path.mkdir, tmp_path / "clients" / "ann"
    removed = []

    def remove_first(path, *args, **settings):
        if path == folder and not removed:
            removed.append(path.parent.rmdir())
        original(path, *args, **settings)

    monkeypatch.setattr(Path, "mkdir", remove_first)
    make_private_dir(folder)
    assert removed and folder.is_dir() and folder.parent.stat().st_mode & 0o077 == 0


def test_an_interrupted_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"


def test_an_interrupted_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "adapter"
    with replace_folder(folder) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(KeyError), replace_folder(folder) as partial:
        (partial / "file").write_text("new")
        raise KeyError
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_of_two_runs_at_the_same_moment_one_is_refused(tmp_path, monkeypatch):
    """Both find no folder; the one that comes second leaves the other's alone."""
    first = create(tmp_path / "run", tmp_path)
    before = (first.path / "manifest.json").read_bytes()
    absent = RunDirectory.require_absent
    checks = iter([lambda path: None, absent])
    monkeypatch.setattr(RunDirectory, "require_absent", lambda path: next(checks)(path))
    with pytest.raises(RunDirectoryError, match="exists already and is left as it is"):
        create(tmp_path / "run", tmp_path)
    assert (first.path / "manifest.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


def test_events_outlast_a_rewind_whatever_they_quote(tmp_path):
    """Line separators that JSON does not escape, and a last line cut within a character."""
    run = create(tmp_path / "run", tmp_path)
    run.log_event("failure", round=1, why="one\u2028two\x85three")
    run.log_event("failure", round=2, why="later")
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"round": 1, "why": "é'.encode()[:-1])
    run.rewind(build_tiny_config(), after_round=1)
    (event,) = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert event["why"] == "one\u2028two\x85three"


def test_the_earlier_round_that_is_suggested_is_still_kept(tmp_path):
    for number in (0, 2, 5):
        (tmp_path / "run" / "server" / f"round_{number:03d}").mkdir(parents=True)
    assert suggest_earlier(tmp_path / "run", 5).endswith("run@2')")
    assert "No earlier round is kept" in suggest_earlier(tmp_path / "run", 0)
