"""A 4-bit base model as it is in memory, kept on disk so that the next start only reads it.

A copy is whole or absent, and its bytes are known to be those that were written. Nothing but this
project writes to the folder, and whatever is there may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from fedlora_app.foundation.files import (
    lock_folder,
    make_private_dir,
    remove_partials,
    replace_folder,
    write_json,
)
from fedlora_app.model.kept_hashes import find_cache_dir, hash_files

CONTENTS_FILE = "contents.json"
SHARD_SIZE = "1GB"
"""A shard passes through host memory as a whole; several are hashed at once."""
SPARE_DISK_BYTES = 1 << 30
"""What writing a copy leaves free for the run itself."""


@dataclass(frozen=True)
class QuantisedCopy:
    """The place of one copy, which need not be there."""

    folder: Path

    @classmethod
    def of(cls, about: dict[str, Any]) -> QuantisedCopy:
        """Return the copy of what ``about`` describes in full; anything else has another place."""
        text = json.dumps(about, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(find_cache_dir() / "quantised" / key)

    def load(self, **kwargs: Any) -> PreTrainedModel | None:
        """Return the model, or None if there is no copy; a damaged one is named and removed.

        Args:
            kwargs: for ``from_pretrained``, but for the quantisation, which the copy knows.
        """
        if not os.path.isdir(self.folder):  # unlike Path's, False for what may not be looked at
            return None
        fault = self._find_fault()
        if fault is not None:
            _say(f"The quantised base model in {self.folder} is rebuilt: {fault}.")
            self._remove()
            return None
        _say(f"Reading the quantised base model in {self.folder}.")
        try:
            return self._read(**kwargs)
        except Exception as error:  # transformers raises almost anything; so does a full GPU
            # It stays, because writing it again would give the same bytes.
            _say(
                f"Note: the quantised base model in {self.folder} cannot be used: "
                f"{_first_line(error)}. It is quantised again; if that repeats, set "
                "model.cache_quantized: false."
            )
            return None

    def save(self, model: PreTrainedModel) -> None:
        """Write the copy, or print why there is none; a failure never ends a run."""
        try:
            reason = self._write(model)
        except Exception as error:  # a full disk, a folder that cannot be written, and the like
            reason = _first_line(error)
        if reason is not None:
            _say(
                f"Note: no copy of the quantised base model was left in {self.folder}: {reason}. "
                "The next start quantises it again."
            )

    def _write(self, model: PreTrainedModel) -> str | None:
        """Write the copy; return the reason if that is impossible."""
        parent = self.folder.parent
        make_private_dir(parent)
        lock = lock_folder(parent)
        if lock is None:
            return "another process is writing there"
        with lock:
            if self.folder.exists():  # written by another process in the meantime
                return None
            remove_partials(parent)  # nobody else is writing
            size = sum(tensor.nbytes for tensor in model.state_dict().values())
            free = shutil.disk_usage(parent).free - SPARE_DISK_BYTES
            if size > free:
                return f"it needs {_gigabytes(size)} and the disk has {_gigabytes(max(free, 0))}"
            with replace_folder(self.folder) as partial:
                partial.chmod(0o700)
                _save_pretrained(model, partial)
                for path in partial.iterdir():
                    path.chmod(0o600)
                write_json(partial / CONTENTS_FILE, _hash_all(partial.iterdir(), keep=False))
        _say(
            f"The quantised base model was kept in {self.folder} ({_gigabytes(size)}) for the next "
            "start. It may be deleted."
        )
        return None

    def _read(self, **kwargs: Any) -> PreTrainedModel:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(self.folder),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
        if any(found.values()):  # else transformers fills what is missing with random numbers
            raise ValueError("its tensors are not the model's")
        return model

    def _find_fault(self) -> str | None:
        """Return how the folder differs from what was written.

        Every byte is hashed once per machine, and again where a file is not as it was then.
        """
        try:
            expected = json.loads((self.folder / CONTENTS_FILE).read_text(encoding="utf-8"))
            paths = [path for path in self.folder.iterdir() if path.name != CONTENTS_FILE]
            if not isinstance(expected, dict) or {path.name for path in paths} != set(expected):
                return "files are missing or too many"
            found = _hash_all(paths)
        except (OSError, ValueError, RecursionError) as error:
            return _first_line(error)
        changed = sorted(name for name in expected if expected[name] != found[name])
        return f"{changed[0]} is not what was written" if changed else None

    def _remove(self) -> None:
        try:
            lock = lock_folder(self.folder.parent)
            if lock is not None:
                with lock:
                    shutil.rmtree(self.folder)
        except OSError as error:
            _say(f"Note: {self.folder} could not be removed: {error}.")


def _save_pretrained(model: PreTrainedModel, folder: Path) -> None:
    """Write the model tensor by tensor; a GPU holds no second copy."""
    before = dict(vars(model.config))
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    vars(model.config).update(before)  # saving turns its dtype into text


def _hash_all(paths: Iterable[Path], *, keep: bool = True) -> dict[str, str]:
    paths = sorted(paths)
    return dict(zip((path.name for path in paths), hash_files(paths, keep=keep), strict=True))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _first_line(error: Exception) -> str:
    lines = (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # a command's answer is on the other stream
