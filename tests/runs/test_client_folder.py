from __future__ import annotations

import pytest

from fedlora_app.config.schema import LOCAL
from fedlora_app.runs.client_folder import ClientFolder
from fedlora_app.runs.paths import RunDirectoryError, RunPaths


def test_old_rounds_go_and_what_was_received_goes_last(tmp_path):
    paths = RunPaths(tmp_path)
    folder = ClientFolder(paths, "ann", "model")
    for number in range(4):
        paths.local_adapter("ann", number).mkdir(parents=True)
    paths.received_global("ann").mkdir()
    folder.thin({LOCAL: 2})
    kept = {"round_002", "round_003"}
    assert {path.name for path in folder.path.iterdir()} == kept | {"received"}
    folder.remove_global()
    assert {path.name for path in folder.path.iterdir()} == kept


def test_a_client_that_keeps_nothing_leaves_no_empty_folder(tmp_path):
    folder = ClientFolder(RunPaths(tmp_path), "ann", "model")
    folder.enter_run("one")
    folder.paths.received_global("ann").mkdir(parents=True)
    folder.remove_global()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_of_the_run_that_began_it(tmp_path):
    paths = RunPaths(tmp_path)
    folder = ClientFolder(paths, "ann", "model")
    folder.require_run("one")
    folder.enter_run("one")
    folder.enter_run("one")
    paths.local_adapter("ann", 1).mkdir()
    for other in ("another", ""):
        with pytest.raises(RunDirectoryError, match="is of another run of this name"):
            folder.enter_run(other)
    paths.run_id("ann").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged.*Restore it"):
        folder.require_run("one")


def test_a_folder_of_a_version_that_noted_no_run_is_of_such_a_run_only(tmp_path):
    paths = RunPaths(tmp_path)
    folder = ClientFolder(paths, "ann", "model")
    paths.final_local("ann").mkdir(parents=True)
    folder.enter_run("")
    assert not paths.client("ann").exists()
    with pytest.raises(RunDirectoryError, match="does not say of which run it is"):
        folder.enter_run("one")


def test_a_run_that_left_nothing_but_its_name_blocks_no_other(tmp_path):
    """Its model could not be loaded, or it was killed while it wrote the name."""
    paths = RunPaths(tmp_path)
    folder = ClientFolder(paths, "ann", "model")
    folder.enter_run("one")
    (folder.path / ".run.json.123.partial").write_text("{")
    folder.enter_run("another")
    paths.local_adapter("ann", 0).mkdir()
    folder.require_run("another")
    with pytest.raises(RunDirectoryError, match="is of another run of this name"):
        folder.require_run("one")
