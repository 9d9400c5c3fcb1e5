from __future__ import annotations

from fedlora_app.config.schema import LOCAL
from fedlora_app.runs.client_folder import ClientFolder
from fedlora_app.runs.paths import RunPaths


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
    folder.paths.received_global("ann").mkdir(parents=True)
    folder.remove_global()
    assert not list(tmp_path.iterdir())
