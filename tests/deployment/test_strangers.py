"""Who is refused by a SuperLink with TLS and authenticated SuperNodes, and what each side logs."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from conftest import build_tiny_config
from flower_process import BIN, ROOT, free_port
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from loopback import wait_until

from fedlora_app.deployment import registry
from fedlora_app.deployment.connection import (
    build_context,
    examine_certificate,
    examine_connection,
)
from fedlora_app.deployment.coordinator import (
    Coordinator,
    create,
    load_coordinator,
    register_pending,
)
from fedlora_app.deployment.coordinator_checks import examine_coordinator, examine_strangers
from fedlora_app.deployment.keys import (
    issue_certificate,
    load_site_key,
    make_root,
    make_site_key,
    write_secret,
)
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.membership import approve, read_request, revoke
from fedlora_app.deployment.proxies import find_proxy
from fedlora_app.deployment.site import join, make_request, open_package
from fedlora_app.deployment.site_checks import (
    examine_own_registration,
    examine_ports,
    explain_end,
    find_supernodes,
    listening_addresses,
)

pytestmark = [pytest.mark.deployment, pytest.mark.minutes]
STRANGER = "127.0.0.2"
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
SITES = ("ann", "bob", "cy")


class Processes:
    """Processes of a test, each with its log; all of them end with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str | Path, **environment: str) -> subprocess.Popen:
        home = self.folder / f"{name}-home"
        own = {"FLWR_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        off = {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        with (self.folder / f"{name}.log").open("w") as log:
            self.started[name] = subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | path | own | off | environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.started[name]

    def log(self, name: str) -> str:
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def end_of(self, name: str, seconds: float = 15) -> tuple[int, str]:
        """Return the exit status and the log of a process that ends by itself."""
        status = self.started[name].wait(timeout=seconds)
        return status, self.log(name)

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.started.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=10)


@pytest.fixture
def processes(tmp_path):
    processes = Processes(tmp_path)
    yield processes
    processes.stop()


def start_superlink(
    processes: Processes, folder: CoordinatorFolder, port: int, *command: str | Path, **environment
) -> None:
    """Start one with a deployment's certificate, and wait until it takes connections."""
    command = command or (sys.executable, "-m", "fedlora_app.deployment.superlink")
    database = processes.folder / "superlink.db"
    processes.start(
        "superlink",
        *command,
        *("--host", "0.0.0.0", "--port", str(port), "--isolation", "process"),
        *("--ssl-certfile", folder.certificate, "--ssl-keyfile", folder.key),
        *("--ssl-ca-certfile", folder.root_certificate, "--database", database),
        "--enable-supernode-auth",
        **environment,
    )
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)


def start_supernode(
    processes: Processes, name: str, port: int, root: Path | None, key: Path | None, *more: str
) -> subprocess.Popen:
    trust = ("--root-certificates", root) if root is not None else ("--insecure",)
    identity = ("--auth-supernode-private-key", key) if key is not None else ()
    return processes.start(
        name,
        *(BIN / "flower-supernode", "--superlink", f"127.0.0.1:{port}", *trust, *identity),
        *("--isolation", "process", "--port", str(free_port()), "--max-retries", "1", *more),
    )


@pytest.fixture(scope="module")
def running(tiny_project, tmp_path_factory):
    """A deployment whose SuperLink runs, with ann and bob let in; its folder and its processes."""
    experiment = tiny_project / "strangers.yaml"
    experiment.write_text(json.dumps(build_tiny_config(SITES).dump()))
    folder = tmp_path_factory.mktemp("strangers")
    coordinator = create(folder / "deployment", "127.0.0.1", free_port(), experiment, tiny_project)
    processes = Processes(folder)
    grpc = {"FLWR_INTERNAL_GRPC_CONTROL_API": "1", "FORWARDED_ALLOW_IPS": "*"}
    try:
        start_superlink(processes, coordinator.folder, coordinator.settings.port, **grpc)
        wait_until(lambda: coordinator.is_running)
        for site in ("ann", "bob"):
            let_in(coordinator, folder / site)
        yield coordinator, processes
    finally:
        processes.stop()


def let_in(coordinator: Coordinator, folder: Path) -> SiteFolder:
    make_request(folder.name, folder)
    assert "is registered" in approve(coordinator, read_request(SiteFolder(folder).request))
    join(*open_package(coordinator.folder.package(folder.name), folder))
    return SiteFolder(folder)


def call(coordinator: Coordinator, path: str, source: str, **headers: str) -> int:
    """Return the status of a request to exactly this path, from one of this machine's addresses."""
    connection = http.client.HTTPSConnection(
        "127.0.0.1",
        coordinator.settings.port,
        context=build_context(coordinator.folder.root_certificate.read_text()),
        source_address=(source, 0),
        timeout=10,
    )
    try:
        connection.request("POST", path, b"", PROTOBUF | headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_other_machines_reach_the_fleet_api_alone(running):
    coordinator, processes = running
    control = "/v1/control/list-runs"
    assert call(coordinator, control, "127.0.0.1") == 200
    for path in (
        control,
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/pull-pending-tasks",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
    ):
        assert call(coordinator, path, STRANGER) == 403, path
    forwarded = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    assert call(coordinator, control, STRANGER, **forwarded) == 403
    assert call(coordinator, "/v1/fleet/pull-messages", STRANGER) == 401  # served, and not signed
    assert f"Refused {control} from {STRANGER}" in processes.log("superlink")
    pid = processes.started["superlink"].pid
    assert listening_addresses(pid) == {f"0.0.0.0:{coordinator.settings.port}"}
    found = {(f.name, f.level) for f in examine_coordinator(coordinator.folder.folder)}
    assert {("strangers", "ok"), ("keys", "ok"), ("certificate", "ok")} <= found
    assert not {name for name, level in found if level == "fault"}
    assert register_pending(coordinator.folder.folder) == []  # nothing is left to do


def test_an_interface_is_not_chosen_by_host(processes):
    """The ServerApp would come from that address, and be refused in the middle of a run."""
    module = ("-m", "fedlora_app.deployment.superlink")
    processes.start("superlink", sys.executable, *module, "--host", "203.0.113.9", "--insecure")
    status, log = processes.end_of("superlink")
    assert status == 1 and "let a firewall choose the interface" in log


def test_a_proxy_of_the_network_is_not_asked_for_this_machine(running, monkeypatch):
    coordinator = running[0]
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "fed.example.org")
    assert find_proxy("127.0.0.1") == "127.0.0.1:9" and find_proxy("fed.example.org") is None
    assert coordinator.is_running and register_pending(coordinator.folder.folder) == []
    assert os.environ["NO_PROXY"] == "fed.example.org,127.0.0.1,::1,localhost"
    assert find_proxy("127.0.0.1") is None


def test_flower_alone_serves_its_control_api_to_everybody(running, processes):
    """Why there is a wrapper; when a later Flower refuses, it can go."""
    coordinator = running[0]
    settings = coordinator.settings.model_copy(update={"port": free_port()})
    plain = Coordinator(coordinator.folder, settings)
    start_superlink(processes, coordinator.folder, settings.port, BIN / "flower-superlink")
    wait_until(lambda: plain.is_running)
    status = call(plain, "/v1/control/list-runs", STRANGER)
    if status in (401, 403):
        pytest.skip("Flower refuses it by now")
    assert status == 200
    found = examine_strangers(plain, coordinator.folder.root_certificate.read_text())
    assert found.level == "fault" and "whoever reaches this port can start runs" in found.what


def test_a_key_that_is_not_registered(running, processes):
    coordinator, servers = running
    private, _ = make_site_key()
    write_secret(processes.folder / "site.key", private)
    root = coordinator.folder.root_certificate
    start_supernode(
        processes, "stranger", coordinator.settings.port, root, processes.folder / "site.key"
    )
    status, log = processes.end_of("stranger")
    assert status != 0 and "Failed to activate SuperNode" in log
    assert "No SuperNode found with the given public key" in servers.log("superlink")


def test_no_key_at_all(running, processes):
    coordinator, servers = running
    root = coordinator.folder.root_certificate
    start_supernode(processes, "stranger", coordinator.settings.port, root, None)
    status, log = processes.end_of("stranger")
    assert status != 0 and "All SuperNodes must be registered" in log
    assert "Attempted to register SuperNode with public key" in servers.log("superlink")


def test_another_authority(running, processes):
    coordinator, _ = running
    (processes.folder / "other.crt").write_bytes(make_root("tiny")[1])
    ann = SiteFolder(coordinator.folder.folder.parent / "ann")
    port = coordinator.settings.port
    start_supernode(processes, "ann", port, processes.folder / "other.crt", ann.key)
    status, log = processes.end_of("ann")
    assert status != 0 and "CERTIFICATE_VERIFY_FAILED" in log
    found = examine_certificate("127.0.0.1", port, (processes.folder / "other.crt").read_text())
    assert found.level == "fault" and "not by the authority of the package" in found.what


def test_plain_text(running, processes):
    coordinator, _ = running
    ann = SiteFolder(coordinator.folder.folder.parent / "ann")
    port = coordinator.settings.port
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    start_supernode(processes, "ann", port, None, ann.key)
    start_supernode(processes, "nobody", port, None, None)
    status, log = processes.end_of("ann")
    assert status != 0 and "requires a secure TLS connection" in " ".join(log.split())
    status, log = processes.end_of("nobody")
    assert status != 0 and "Failed to initialize the connection to the SuperLink" in log


def test_an_expired_certificate(running, processes):
    coordinator, _ = running
    ann = SiteFolder(coordinator.folder.folder.parent / "ann")
    files, port = CoordinatorFolder(processes.folder), free_port()
    root = coordinator.folder.root_certificate.read_bytes()
    key, certificate = issue_certificate(
        coordinator.folder.root_key.read_bytes(),
        root,
        "127.0.0.1",
        start=datetime.now(UTC) - timedelta(days=366),
    )
    for path, content in (
        (files.key, key),
        (files.certificate, certificate),
        (files.root_certificate, root),
    ):
        write_secret(path, content)
    start_superlink(processes, files, port)
    start_supernode(processes, "ann", port, files.root_certificate, ann.key)
    status, log = processes.end_of("ann")
    assert status != 0 and "certificate has expired" in log
    found = examine_certificate("127.0.0.1", port, root.decode())
    assert found.level == "fault" and "has expired" in found.what and "renew" in found.advice


class Signing:
    """Flower's own way of signing, at another time or with a key that is not the one it names."""

    def __init__(self, key: bytes, named: bytes, ahead: float = 0) -> None:
        self.key, self.named, self.ahead = load_site_key(key), load_site_key(named), ahead

    def intercept(self, context, call_next):
        timestamp = (datetime.now(UTC) + timedelta(seconds=self.ahead)).isoformat()
        public = public_key_to_bytes(self.named.public_key())
        signature = sign_message(self.key, timestamp.encode())
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = base64.b64encode(public).decode()
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = base64.b64encode(signature).decode()
        context.request.headers[TIMESTAMP_HEADER] = timestamp
        return call_next(context)


def test_whoever_claims_another_s_id_and_what_is_sent_again_later(running):
    coordinator, servers = running
    folder, port = coordinator.folder, coordinator.settings.port
    ids = {node.fingerprint: node.node_id for node in registry.list_nodes(folder, port)}
    sites = load_coordinator(folder.folder).settings.sites
    ann, bob = (Node(node_id=ids[sites[site].fingerprint]) for site in ("ann", "bob"))
    key, other = ((folder.folder.parent / s / "site.key").read_bytes() for s in ("ann", "bob"))

    def status(request: str, content, signing: Signing) -> int:
        with FleetHttpClient.from_server_address(
            f"127.0.0.1:{port}", False, folder.root_certificate.read_bytes(), [signing]
        ) as client:
            try:
                getattr(client, request)(content)
            except httpx.HTTPStatusError as error:
                return error.response.status_code
        return 200

    own = Signing(key, key)
    assert status("PullMessages", PullMessagesRequest(node=ann), own) == 200
    assert status("PullMessages", PullMessagesRequest(node=bob), own) == 401
    assert status("PushMessages", PushMessagesRequest(node=bob), own) == 401
    assert status("SendNodeHeartbeat", SendNodeHeartbeatRequest(node=bob), own) == 401
    assert status("DeactivateNode", DeactivateNodeRequest(node_id=bob.node_id), own) == 401
    assert status("PullMessages", PullMessagesRequest(node=bob), Signing(key, other)) == 401
    for ahead, expected in ((-290, 200), (-310, 401), (10, 401)):
        signing = Signing(key, key, ahead)
        assert status("PullMessages", PullMessagesRequest(node=ann), signing) == expected, ahead
    assert '/v1/fleet/push-messages HTTP/1.1" 401' in servers.log("superlink")


def test_a_supernode_that_was_killed_is_not_taken_for_revoked(running, processes):
    """Flower answers its successor as one whose key it does not know, for up to a minute."""
    coordinator, _ = running
    bob, port = SiteFolder(coordinator.folder.folder.parent / "bob"), coordinator.settings.port
    for name in ("killed", "successor"):
        start_supernode(processes, name, port, bob.root_certificate, bob.key)
        if name == "killed":
            wait_until(lambda: "SuperNode ID" in processes.log("killed"))
            processes.started["killed"].kill()
    status, log = processes.end_of("successor")
    assert status != 0 and "[code: 2004]" in log
    assert explain_end(bob) is None


def test_a_revoked_site_ends(running, processes):
    coordinator, servers = running
    site = let_in(coordinator, processes.folder / "cy")
    port = coordinator.settings.port
    root, key = site.root_certificate.read_text(), site.key.read_bytes()
    supernode = start_supernode(processes, "cy", port, site.root_certificate, site.key)
    wait_until(lambda: "SuperNode ID" in processes.log("cy"))
    findings = list(examine_connection("127.0.0.1", port, root, key))
    assert [f.level for f in findings] == ["ok"] * 5, findings  # while it runs, and undisturbed
    assert find_supernodes(site) == [supernode.pid]
    assert [f.level for f in examine_ports(site)] == ["ok"]
    assert explain_end(site) is None
    assert "no longer let in" in revoke(load_coordinator(coordinator.folder.folder), "cy")
    status, log = processes.end_of("cy")
    assert status == 0 and "SuperNode terminated gracefully" in log  # Flower does not say why
    assert '/v1/fleet/pull-messages HTTP/1.1" 401' in servers.log("superlink")
    found = examine_own_registration(site)  # so we do
    assert found.level == "fault" and "does not let this site's key in" in found.what
    assert explain_end(site) == f"{found.what} {found.advice}"
    with pytest.raises(registry.RegistryError, match="already in use"):
        (former,) = coordinator.folder.former.glob("cy-*/cy.pub")
        coordinator.folder.public_key("cy").write_bytes(former.read_bytes())
        registry.register(coordinator.folder, port, "cy")
