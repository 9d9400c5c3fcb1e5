"""What a package says about the experiment, for programs at the site to compare."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from fedlora_app.config.schema import Section


class Base(Section):
    """The base model of the experiment."""

    name: str
    revision: str | None
    fingerprint: str | None
    """None where the coordinator does not have it."""


class Facts(Section):
    """The content of ``package.json``."""

    format: int
    experiment: str
    client: str
    address: str
    """Of the SuperLink, host and port."""
    participants: list[str]
    """The sites that were invited when the package was written."""
    key: str
    """The fingerprint of the site's key that is let in."""
    root: str
    """The fingerprint of the authority's certificate."""
    fedlora_app: str
    flwr: str
    requirements: list[str]
    """The coordinator's versions of what fedlora-app needs."""
    code_sha256: str
    """Of the sources of fedlora_app."""
    base: Base
    settings: dict[str, dict[str, Any]]
    """The experiment's sections that say what a site's machine has to do."""

    @property
    def host(self) -> str:
        """The SuperLink's name or IP address."""
        return urlsplit(f"//{self.address}").hostname or ""

    @property
    def port(self) -> int:
        """The SuperLink's port."""
        return urlsplit(f"//{self.address}").port or 0
