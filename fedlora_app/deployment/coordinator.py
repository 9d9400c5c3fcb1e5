"""The coordinator's folder: its authority, its settings, and the keys that its SuperLink is told.

The experiment says which clients there are; ``coordinator.yaml`` says which of them are invited,
let in, or let in no longer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from fedlora_app.config.loading import load_config
from fedlora_app.config.schema import Config, Section
from fedlora_app.deployment import registry
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.deployment.happenings import CERTIFICATE_RENEWED
from fedlora_app.deployment.keys import (
    fingerprint_certificate,
    fingerprint_public_key,
    issue_certificate,
    keep_out_of_git,
    make_root,
    make_secret_dir,
    write_public,
    write_secret,
)
from fedlora_app.deployment.layout import CoordinatorFolder
from fedlora_app.deployment.templates import write_coordinator_templates
from fedlora_app.foundation.errors import UserError

SETTINGS_HEADING = "# Written by fedlora deploy, which each site's entry is changed by.\n"
DEPLOYMENT_VARIABLE = "FEDLORA_DEPLOYMENT"
"""Names the coordinator's folder to the processes of its deployment."""
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
    fingerprint = fingerprint_certificate(certificate)
    Evidence(folder.evidence).add(CERTIFICATE_RENEWED, certificate=fingerprint)


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
    former = former_fingerprints(files)
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


def former_fingerprints(folder: CoordinatorFolder) -> dict[str, str]:
    """Return the sites that had keys once, by the keys' fingerprints."""
    paths = sorted(folder.former.glob("*/*.pub"))
    return {fingerprint_public_key(path.read_text().strip()): path.stem for path in paths}


def find_owners() -> dict[int, str] | None:
    """Return whose site each node is, by the key that the SuperLink knows it by.

    Only sites that are let in have one. None where this process belongs to no deployment, so that
    nobody but the node itself says who it is.

    Raises:
        RegistryError, CoordinatorError: it does, and its SuperLink or settings cannot be asked.
    """
    folder = os.environ.get(DEPLOYMENT_VARIABLE)
    if not folder:
        return None
    coordinator = load_coordinator(Path(folder))
    nodes = registry.list_nodes(coordinator.folder, coordinator.settings.port)
    sites = {entry.fingerprint: site for site, entry in coordinator.approved.items()}
    return {node.node_id: sites[node.fingerprint] for node in nodes if node.fingerprint in sites}
