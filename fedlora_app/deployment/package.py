"""The package that a coordinator sends to a site: all that the site needs, and nothing secret.

A zip of four members: the authority's certificate, facts for programs to compare, and drafts of the
site's two files. The same facts give the same bytes, so that two people can compare its sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from fedlora_app import __version__
from fedlora_app.config.schema import Config
from fedlora_app.deployment.drafts import draft_client_file, draft_policy
from fedlora_app.deployment.facts import Base, Facts
from fedlora_app.deployment.keys import CredentialError, fingerprint_certificate, group_digits
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import PROJECT_NAME, hash_package

FORMAT = 1
ROOT, FACTS, CLIENT, POLICY = MEMBERS = ("root.crt", "package.json", "client.yaml", "policy.yaml")
MAX_PACKAGE_BYTES = 1 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can name
UNIX = 3
SHARED = ("model", "adapters", "training")
"""Sections that say what a site's machine has to do. Nothing in them is of one client."""


class PackageError(UserError):
    """A package cannot be used; the message says why, and nothing of it was unpacked."""


@dataclass(frozen=True)
class Package:
    """A package that was read and found whole."""

    facts: Facts
    members: Mapping[str, bytes]


def build_package(
    config: Config,
    project: Path,
    *,
    client: str,
    address: str,
    participants: list[str],
    key: str,
    root: bytes,
) -> bytes:
    """Return a site's package as a zip file.

    Args:
        project: what a base model's relative folder is relative to.
        root: the authority's certificate.
    """
    plain = config.dump()
    facts = Facts(
        format=FORMAT,
        experiment=config.experiment.name,
        client=client,
        address=address,
        participants=sorted(participants),
        key=key,
        root=fingerprint_certificate(root),
        fedlora_app=__version__,
        flwr=version("flwr"),
        requirements=pin_requirements(),
        code_sha256=hash_package(),
        base=describe_base(config, project),
        settings={name: plain[name] for name in SHARED},
    )
    return write_zip(
        {
            ROOT: root,
            FACTS: (json.dumps(facts.model_dump(), indent=2, ensure_ascii=False) + "\n").encode(),
            CLIENT: draft_client_file(config, client).encode(),
            POLICY: draft_policy(config, facts.model_dump()).encode(),
        }
    )


def write_zip(members: Mapping[str, bytes]) -> bytes:
    """Return members as a zip whose bytes depend on nothing but names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # zlib's versions differ
        for name, content in sorted(members.items()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = UNIX
            info.external_attr = 0o100600 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def read_package(path: Path) -> Package:
    """Read a package as a whole, without writing anything.

    Only the members that a package has are taken, each once and as a plain file, so that none can
    lead to another place or fill the disk.

    Raises:
        PackageError: it is no package, has other members, or its parts contradict each other.
    """
    size = path.stat().st_size
    if size > MAX_PACKAGE_BYTES:
        raise PackageError(f"{path} is too large for a package: {size:,} bytes.")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
            members = {name: archive.read(name) for name in MEMBERS}
        facts = Facts.model_validate(json.loads(members[FACTS]))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, PackageError):
            raise
        raise PackageError(
            f"{path} cannot be read as a package ({type(error).__name__}). Ask the coordinator to "
            "send it again, and install the fedlora-app that the coordinator has."
        ) from None
    _check_facts(path, facts, members[ROOT])
    return Package(facts, members)


@cache
def pin_requirements() -> list[str]:
    """Return what fedlora-app needs, each at the version that is installed here."""
    try:
        needed = requires(PROJECT_NAME) or []
    except PackageNotFoundError:  # a checkout that was not installed
        return []
    pinned = set()
    for line in needed:
        try:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                extras = f"[{','.join(sorted(requirement.extras))}]" * bool(requirement.extras)
                public = version(requirement.name).split("+")[0]  # not "+cpu": GPUs differ
                pinned.add(f"{requirement.name}{extras}=={public}")
        except (InvalidRequirement, PackageNotFoundError):
            continue
    return sorted(pinned)


def fingerprint_package(path: Path) -> str:
    """Return the sha256 of a package, which two people compare: it covers all that is in it."""
    return group_digits(hashlib.sha256(path.read_bytes()).hexdigest())


def describe_base(config: Config, project: Path) -> Base:
    """Return the base model's name, and its fingerprint if its weights are on this machine."""
    from fedlora_app.model.base import compute_fingerprint  # imports torch
    from fedlora_app.model.pretrained import ModelError, has_weights

    try:
        known = has_weights(config.model, project)
        fingerprint = compute_fingerprint(config.model, project) if known else None
    except ModelError:
        fingerprint = None
    return Base(name=config.model.name, revision=config.model.revision, fingerprint=fingerprint)


def _check_members(path: Path, found: list[zipfile.ZipInfo]) -> None:
    names = sorted(info.filename for info in found)
    if names != sorted(MEMBERS):
        raise PackageError(
            f"{path} is not a package of fedlora deploy: it has {', '.join(names)[:300]} and "
            f"{', '.join(sorted(MEMBERS))} were expected, each once."
        )
    for info in found:
        kind = info.external_attr >> 28  # 8: a plain file, 0: not said, 10: a link
        if kind not in (0, 8) or info.is_dir() or info.flag_bits & 1:
            raise PackageError(f"{path}: {info.filename} is a link, a folder or encrypted.")
        if info.file_size > MAX_PACKAGE_BYTES:
            raise PackageError(f"{path}: {info.filename} is too large.")


def _check_facts(path: Path, facts: Facts, root: bytes) -> None:
    if facts.format != FORMAT:
        raise PackageError(
            f"{path} is of format {facts.format} and this version reads {FORMAT}. Install "
            f"fedlora-app {facts.fedlora_app}."
        )
    try:
        fingerprint = fingerprint_certificate(root)
    except CredentialError as error:
        raise PackageError(f"{path}: {ROOT}: {error}") from None
    if facts.root != fingerprint:
        raise PackageError(
            f"{path}: {ROOT} is not the certificate that {FACTS} names. The package was changed "
            "on its way; ask for it again."
        )
    if not facts.host or not facts.port:
        raise PackageError(f'{path}: "{facts.address}" is not a host and a port.')
