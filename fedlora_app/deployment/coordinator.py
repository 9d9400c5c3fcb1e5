"""The coordinator's folder: the authority, who may take part, and what is done to let a site in.

The experiment says which clients there are; ``coordinator.yaml`` says which of them are invited,
let in, or let in no longer. A command that concerns one site writes that site's files and its
entry, and no other site's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from fedlora_app.config.loading import load_config
from fedlora_app.config.schema import Config, Section
from fedlora_app.deployment import registry
from fedlora_app.deployment.keys import (
    MAX_REQUEST_BYTES,
    CredentialError,
    Request,
    check_request,
    fingerprint_public_key,
    issue_certificate,
    keep_out_of_git,
    make_root,
    make_secret_dir,
    write_public,
    write_secret,
)
from fedlora_app.deployment.layout import CoordinatorFolder
from fedlora_app.deployment.package import build_package
from fedlora_app.deployment.templates import write_coordinator_templates
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import lock_folder

SETTINGS_HEADING = "# Written by fedlora deploy, which each site's entry is changed by.\n"
INVITED, APPROVED, REVOKED = "invited", "approved", "revoked"


class CoordinatorError(UserError):
    """A site cannot be let in, changed or removed; the message says why and what to do."""


class SiteEntry(Section):
    """A client of the experiment, as far as it may take part."""

    status: Literal["invited", "approved", "revoked"] = INVITED
    fingerprint: str = ""
    """Of its key, once it is approved."""


class Settings(Section):
    """The content of ``coordinator.yaml``."""

    host: str
    """By which sites reach the SuperLink."""
    port: int = Field(ge=1, le=65535)
    project: str
    """The checkout, absolute."""
    config: str
    """The experiment's YAML, relative to the project."""
    sites: dict[str, SiteEntry]

    @property
    def address(self) -> str:
        """Host and port as ``flower-supernode --superlink`` takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass
class Coordinator:
    """A deployment's folder with its settings."""

    folder: CoordinatorFolder
    settings: Settings

    @property
    def config_path(self) -> Path:
        """The experiment's YAML."""
        return Path(self.settings.project) / self.settings.config

    @property
    def approved(self) -> dict[str, SiteEntry]:
        """The sites that are let in."""
        return {i: s for i, s in self.settings.sites.items() if s.status == APPROVED}

    @property
    def is_running(self) -> bool:
        """Whether its SuperLink answers on this machine."""
        return registry.is_answering(self.folder, self.settings.port)

    def load_experiment(self) -> Config:
        """Return the experiment as its YAML is now."""
        return load_config(self.config_path)

    def change_site(self, site: str, entry: SiteEntry) -> None:
        """Write a site's entry; the others stay as they are."""
        sites = self.settings.sites | {site: entry}
        self.settings = self.settings.model_copy(update={"sites": sites})
        self.save()

    def save(self) -> None:
        """Write ``coordinator.yaml``."""
        text = yaml.safe_dump(self.settings.model_dump(), sort_keys=False, allow_unicode=True)
        write_secret(self.folder.settings, (SETTINGS_HEADING + text).encode())


def create(folder: Path, host: str, port: int, config: Path, project: Path) -> Coordinator:
    """Make the authority, the SuperLink's certificate and the folder around them.

    Raises:
        CoordinatorError: there is a deployment in the folder already.
        ConfigError: the experiment has faults.
        CredentialError: the host is none.
    """
    files = CoordinatorFolder(folder)
    if files.settings.exists() or files.root_key.exists():
        raise CoordinatorError(
            f"{folder} holds a deployment already, whose authority sites may have. Nothing was "
            "changed. Name another folder with --output."
        )
    experiment = load_config(config)
    absolute = config.resolve()
    name = absolute.relative_to(project) if absolute.is_relative_to(project) else absolute
    root_key, root = make_root(experiment.experiment.name)
    key, certificate = issue_certificate(root_key, root, host)
    make_secret_dir(folder)
    keep_out_of_git(folder)
    write_secret(files.root_key, root_key)
    write_secret(files.key, key)
    write_public(files.root_certificate, root)
    write_public(files.certificate, certificate)
    for part in (files.requests, files.packages, files.logs, files.flower_home):
        make_secret_dir(part)
    sites = {client: SiteEntry() for client in experiment.client_ids}
    settings = Settings(host=host, port=port, project=str(project), config=str(name), sites=sites)
    registry.write_connection(files, port)
    write_coordinator_templates(files, port, project)
    coordinator = Coordinator(files, settings)
    coordinator.save()
    return coordinator


def load_coordinator(folder: Path) -> Coordinator:
    """Read a deployment's settings.

    Raises:
        CoordinatorError: there are none, or they have faults.
    """
    files = CoordinatorFolder(folder)
    try:
        raw = yaml.safe_load(files.settings.read_text(encoding="utf-8"))
        return Coordinator(files, Settings.model_validate(raw))
    except FileNotFoundError:
        raise CoordinatorError(
            f"{folder} holds no deployment: it has no {files.settings.name}. Make one with "
            "fedlora deploy init, or name its folder with --deployment."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise CoordinatorError(f"{files.settings} cannot be read: {error}") from None


def read_request(path: Path) -> Request:
    """Read what a site has sent, and check its signature.

    Raises:
        CredentialError: it is no request, or was changed.
    """
    if path.stat().st_size > MAX_REQUEST_BYTES:
        raise CredentialError(f"{path} is too large for a site's request.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    try:
        return check_request(content)
    except CredentialError as error:
        raise CredentialError(f"{path}: {error}") from None


def check_newcomer(coordinator: Coordinator, request: Request) -> None:
    """Find out whether a site may be let in with this key.

    Raises:
        CoordinatorError: it is not invited, has a key already, or the key is another's.
    """
    client = request.client
    entry = _find_entry(coordinator, client)
    if entry.status == REVOKED:
        raise CoordinatorError(
            f"{client} was revoked. To let it in again: fedlora deploy add {client}"
        )
    if entry.status == APPROVED:
        same = entry.fingerprint == request.fingerprint
        advice = (
            f"It is the same key, so nothing is to be done; fedlora deploy package {client} writes "
            "its package again."
            if same
            else f"If the site has made a new key: fedlora deploy rotate FILE. Its present one is\n"
            f"  {entry.fingerprint}\nand that of the request\n  {request.fingerprint}"
        )
        raise CoordinatorError(f"{client} has a key already. {advice}")
    _refuse_known_key(coordinator, request)
    _require_named(coordinator, client)


def check_rotation(coordinator: Coordinator, request: Request) -> None:
    """Find out whether a new key may take the place of a site's key.

    Raises:
        CoordinatorError: it has none, or the new one is known already.
    """
    entry = _find_entry(coordinator, request.client)
    if entry.status != APPROVED:
        raise CoordinatorError(
            f"{request.client} has no key that another could take the place of: it is "
            f"{entry.status}. To let it in: fedlora deploy approve FILE"
        )
    if entry.fingerprint == request.fingerprint:
        raise CoordinatorError(
            f"This is the key that {request.client} has already. A new one is made at the site: "
            f"fedlora deploy request {request.client} --new-key"
        )
    _refuse_known_key(coordinator, request)
    _require_named(coordinator, request.client)


def approve(coordinator: Coordinator, request: Request) -> str:
    """Let a site in, write its package, and return what was done at the SuperLink."""
    with _changing(coordinator):
        check_newcomer(coordinator, request)
        return _let_in(coordinator, request)


def rotate(coordinator: Coordinator, request: Request) -> str:
    """Let a site in by a new key and no longer by its old one; return what was done."""
    with _changing(coordinator):
        check_rotation(coordinator, request)
        _retire(coordinator, request.client)
        return _let_in(coordinator, request)


def revoke(coordinator: Coordinator, site: str) -> str:
    """Let a site in no longer, move its request and package aside, and return what was done."""
    with _changing(coordinator):
        if _find_entry(coordinator, site).status == REVOKED:
            raise CoordinatorError(f"{site} is revoked already.")
        _retire(coordinator, site)
        coordinator.change_site(site, SiteEntry(status=REVOKED))
        return _tell_superlink(coordinator)


def add(coordinator: Coordinator, site: str) -> None:
    """Invite a client that the experiment names by now.

    Raises:
        CoordinatorError: it does not, or the client is invited already.
    """
    with _changing(coordinator):
        entry = coordinator.settings.sites.get(site)
        if entry is not None and entry.status != REVOKED:
            raise CoordinatorError(f"{site} is {entry.status} already.")
        _require_named(coordinator, site)
        coordinator.change_site(site, SiteEntry())


def write_package(coordinator: Coordinator, site: str) -> Path:
    """Write an approved site's package, again if it is there, and return its path."""
    entry = _find_entry(coordinator, site)
    if entry.status != APPROVED:
        raise CoordinatorError(f"{site} is {entry.status}; a package is for who is approved.")
    sites = coordinator.settings.sites
    path = coordinator.folder.package(site)
    content = build_package(
        coordinator.load_experiment(),
        Path(coordinator.settings.project),
        client=site,
        address=coordinator.settings.address,
        participants=[i for i, other in sites.items() if other.status != REVOKED],
        key=entry.fingerprint,
        root=coordinator.folder.root_certificate.read_bytes(),
    )
    write_public(path, content)
    return path


def renew_certificate(coordinator: Coordinator) -> None:
    """Give the SuperLink a new key and certificate by the same authority, for its next start."""
    folder = coordinator.folder
    key, certificate = issue_certificate(
        folder.root_key.read_bytes(),
        folder.root_certificate.read_bytes(),
        coordinator.settings.host,
    )
    write_secret(folder.key, key)
    write_public(folder.certificate, certificate)


def register_pending(folder: Path) -> list[str]:
    """Bring the keys that a running SuperLink lets in into line with the approved sites.

    So a SuperLink that starts, with its database or without, knows who was approved or revoked
    while it was down. Keys that neither this folder nor its past knows are left alone.

    Returns:
        A line for every site whose key was registered or unregistered.

    Raises:
        RegistryError: the SuperLink does not answer, or Flower refused a key.
    """
    coordinator = load_coordinator(folder)
    files, port = coordinator.folder, coordinator.settings.port
    nodes = registry.list_nodes(files, port)
    former = _former_fingerprints(files)
    done = []
    for node in nodes:
        if node.fingerprint in former:
            registry.unregister(files, port, node)
            done.append(f"{former[node.fingerprint]}: its former key is no longer let in.")
    known = {node.fingerprint for node in nodes}
    for site, entry in coordinator.approved.items():
        if entry.fingerprint not in known:
            registry.register(files, port, site)
            done.append(f"{site}: its key is registered with the SuperLink.")
    return done


def _let_in(coordinator: Coordinator, request: Request) -> str:
    site, folder = request.client, coordinator.folder
    content = json.dumps(request.dump(), indent=2)
    write_public(folder.request(site), f"{content}\n".encode())
    write_public(folder.public_key(site), f"{request.public_key}\n".encode())
    entry = SiteEntry(status=APPROVED, fingerprint=request.fingerprint)
    coordinator.change_site(site, entry)
    write_package(coordinator, site)
    return _tell_superlink(coordinator)


def _tell_superlink(coordinator: Coordinator) -> str:
    if not coordinator.is_running:
        return "The SuperLink does not run; fedlora deploy start will tell it."
    return "\n".join(register_pending(coordinator.folder.folder)) or "The SuperLink knew already."


def _find_entry(coordinator: Coordinator, site: str) -> SiteEntry:
    sites = coordinator.settings.sites
    if site not in sites:
        raise CoordinatorError(
            f"{site} is not a site of this deployment. It has "
            f"{', '.join(sites)}. If the experiment names {site} by now: fedlora deploy add {site}"
        )
    return sites[site]


def _require_named(coordinator: Coordinator, site: str) -> None:
    if site not in coordinator.load_experiment().client_ids:
        raise CoordinatorError(
            f"{coordinator.config_path} has no client {site}. Add {{id: {site}}} to "
            "federated.clients there, then repeat this."
        )


def _refuse_known_key(coordinator: Coordinator, request: Request) -> None:
    owners = {entry.fingerprint: site for site, entry in coordinator.settings.sites.items()}
    if owner := owners.get(request.fingerprint):
        raise CoordinatorError(
            f"The key of this request is that of {owner}, and each site has one of its own. Ask "
            f"{request.client} for a request by a key that was made there."
        )
    if request.fingerprint in _former_fingerprints(coordinator.folder):
        raise CoordinatorError(
            f"The key of this request is one that is no longer let in. {request.client} makes a "
            f"new one: fedlora deploy request {request.client} --new-key"
        )


def _former_fingerprints(folder: CoordinatorFolder) -> dict[str, str]:
    """Return the sites that had keys once, by the keys' fingerprints."""
    paths = sorted(folder.former.glob("*/*.pub"))
    return {fingerprint_public_key(path.read_text().strip()): path.stem for path in paths}


def _retire(coordinator: Coordinator, site: str) -> None:
    """Move what a site had aside; its key is remembered there and never let in again."""
    folder = coordinator.folder
    digits = coordinator.settings.sites[site].fingerprint.replace(" ", "")[:16] or INVITED
    target = folder.former / f"{site}-{digits}"
    for path in (folder.request(site), folder.public_key(site), folder.package(site)):
        if path.exists():
            make_secret_dir(target)
            shutil.move(path, target / path.name)


@contextmanager
def _changing(coordinator: Coordinator) -> Iterator[None]:
    """Keep a second command from changing the folder at the same moment."""
    lock = lock_folder(coordinator.folder.requests)
    if lock is None:
        raise CoordinatorError(
            f"Another command is changing {coordinator.folder.folder}. Repeat this afterwards."
        )
    with lock:
        coordinator.settings = load_coordinator(coordinator.folder.folder).settings
        yield
