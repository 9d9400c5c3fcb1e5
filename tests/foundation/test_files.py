"""Files are whole or absent, also after a power failure and on a full disk."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
from full_disk import no_larger_files_than

from fedlora_app.foundation.files import (
    extend_atomically,
    extend_json_list,
    is_locked,
    lock_folder,
    new_folder,
    replace_folder,
    write_atomically,
    write_json,
)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, Path]]:
    """What was synchronised and what was renamed to, in order."""
    seen: list[tuple[str, Path]] = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename

    def note_sync(descriptor: int) -> None:
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return replace(self, target)

    def note_rename(self: Path, target: Path) -> Path:
        seen.append(("rename", target))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    monkeypatch.setattr(Path, "rename", note_rename)
    return seen


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, "text"),
        lambda path: extend_atomically(path, "text"),
        lambda path: write_json(path, [1]),
        lambda path: extend_json_list(path, [1]),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    tmp_path, calls, write, exists
):
    path = tmp_path / "file.json"
    if exists:
        path.write_text("[\n  0\n]\n")
    write(path)
    (first, synced), *rest = calls
    assert (first, synced.parent) == ("sync", tmp_path) and synced != path
    assert rest == [("rename", path), ("sync", tmp_path)]


@pytest.mark.parametrize("make", [new_folder, replace_folder])
def test_so_is_all_that_a_folder_holds(tmp_path, calls, make):
    folder = tmp_path / "folder"
    with make(folder) as partial:
        (partial / "one").write_text("1")
        (partial / "below").mkdir()
        (partial / "below" / "two").write_text("2")
        assert not calls
    renamed = calls.index(("rename", folder))
    synced = {path.relative_to(partial) for what, path in calls[:renamed] if what == "sync"}
    assert synced >= {Path("one"), Path("below/two"), Path("below"), Path(".")}
    assert calls[renamed + 1] == ("sync", tmp_path)


@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 8191])
@pytest.mark.parametrize("old", [None, "old\n"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, limit, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with no_larger_files_than(limit), pytest.raises(OSError, match="File too large") as caught:
        extend_atomically(path, "x" * 8192)
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["file.txt"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("limit", [0, 100, 4096])
@pytest.mark.parametrize("make", [new_folder, replace_folder])
def test_a_full_disk_leaves_no_part_of_a_folder(tmp_path, limit, make):
    folder = tmp_path / "folder"
    with (
        no_larger_files_than(limit),
        pytest.raises(OSError, match="File too large") as caught,
        make(folder) as partial,
        (partial / "file").open("wb", buffering=0) as file,
    ):
        for _ in range(9):
            file.write(b"x" * 512)
    assert caught.value.filename == str(folder)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_partial_folder_names_the_file_s_final_place(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(IsADirectoryError) as caught, new_folder(folder) as partial:
        (partial / "file").mkdir()
        (partial / "file").write_text("x")
    assert caught.value.filename == str(folder / "file")
    with pytest.raises(FileNotFoundError) as caught, new_folder(folder):
        (tmp_path / "elsewhere").read_text()
    assert caught.value.filename == str(tmp_path / "elsewhere")


def test_windows_is_told_where_it_works():
    code = "import sys; sys.modules['fcntl'] = None; import fedlora_app.foundation.files"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "On Windows use it within WSL2" in done.stderr.splitlines()[-1]


def test_looking_whether_a_folder_is_locked_keeps_nobody_from_locking_it(tmp_path):
    lock_folder(tmp_path).close()
    looking = (tmp_path / ".lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)  # in the midst of is_locked
    Timer(0.2, looking.close).start()
    with lock_folder(tmp_path):
        assert is_locked(tmp_path)
        assert lock_folder(tmp_path) is None  # and two cannot hold it
    assert not is_locked(tmp_path)
