"""What ``fedlora deploy doctor`` looks at in a coordinator's folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
from cryptography import x509

from fedlora_app.deployment import registry
from fedlora_app.deployment.connection import build_context, examine_certificate, judge_dates
from fedlora_app.deployment.coordinator import Coordinator, load_coordinator
from fedlora_app.deployment.finding import Finding, fault, ok, warning
from fedlora_app.deployment.keys import general_name, load_certificate
from fedlora_app.deployment.machine_checks import (
    compare_code,
    examine_disk,
    examine_rights,
    guarded,
)
from fedlora_app.deployment.package import read_package
from fedlora_app.foundation.terminal import shell

STRANGER = "127.0.0.2"  # of this machine, and not one of the addresses that the SuperLink trusts


def examine_coordinator(folder: Path) -> Iterator[Finding]:
    """Yield what is found at the coordinator's end."""
    coordinator = load_coordinator(folder)
    files = coordinator.folder
    yield from examine_rights((files.root_key, files.key, files.database), files.folder)
    yield from guarded("certificate", lambda: _examine_certificates(coordinator))
    yield _examine_name(coordinator.settings.host)
    yield from guarded("experiment", lambda: _examine_sites(coordinator))
    yield examine_disk(files.folder)
    if not coordinator.is_running:
        what = f"no SuperLink of this deployment answers at port {coordinator.settings.port}."
        yield warning("superlink", what, f"fedlora deploy start {shell(folder)}")
        return
    yield ok("superlink", f"it answers at port {coordinator.settings.port}.")
    root = files.root_certificate.read_text()
    yield examine_certificate("127.0.0.1", coordinator.settings.port, root)
    yield from guarded("strangers", lambda: [examine_strangers(coordinator, root)])
    yield from guarded("keys", lambda: _examine_keys(coordinator))


def _examine_certificates(coordinator: Coordinator) -> Iterator[Finding]:
    files, host = coordinator.folder, coordinator.settings.host
    root = load_certificate(files.root_certificate.read_bytes())
    own = load_certificate(files.certificate.read_bytes())
    yield judge_dates("root", "the authority's certificate", root.not_valid_after_utc)
    try:
        own.verify_directly_issued_by(root)
    except Exception:  # of cryptography's several kinds
        advice = "fedlora deploy renew"
        yield fault("certificate", "that of the SuperLink is not by this authority.", advice)
        return
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if general_name(host) not in names:
        yield fault("certificate", f"it does not name {host}.", "fedlora deploy renew")
        return
    yield judge_dates("certificate", f"the SuperLink's, for {host}", own.not_valid_after_utc)


def _examine_name(host: str) -> Finding:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        what = f"{host} cannot be resolved here: {error.strerror}."
        return warning("name", what, "Sites must be able to; ask whoever runs your DNS.")
    return ok("name", f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}.")


def _examine_sites(coordinator: Coordinator) -> Iterator[Finding]:
    clients = coordinator.load_experiment().client_ids
    sites = coordinator.settings.sites
    yield ok("experiment", f"{coordinator.config_path} names {', '.join(clients)}.")
    for site, entry in sites.items():
        if site not in clients and entry.status != "revoked":
            advice = f"fedlora deploy revoke {site}, or name it in the experiment again."
            yield fault("sites", f"{site} is {entry.status} and not in the experiment.", advice)
        elif entry.status == "invited":
            advice = "fedlora deploy approve FILE, when its request has come."
            yield warning("sites", f"{site} is invited and has no key yet.", advice)
        elif entry.status == "approved":
            yield from guarded("package", lambda site=site: _examine_package(coordinator, site))
    for client in clients:
        if client not in sites:
            advice = f"fedlora deploy add {client}"
            yield warning("sites", f"the experiment names {client}, which is not invited.", advice)


def _examine_package(coordinator: Coordinator, site: str) -> Iterator[Finding]:
    path = coordinator.folder.package(site)
    if not path.exists():
        yield fault(
            "package", f"{site} is approved and has none.", f"fedlora deploy package {site}"
        )
        return
    facts = read_package(path).facts
    name = f"the package of {site}"
    findings = compare_code(name, facts.code_sha256, facts.flwr, facts.fedlora_app)
    for found in findings:
        advice = f"fedlora deploy package {site}, and have the site install this commit."
        yield fault(found.name, found.what, advice) if found.level == "fault" else found


def examine_strangers(coordinator: Coordinator, root: str) -> Finding:
    """Call the Control API as another machine would."""
    url = f"https://127.0.0.1:{coordinator.settings.port}/v1/control/list-runs"
    transport = httpx.HTTPTransport(local_address=STRANGER, verify=build_context(root))
    try:
        with httpx.Client(transport=transport, timeout=registry.ANSWER_SECONDS) as client:
            status = client.post(url).status_code
    except httpx.HTTPError:  # where other loopback addresses have to be set up first, as on macOS
        return warning("strangers", "not looked at: this machine has no 127.0.0.2.", "")
    if status == httpx.codes.FORBIDDEN:
        return ok("strangers", "the Control API refuses whoever does not come from this machine.")
    advice = "Stop it, and start it by fedlora deploy start, which has it refuse them."
    what = "whoever reaches this port can start runs, which is to run code here."
    return fault("strangers", what, advice)


def _examine_keys(coordinator: Coordinator) -> Iterator[Finding]:
    nodes = registry.list_nodes(coordinator.folder, coordinator.settings.port)
    status = {node.fingerprint: node.status for node in nodes}
    known = {entry.fingerprint for entry in coordinator.approved.values()}
    for site, entry in coordinator.approved.items():
        if entry.fingerprint in status:
            yield ok(
                "keys", f"that of {site} is registered; {site} is {status[entry.fingerprint]}."
            )
        else:
            advice = f"fedlora deploy start {shell(coordinator.folder.folder)} registers it."
            yield fault("keys", f"that of {site} is not registered.", advice)
    for node in nodes:
        if node.fingerprint not in known:
            what = f"the SuperLink lets in one that no approved site has: {node.fingerprint}."
            yield fault("keys", what, f"flwr supernode unregister {node.node_id}")
