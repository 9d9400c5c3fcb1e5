"""The keys that the running SuperLink lets in, by Flower's own ``flwr supernode``.

Flower's list on the command line has neither keys nor names, so it is read by the client class that
the command itself uses. Everything goes to this machine's loopback address.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedlora_app.deployment.keys import fingerprint_public_key, public_line
from fedlora_app.deployment.layout import CoordinatorFolder
from fedlora_app.deployment.proxies import spare_loopback
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import write_atomically

FLWR = str(Path(sys.executable).with_name("flwr"))  # of this environment, whatever PATH says
CONNECTION = "deployment"
ANSWER_SECONDS = 3.0
COMMAND_SECONDS = 120.0


class RegistryError(UserError):
    """Flower did not do what was asked; the message has what it said."""


@dataclass(frozen=True)
class Node:
    """A registered key as the SuperLink knows it."""

    node_id: int
    fingerprint: str
    status: str
    """Of Flower: registered (never seen), online, offline or unregistered."""


def write_connection(folder: CoordinatorFolder, port: int) -> Path:
    """Write the configuration by which ``flwr`` finds this SuperLink, and return its folder.

    It is written again at every use, because it names the root certificate by an absolute path.
    """
    folder.flower_home.mkdir(mode=0o700, exist_ok=True)
    root = json.dumps(str(folder.root_certificate.resolve()))  # a JSON string is a TOML one
    write_atomically(
        folder.flower_home / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = {root}\n',
    )
    return folder.flower_home


def is_answering(folder: CoordinatorFolder, port: int) -> bool:
    """Return whether this deployment's SuperLink runs: that it answers, with its certificate."""
    spare_loopback()
    try:
        context = ssl.create_default_context(cafile=str(folder.root_certificate))
        url = f"https://127.0.0.1:{port}/health"
        return httpx.get(url, verify=context, timeout=ANSWER_SECONDS).is_success
    except (httpx.HTTPError, OSError):
        return False


def is_listening(port: int) -> bool:
    """Return whether anything takes connections on this machine's port, answering or not."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return False
    except OSError:  # it takes none in time, which does not say that nothing is there
        return True
    return True


def register(folder: CoordinatorFolder, port: int, site: str) -> None:
    """Let a site's key in.

    Raises:
        RegistryError: Flower refused it.
    """
    key = str(folder.public_key(site))
    _call_flower(folder, port, "register", key, CONNECTION, "--name", site)


def unregister(folder: CoordinatorFolder, port: int, node: Node) -> None:
    """Let a key in no longer; a SuperNode that uses it ends by itself.

    Raises:
        RegistryError: Flower does not know it.
    """
    _call_flower(folder, port, "unregister", str(node.node_id), CONNECTION)


def list_nodes(folder: CoordinatorFolder, port: int) -> list[Node]:
    """Return the keys that the SuperLink lets in.

    Raises:
        RegistryError: it did not answer.
    """
    # Flower's own client takes seconds to import.
    from flwr.proto.control_pb2 import ListNodesRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    spare_loopback()
    try:
        with ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            False,
            folder.root_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        ) as client:
            found = client.ListNodes(ListNodesRequest()).nodes_info
    except httpx.HTTPError as error:
        raise RegistryError(f"The SuperLink did not list its SuperNodes: {error}.") from None
    nodes = []
    for node in found:
        line = public_line(bytes_to_public_key(node.public_key))
        nodes.append(Node(node.node_id, fingerprint_public_key(line), node.status))
    return [node for node in nodes if node.status != "unregistered"]


def _call_flower(folder: CoordinatorFolder, port: int, *arguments: str) -> None:
    spare_loopback()
    environment = os.environ | {"FLWR_HOME": str(write_connection(folder, port).resolve())}
    command = [FLWR, "supernode", *arguments, "--format", "json"]
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryError(f"flwr supernode {arguments[0]} did not run: {error}.") from None
    try:
        answer = json.loads(result.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        said = answer.get("error-message") or result.stdout + result.stderr
        raise RegistryError(f"flwr supernode {arguments[0]} failed: {said.strip()}")
