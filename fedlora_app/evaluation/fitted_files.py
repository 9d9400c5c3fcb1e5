"""What a client has fitted to its own data, on its disk: tensors, and what they were fitted to.

Two files in a folder of the client, ``NAME.safetensors`` and ``NAME.json``. Both derive from its
own records, and stay where its local adapter stays.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedlora_app.foundation.files import hash_file

MAX_ABOUT_BYTES = 1 << 20

About = Mapping[str, str | None]
"""What something was fitted to: hashes of the base model, of adapters and of the client's data."""
Tensors = dict[str, torch.Tensor]

UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError)
"""What reading damaged files raises."""


def tensors_file(name: str) -> str:
    """Return the name of the file with the tensors."""
    return f"{name}.safetensors"


def about_file(name: str) -> str:
    """Return the name of the file that says what they are."""
    return f"{name}.json"


def save_fitted(folder: Path, name: str, tensors: Tensors, content: Mapping[str, Any]) -> None:
    """Write both files into an existing folder."""
    try:
        save_file(tensors, folder / tensors_file(name))
    except SafetensorError as error:  # a full disk, for one
        raise OSError(errno.EIO, str(error), str(folder / tensors_file(name))) from error
    content = {**content, "sha256": hash_file(folder / tensors_file(name))}
    text = json.dumps(content, indent=2) + "\n"
    (folder / about_file(name)).write_text(text, encoding="utf-8")


def load_fitted(
    folder: Path, name: str, format_: int, about: About
) -> tuple[Tensors, dict[str, Any]] | None:
    """Return what was saved, or None where there is nothing of this format fitted to the same.

    What links lead to is nothing either.

    Raises:
        any of ``UNREADABLE``: the files are damaged.
    """
    paths = folder / about_file(name), folder / tensors_file(name)
    if any(path.is_symlink() for path in (folder, *paths)):
        return None
    with paths[0].open("rb") as file:
        content: dict[str, Any] = json.loads(file.read(MAX_ABOUT_BYTES))
    if content["format"] != format_ or content["fitted_to"] != dict(about):
        return None
    if content.get("sha256", found := hash_file(paths[1])) != found:  # older ones have none
        raise ValueError(f"{paths[1]} is not the file that was written.")
    return load_file(paths[1]), content
