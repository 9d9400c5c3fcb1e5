"""What of a client's settings is its own: known to the client alone where it has a file for it.

In a deployment a client may be named by its id alone, and all of this stands in a file on its own
machine (``deployment.client_file``). Here such a client is called bare.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from fedlora_app.config.faults import shorten

NEEDED = ("system_prompt", "local_train")
"""Without these nobody can train or answer for a client."""
PRIVATE = (*NEEDED, "local_test", "local_validation", "universal_train")


def is_bare(client: Mapping[str, Any]) -> bool:
    """Return whether nothing of a client's own settings is here."""
    return all(client.get(name) is None for name in PRIVATE)


def explain_bare(client_id: str) -> str:
    """Return why nothing can be done with a client whose own settings are not here."""
    return (
        f"federated.clients: {client_id} has no system_prompt and no local_train here. In a "
        "deployment they stand in the client's own file, on its own machine; for anything else "
        "name both."
    )


def without_private(raw: dict[str, Any], of: Collection[str] = ()) -> dict[str, Any]:
    """Return an experiment as plain data with the own settings of these clients only.

    Where one client reads everybody's data (mode centralized) all of them stay.
    """
    federated = raw.get("federated", {})
    if federated.get("mode") == "centralized":
        return raw
    clients = [
        client if client["id"] in of else {k: v for k, v in client.items() if k not in PRIVATE}
        for client in federated.get("clients", [])
    ]
    return raw | {"federated": federated | {"clients": clients}}


def find_private_faults(clients: Iterable[Mapping[str, Any]], mode: Any) -> Iterator[str]:
    """Find clients of which only a part is named, on raw data."""
    for client in clients:
        name = shorten(client["id"]) if isinstance(client.get("id"), str) else None
        if is_bare(client):
            if mode == "centralized":
                yield (
                    "federated.mode: centralized has one client read everybody's data, and "
                    f'"{name}" names none here.'
                )
            continue
        missing = [key for key in NEEDED if client.get(key) is None]
        if missing:
            yield (
                f'federated.clients: "{name}" has no {" and no ".join(missing)}. Name both, or '
                "in a deployment none of a client's own settings: they then stand in its own file."
            )
