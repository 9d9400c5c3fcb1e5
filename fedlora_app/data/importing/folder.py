"""The folder that imported or example data are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.data.records import DataError
from fedlora_app.foundation.files import make_private_dir, replace_folder

UNSEEN_BY_GIT = {".gitignore": "# A client's data belong into no project's history.\n*\n"}


def refuse_taken(folder: Path) -> None:
    """Raise where a folder holds something, or is none.

    Raises:
        DataError: naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file. Name a new or an empty folder.")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder} is not empty. Nothing is replaced: name a new or an empty folder."
        )


def name_folder(output_dir: Path, root: Path | None) -> str:
    """Return the folder relative to the project, or its whole path if it lies elsewhere."""
    project, folder = (root or Path.cwd()).resolve(), output_dir.resolve()
    inside = folder.is_relative_to(project)
    return (folder.relative_to(project) if inside else folder).as_posix()


def write_folder(
    output_dir: Path, files: Mapping[str, Sequence[dict[str, Any]]], texts: Mapping[str, str]
) -> None:
    """Write all files at once, readable by their owner only, and out of git's sight.

    Args:
        files: records by their path in the folder.
        texts: further files by their name.
    """
    folder = output_dir.resolve()
    make_private_dir(folder.parent)
    with replace_folder(folder) as partial:
        partial.chmod(0o700)
        for path, records in files.items():
            make_private_dir((partial / path).parent)
            text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
            (partial / path).write_text(text, encoding="utf-8")
        for name, text in {**texts, **UNSEEN_BY_GIT}.items():
            (partial / name).write_text(text, encoding="utf-8")
        refuse_taken(output_dir)  # by somebody else, meanwhile
