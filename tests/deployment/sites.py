"""Sites of a loopback federation: folders with a client's own file, its data and its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from conftest import build_tiny_config
from loopback import Federation

from fedlora_app.config.loading import parse_config
from fedlora_app.config.private import without_private
from fedlora_app.config.schema import Config


def prompt_of(client: str) -> str:
    return f"You are the help desk of zq{client}."


def names_of(client: str) -> list[str]:
    """Names of files that nobody but the client has."""
    return [f"zq{client}_local.json", f"zq{client}_universal.json", f"zq{client}_test.json"]


def make_site(project: Path, folder: Path, client: str, **changes: Any) -> Path:
    """Write a site's folder and return the client's own file in it."""
    local, universal, test = (folder / "data" / name for name in names_of(client))
    local.parent.mkdir(parents=True)
    shutil.copy(project / f"{client}_local.json", local)
    shutil.copy(project / f"{client}_universal.json", universal)
    shutil.copy(project / "universal_test.json", test)
    own = {
        "id": client,
        "system_prompt": prompt_of(client),
        "local_train": f"data/{local.name}",
        "local_test": f"data/{local.name}",
        "universal_train": str(universal),
        "data": {"universal_test": f"data/{test.name}"},
        "model": {"name": str(project / "model")},
    }
    path = folder / "client.yaml"
    path.write_text(yaml.safe_dump(own | changes))
    return path


def build_bare_config(clients: tuple[str, ...] = ("ann", "bob"), **changes: Any) -> Config:
    """Return the tiny experiment with nothing but ids of its clients."""
    raw = without_private(build_tiny_config(clients, **changes).dump())
    raw["data"] |= {"universal_test": None, "conflict_test": None}
    return parse_config(raw)


def build_federation(
    project: Path,
    folder: Path,
    config: Config | None = None,
    own: dict[str, dict[str, Any]] | None = None,
) -> Federation:
    """Return a federation of sites, whose coordinator knows nothing but their ids.

    Args:
        own: what is other in a client's own file.
    """
    config = config or build_bare_config()
    federation = Federation(project, folder / "server", config)
    for client in config.client_ids:
        path = make_site(project, folder / "sites" / client, client, **(own or {}).get(client, {}))
        federation.own_files[client] = path
    return federation


def set_policy(federation: Federation, client: str, **rules: Any) -> None:
    """Write a client's policy beside its own file."""
    path = federation.own_files[client].with_name("policy.yaml")
    path.write_text(json.dumps(rules))
