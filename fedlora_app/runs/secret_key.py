"""The secret that noise is drawn from: where it is added, and nowhere else.

Made when noise is added for the first time, readable by its owner only, in no message and no log.
Whoever has it can take the noise away again. A run that resumes needs it to go on to the byte; once
nothing more is to be made of the run, it can be deleted.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from fedlora_app.config.privacy import has_noise, protects_at
from fedlora_app.config.schema import Config
from fedlora_app.foundation.files import make_private_dir, write_atomically
from fedlora_app.foundation.secret_noise import KEY_BYTES
from fedlora_app.runs.paths import RunDirectoryError, RunPaths, require_within


def open_server_key(config: Config, paths: RunPaths) -> bytes | None:
    """Return the server's key of a run, None where the server adds no noise.

    It is made where the server has told nothing yet that it could belong to.
    """
    if not protects_at(config.privacy, "server") or not has_noise(config.privacy):
        return None
    read = read_key if paths.releases.exists() else read_or_make_key
    return read(paths.server_key, paths.folder)


def read_or_make_key(path: Path, run_dir: Path) -> bytes:
    """Return the key in a file, which is made where there is none.

    Raises:
        RunDirectoryError: the file holds no key, or lies outside of the run.
    """
    if path.exists():
        return read_key(path, run_dir)
    require_within(path, run_dir)
    make_private_dir(path.parent)
    key = secrets.token_bytes(KEY_BYTES)
    write_atomically(path, key)
    return key


def read_key(path: Path, run_dir: Path) -> bytes:
    """Return the key in a file.

    Raises:
        RunDirectoryError: there is none, or it lies outside of the run.
    """
    require_within(path, run_dir)
    try:
        with path.open("rb") as file:
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({error.strerror}). Expected the secret that this run's noise "
            "is drawn from. Restore it, or start a new run."
        ) from None
    if len(key) != KEY_BYTES:
        raise RunDirectoryError(
            f"{path} is damaged: expected {KEY_BYTES} bytes, the secret that this run's noise is "
            "drawn from. Restore it, or start a new run."
        )
    return key
