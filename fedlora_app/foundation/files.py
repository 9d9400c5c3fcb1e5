"""Files that are either whole or absent: written beside their place and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:
    raise ImportError(
        "fedlora-app runs on Linux and macOS. On Windows use it within WSL2 (wsl --install, then "
        "as on Linux), which is what Flower recommends for its simulations too."
    ) from None

WEIGHTS_FILE = "adapter_model.safetensors"
"""What holds the tensors in a PEFT folder."""
LOCK_FILE = ".lock"
MAKE_ATTEMPTS = 100
LOOK_ATTEMPTS, LOOK_SECONDS = 100, 0.05
"""How often a lock that others share is tried again, and how much later."""
EMPTY_LIST, LIST_END = "[]\n", "\n]\n"


def keep_files_private() -> None:
    """Have this process make files and folders that only their owner can read."""
    os.umask(0o077)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step; a crash leaves the old one."""
    extend_atomically(path, content, keep=0)


def extend_atomically(path: Path, content: str | bytes, keep: int | None = None) -> None:
    """Write text or bytes after a file's first ``keep`` bytes, or after all of them, in one step.

    The file's content passes through a copy on the disk and never through memory.
    """
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    with _naming(path):
        try:
            with open(partial, "xb", opener=_open_private) as file:
                if keep != 0 and path.exists():
                    with path.open("rb") as old:
                        shutil.copyfileobj(old, file)
                    if keep is not None:
                        file.truncate(keep)
                        file.seek(keep)
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    write_atomically(path, _dump(value))


def extend_json_list(path: Path, items: list[Any]) -> None:
    """Add to the list that ``write_json`` has written, as if the whole were written again."""
    size = path.stat().st_size if path.exists() else 0
    if size <= len(EMPTY_LIST):
        write_json(path, items)
    elif items:
        text = _dump(items).removeprefix("[")
        extend_atomically(path, "," + text, keep=size - len(LIST_END))


def make_private_dir(folder: Path) -> None:
    """Create a folder and its missing parents, each readable by its owner only."""
    for attempts_left in reversed(range(MAKE_ATTEMPTS)):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)
            return
        except FileNotFoundError:  # another process has removed a parent, which was empty
            if not attempts_left:
                raise


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` when the block succeeds."""
    with _partial_folder(folder) as partial:
        yield partial
        old = partial.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        _sync_files(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` when the block succeeds.

    Raises:
        FileExistsError: it exists by then, and is left alone.
    """
    with _partial_folder(folder) as partial:
        yield partial
        _sync_files(partial)
        try:
            partial.rename(folder)  # onto a folder that holds something it cannot
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "exists already", str(folder)) from None
            raise
        _sync_folder(folder.parent)


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _naming(folder):
            partial.mkdir(parents=True)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make disk errors name the file that was to be written, not its temporary stand-in."""
    try:
        yield
    except OSError as error:
        partial, named = str(_partial(path)), error.filename
        if error.errno is None or not (named is None or str(named).startswith(partial)):
            raise
        name = str(path) + str(named or partial).removeprefix(partial)
        raise OSError(error.errno, error.strerror or str(error), name) from error


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what killed writers have left half written in a folder.

    Args:
        name: of the file or folder that they were writing.
    """
    for path in (*folder.glob(f".{name}.*.partial"), *folder.glob(f".{name}.*.old")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> IO[str] | None:
    """Return a lock on a folder, or None if another process holds it.

    Closing it releases it, and so does the end of the process, however it comes. Who only looks
    whether a folder is locked (``is_locked``) shares the lock for a moment, which is waited for.
    """
    file = (folder / LOCK_FILE).open("a", encoding="utf-8")
    for _ in range(LOOK_ATTEMPTS):
        if _try_lock(file, fcntl.LOCK_EX):
            return file
        if not _try_lock(file, fcntl.LOCK_SH):  # so it is not shared
            break
        fcntl.flock(file, fcntl.LOCK_UN)
        time.sleep(LOOK_SECONDS)
    file.close()
    return None


def is_locked(folder: Path) -> bool:
    """Return whether another process holds the folder's lock; nothing is written."""
    try:
        with (folder / LOCK_FILE).open(encoding="utf-8") as file:
            return not _try_lock(file, fcntl.LOCK_SH)
    except OSError:  # there is none, or it may not be looked at
        return False


def _try_lock(file: IO[str], kind: int) -> bool:
    """Return whether a lock could be had at once."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hash_file(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _partial(path: Path) -> Path:
    """Return where to write first; no two processes write to the same place."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
