"""A site's folder: its key, what it asks the coordinator for, and the package that comes back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from fedlora_app.config.schema import SAFE_NAME
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.deployment.facts import Facts
from fedlora_app.deployment.happenings import PACKAGE_JOINED
from fedlora_app.deployment.keys import (
    Request,
    check_request,
    fingerprint_certificate,
    fingerprint_public_key,
    keep_out_of_git,
    load_site_key,
    make_secret_dir,
    make_site_key,
    public_line,
    sign_request,
    write_public,
    write_secret,
)
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.package import CLIENT, POLICY, Package, read_package
from fedlora_app.deployment.templates import write_site_templates
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import replace_folder
from fedlora_app.foundation.terminal import shell


class SiteError(UserError):
    """A site cannot ask or join; the message says why and what to do."""


@dataclass(frozen=True)
class Joined:
    """What joining has done."""

    site: Path
    kept: list[Path]
    """Files of the site's own that were left as they are."""
    written: list[Path]


def make_request(client: str, folder: Path, new_key: bool = False) -> Request:
    """Make a site's key pair in its folder and write the request for the coordinator.

    Args:
        new_key: for a site that has a key: another one, which takes its place when the package for
            it has come. Until then the site goes on with the one that it has.

    Raises:
        SiteError: the id cannot be one, or the folder has a key and no new one is asked for.
    """
    if not re.fullmatch(SAFE_NAME, client):
        raise SiteError(f'"{client}" cannot be a client\'s id: letters, digits, . _ and - are.')
    site = SiteFolder(folder)
    if site.key.exists() and not new_key:
        raise SiteError(
            f"{site.key} exists already, and nothing was changed. Its request is {site.request}. "
            "For a key in its place: --new-key"
        )
    if new_key and not site.key.exists():
        raise SiteError(f"{folder} has no key yet, so leave out --new-key.")
    if new_key and load_request(site).client != client:
        raise SiteError(f"{folder} is that of {load_request(site).client}, and not of {client}.")
    keep_out_of_git(folder)
    private, public = make_site_key()
    request = sign_request(private, client)
    write_secret(site.next_key if new_key else site.key, private)
    if not new_key:
        write_public(site.public_key, f"{public}\n".encode())
    write_public(site.request, (json.dumps(request.dump(), indent=2) + "\n").encode())
    return request


def load_request(site: SiteFolder) -> Request:
    """Read the request that a site has made.

    Raises:
        SiteError: it has made none.
    """
    try:
        return check_request(json.loads(site.request.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SiteError(
            f"{site.folder} is not a site's folder: it has no {site.request.name}. Make one with "
            "fedlora deploy request ID, or name it with --site."
        ) from None
    except ValueError as error:
        raise SiteError(f"{site.request} cannot be used: {error}") from None


def load_facts(site: SiteFolder) -> Facts:
    """Read what the coordinator's package says.

    Raises:
        SiteError: no package has been joined, or its facts are damaged.
    """
    try:
        return Facts.model_validate(json.loads(site.package_facts.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SiteError(
            f"{site.folder} has no package of the coordinator yet. When it has come: "
            f"fedlora deploy join PACKAGE --site {shell(site.folder)}"
        ) from None
    except ValueError as error:
        raise SiteError(f"{site.package_facts} cannot be read: {error}") from None


def open_package(path: Path, folder: Path | None) -> tuple[Package, SiteFolder]:
    """Read a package and find out whether it is for this site. Nothing is written.

    Args:
        folder: of the site; None: that of the client's name in the working directory.

    Raises:
        PackageError: it is damaged.
        SiteError: it is another's, or for a key that is not here, or of another authority.
    """
    package = read_package(path)
    facts = package.facts
    site = SiteFolder(folder or Path(facts.client))
    own = load_request(site).client
    if own != facts.client:
        raise SiteError(f"{path} is the package of {facts.client}, and {site.folder} is {own}'s.")
    if _find_key(site, facts.key) is None:
        raise SiteError(
            f"{path} is for the key\n  {facts.key}\nwhich is not in {site.folder}. Send the "
            f"coordinator {site.request}, or ask for the package of that key."
        )
    if site.root_certificate.exists():
        known = fingerprint_certificate(site.root_certificate.read_bytes())
        if known != facts.root:
            raise SiteError(
                f"{path} is of another authority than the package that {site.folder} has:\n"
                f"  {facts.root}\n  {known}\nIf the coordinator confirms the first one, by "
                f"telephone and not by mail, remove {site.package} and repeat this."
            )
    return package, site


def join(package: Package, site: SiteFolder) -> Joined:
    """Unpack a package that is for this site, and leave what the site has edited alone."""
    make_secret_dir(site.folder)
    with replace_folder(site.package) as folder:
        folder.chmod(0o700)
        for name, content in package.members.items():
            write_public(folder / name, content)
    kept, written = [], []
    for name, path in ((CLIENT, site.client_file), (POLICY, site.policy)):
        if path.exists():
            kept.append(path)
        else:
            write_secret(path, package.members[name])
            written.append(path)
    if _find_key(site, package.facts.key) == site.next_key:
        site.next_key.replace(site.key)
        line = load_request(site).public_key
        write_public(site.public_key, f"{line}\n".encode())
    for part in (site.store, site.logs, site.flower_home):
        make_secret_dir(part)
    write_site_templates(site)
    facts = package.facts
    Evidence(site.evidence).add(PACKAGE_JOINED, client=facts.client, key=facts.key, root=facts.root)
    return Joined(site.folder, kept, written)


def _find_key(site: SiteFolder, fingerprint: str) -> Path | None:
    """Return the private key whose fingerprint this is."""
    for path in (site.key, site.next_key):
        if path.exists() and fingerprint_key_file(path) == fingerprint:
            return path
    return None


def fingerprint_key_file(path: Path) -> str:
    """Return the fingerprint of a private key's public half."""
    return fingerprint_public_key(public_line(load_site_key(path.read_bytes()).public_key()))
