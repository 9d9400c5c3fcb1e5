"""Where the project lies on this machine: what relative paths are relative to.

Flower unpacks the app elsewhere and runs it in the working directory of whoever started
its daemon first, so the root is looked for in named places and never guessed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tomllib
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote, urlparse

from fedlora_app.foundation.errors import UserError

PACKAGE_DIR = Path(__file__).resolve().parents[1]
PROJECT_NAME = "fedlora-app"
ROOT_VARIABLE = "FEDLORA_PROJECT_DIR"


class ProjectNotFoundError(UserError):
    """No checkout of the project was found in any of the places searched."""


def find_project_root(config_path: str = "", project_dir: str = "") -> Path:
    """Return the checkout's root folder.

    Args:
        config_path: the run's ``config``; an absolute one inside a checkout decides.
        project_dir: a folder given by the node's configuration (``project-dir``).

    Raises:
        ProjectNotFoundError: the given ``project_dir`` is not a checkout, or none was found; the
            message lists every place searched.
    """
    if project_dir:
        if is_checkout(Path(project_dir)):
            return Path(project_dir).resolve()
        raise ProjectNotFoundError(
            f"project-dir of the node configuration is {project_dir}, which is not a checkout of "
            f"{PROJECT_NAME}: it has no pyproject.toml of that name."
        )
    candidates: list[tuple[str, Path | None]] = [
        ("the folder of an absolute config path", _enclosing_checkout(config_path)),
        ("the checkout that the bundle was made from", _noted_checkout()),
        (f"the environment variable {ROOT_VARIABLE}", _path_or_none(os.getenv(ROOT_VARIABLE))),
        ("the folder of the running package", PACKAGE_DIR.parent),
        ("the working directory", Path.cwd()),
        ("the editable installation", _editable_installation()),
    ]
    for _, folder in candidates:
        if folder is not None and is_checkout(folder):
            return folder.resolve()
    searched = "\n".join(f"  {origin}: {folder or 'not given'}" for origin, folder in candidates)
    raise ProjectNotFoundError(
        f"No checkout of {PROJECT_NAME} was found. Searched:\n{searched}\n"
        f'Install it with "pip install -e ." in its folder, or name that folder: '
        f"--run-config \"config='/path/to/{PROJECT_NAME}/conf/demo.yaml'\" "
        f"(on a SuperNode: --node-config 'project-dir=\"/path/to/{PROJECT_NAME}\"')."
    )


def describe_other_checkout(folder: Path) -> str | None:
    """Return what to know in a folder of another checkout than the one whose code runs here."""
    around = next((f for f in (folder, *folder.parents) if is_checkout(f)), None)
    ours = PACKAGE_DIR.parent
    if around is None or around.resolve() == ours or not is_checkout(ours):
        return None
    return (
        f"Note: this is the code of {ours}, and names of runs mean those in its "
        f"results. For the checkout in {around}, install that one: pip install -e {around}"
    )


def is_checkout(folder: Path) -> bool:
    """Return whether ``folder`` is this project's, and not a bundle that Flower unpacked."""
    if is_unpacked_bundle(folder):
        return False
    try:
        pyproject = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return pyproject.get("project", {}).get("name") == PROJECT_NAME


def is_unpacked_bundle(folder: Path) -> bool:
    """Return whether ``folder`` lies where Flower unpacks apps."""
    flower_home = Path(os.getenv("FLWR_HOME") or Path.home() / ".flwr")
    return folder.resolve().is_relative_to((flower_home / "apps").resolve())


@cache
def hash_package() -> str:
    """Return the sha256 of the sources as this process first saw them, to tell versions apart."""
    paths = sorted(PACKAGE_DIR.rglob("*.py"))
    return _hash_sources((path.relative_to(PACKAGE_DIR), path.read_bytes()) for path in paths)


def hash_bundled_package(content: bytes) -> str:
    """Return what ``hash_package`` would, of the package in an app bundle, which is not unpacked.

    Raises:
        zipfile.BadZipFile: it is no bundle, or a member is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        members = [
            (PurePosixPath(member.filename).relative_to(PACKAGE_DIR.name), member)
            for member in bundle.infolist()
            if member.filename.startswith(f"{PACKAGE_DIR.name}/")
            and member.filename.endswith(".py")
        ]
        members.sort(key=lambda member: member[0])
        return _hash_sources((path, bundle.read(member)) for path, member in members)


def _hash_sources(sources: Iterable[tuple[PurePath, bytes]]) -> str:
    """Return the sha256 of files in the order of their paths in the package."""
    digest = hashlib.sha256()
    for path, content in sources:
        digest.update(path.as_posix().encode() + b"\0")
        digest.update(content + b"\0")
    return digest.hexdigest()


def _path_or_none(value: str | None) -> Path | None:
    return Path(value) if value else None


def _enclosing_checkout(config_path: str) -> Path | None:
    path = Path(config_path)
    if not path.is_absolute():
        return None
    return next((parent for parent in path.parents if is_checkout(parent)), None)


def _noted_checkout() -> Path | None:
    """Read the note that ``build_hook`` left beside the package."""
    try:
        note = json.loads((PACKAGE_DIR / "checkout.json").read_text(encoding="utf-8"))
        return Path(note["root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _editable_installation() -> Path | None:
    try:
        note = Distribution.from_name(PROJECT_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    url = json.loads(note or "{}").get("url", "")
    return Path(unquote(urlparse(url).path)) if url.startswith("file:") else None
