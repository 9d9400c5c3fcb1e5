"""Where everything of a deployment lies, at the coordinator and at a site.

No other module knows the name of a file in these folders.
"""

from __future__ import annotations

from pathlib import Path


class _Folder:
    """What both ends have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.evidence = folder / "evidence.jsonl"  # the hash-chained log of what happened
        self.logs = folder / "logs"
        self.processes = folder / "processes.json"  # what `start` has started


class CoordinatorFolder(_Folder):
    """The files of the organisation that runs the SuperLink."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.settings = folder / "coordinator.yaml"
        self.root_key = folder / "root.key"  # of the private certificate authority
        self.root_certificate = folder / "root.crt"
        self.key = folder / "superlink.key"
        self.certificate = folder / "superlink.crt"
        self.database = folder / "superlink.db"
        self.flower_home = folder / "flwr"
        self.requests = folder / "requests"
        self.packages = folder / "packages"
        self.former = folder / "former"  # requests and packages of keys that are no longer let in
        self.templates = folder / "templates"  # systemd units, compose file, Dockerfile

    def request(self, site: str) -> Path:
        """Return the file of a site's request, as it came."""
        return self.requests / f"{site}.json"

    def public_key(self, site: str) -> Path:
        """Return the file of a site's public key, as Flower registers it."""
        return self.requests / f"{site}.pub"

    def package(self, site: str) -> Path:
        """Return the file that a site gets."""
        return self.packages / f"{site}.zip"


class SiteFolder(_Folder):
    """The files of an organisation that takes part with its own data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.key = folder / "site.key"  # made here, and never leaves
        self.public_key = folder / "site.pub"
        self.next_key = folder / "site.next.key"  # takes its place when a package for it has come
        self.request = folder / "request.json"
        self.package = folder / "package"
        self.package_facts = self.package / "package.json"
        self.root_certificate = self.package / "root.crt"
        self.client_file = folder / "client.yaml"  # private: data, system prompt, model, device
        self.policy = folder / "policy.yaml"  # what this site permits
        self.store = folder / "store"  # run directories with the local adapters
        self.executor_secret = folder / "executor.secret"
        self.flower_home = folder / "flwr"
        self.templates = folder / "templates"
