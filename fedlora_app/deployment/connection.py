"""Looks at the way from a site to its SuperLink, step by step, and stops where it is blocked.

Nothing of it has an effect on a SuperNode that runs.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from fedlora_app.deployment.finding import Finding, fault, ok, warning
from fedlora_app.deployment.keys import load_site_key
from fedlora_app.deployment.proxies import find_proxy

CONNECT_SECONDS = 5.0
RENEW_DAYS = 30
AHEAD_SECONDS, BEHIND_SECONDS = 5, 305
"""How far a signature may be dated from Flower's clock: SYSTEM_TIME_TOLERANCE into the future, and
TIMESTAMP_TOLERANCE beyond that into the past."""
CLOCK_MARGIN_SECONDS = 2  # the Date header has whole seconds, and the way takes time
NOT_LET_IN = "the SuperLink does not let this site's key in."
UNREGISTERED, BAD_HEARTBEAT = 2004, 2003
"""Flower's error codes for a key that it does not know, and for an impossible interval."""
VERIFY_ADVICE = {
    9: ("is not valid yet", "Set this machine's clock."),
    10: ("has expired", "At the coordinator: fedlora deploy renew, and start the SuperLink again."),
    62: ("is for another name", "At the coordinator: fedlora deploy init with this --host."),
    64: ("is for another address", "At the coordinator: fedlora deploy init with this --host."),
}
OTHER_AUTHORITY = (
    "is not by the authority of the package",
    "Somebody else answers there, or the coordinator has made a new deployment: ask it by "
    "telephone, and do not go on before.",
)


def examine_connection(host: str, port: int, root: str, key: bytes) -> Iterator[Finding]:
    """Look at name, port, certificate, clock and registration, in this order.

    Args:
        root: the authority's certificate, PEM.
        key: the site's private key.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if proxy := find_proxy(host):
        what = f"HTTPS_PROXY is set, so Flower reaches {host} through {proxy}."
        advice = f"If it is to be reached directly, as the lines below do: NO_PROXY={host}"
        yield warning("proxy", what, advice)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "Ask the coordinator for its name, and whoever runs this network for its DNS."
        yield fault("name", f"{host} cannot be resolved: {error.strerror}.", advice)
        return
    yield ok("name", f"{host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}.")
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        yield fault(
            "port",
            f"{address} does not answer: {error.strerror or error}.",
            f"Is the SuperLink running, and does this network let TCP out to port {port}?",
        )
        return
    yield ok("port", f"{address} answers.")
    tls = examine_certificate(host, port, root)
    yield tls
    if tls.level != "fault":
        yield _examine_clock(address, root)
        yield examine_registration(address, root, key)


def examine_certificate(host: str, port: int, root: str) -> Finding:
    """Look at the chain, the names and the dates of the certificate that a server shows."""
    name = "certificate"
    context = build_context(root)
    try:
        with (
            socket.create_connection((host, port), CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            shown: Any = connection.getpeercert()
    except ssl.SSLCertVerificationError as error:
        what, advice = VERIFY_ADVICE.get(error.verify_code, OTHER_AUTHORITY)
        return fault(name, f"that of {host} {what}.", advice)
    except ssl.SSLError as error:
        what = f"{host}:{port} does not speak TLS ({error.reason})."
        return fault(name, what, "A SuperLink without encryption, or another program, is there.")
    except OSError as error:
        return fault(name, f"the connection broke: {error}.", "Try again.")
    names = [value for kind, value in shown.get("subjectAltName", ())]
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(shown["notAfter"]), UTC)
    return judge_dates(name, f"of {host}, for {', '.join(names)}, by the right authority", end)


def judge_dates(name: str, what: str, end: datetime) -> Finding:
    """Return what the end of a certificate's validity means today."""
    days = (end - datetime.now(UTC)).days
    text = f"{what}; valid for {days} days, until {end:%Y-%m-%d}."
    if days < 0:
        return fault(name, f"{what}; it ended on {end:%Y-%m-%d}.", VERIFY_ADVICE[10][1])
    if days < RENEW_DAYS:
        advice = "At the coordinator: fedlora deploy renew, then start the SuperLink again."
        return warning(name, text, advice)
    return ok(name, text)


def build_context(root: str) -> ssl.SSLContext:
    """Return what accepts certificates of this authority and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root)
    return context


def _examine_clock(address: str, root: str) -> Finding:
    name = "clock"
    try:
        before = time.time()
        headers = httpx.get(
            f"https://{address}/health", verify=build_context(root), timeout=CONNECT_SECONDS
        ).headers
        middle = (before + time.time()) / 2
        theirs = parsedate_to_datetime(headers["date"]).timestamp() + 0.5
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return warning(name, f"not compared: {error!r}.", "See the other lines.")
    return judge_clock(middle - theirs)


def judge_clock(ahead: float) -> Finding:
    """Return what a difference between this clock and the SuperLink's means.

    Args:
        ahead: seconds by which this one is ahead.
    """
    name = "clock"
    way = "ahead of" if ahead > 0 else "behind"
    what = f"{abs(ahead):.0f} s {way} the SuperLink's; signatures may be {AHEAD_SECONDS} s ahead "
    what += f"and {BEHIND_SECONDS} s behind."
    advice = "Set it by NTP: timedatectl set-ntp true"
    if not -BEHIND_SECONDS + CLOCK_MARGIN_SECONDS < ahead < AHEAD_SECONDS:
        return fault(name, what, advice)
    if abs(ahead) > CLOCK_MARGIN_SECONDS:
        return warning(name, what, advice)
    return ok(name, f"as the SuperLink's, within {CLOCK_MARGIN_SECONDS} s.")


def examine_registration(address: str, root: str, key: bytes) -> Finding:
    """Ask the SuperLink whether it knows a key.

    By a call that cannot succeed: to activate a node with an impossible heartbeat interval. Flower
    looks for the key first and at the interval then, so its error says whether the key is known,
    also while a SuperNode is online with it, which goes on. (An activation that could succeed is
    answered in that case as that of an unknown key.)
    """
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import FlowerError
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    name, private = "registration", load_site_key(key)
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    asked = ActivateNodeRequest(
        public_key=public_key_to_bytes(private.public_key()), heartbeat_interval=0
    )
    status, code = 0, 0
    try:
        with FleetHttpClient.from_server_address(
            address, False, root.encode(), interceptors=interceptors
        ) as client:
            client.ActivateNode(asked)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        told = FlowerError.from_json(error.response.text)
        code = told.code if told is not None else 0
    except (httpx.HTTPError, ValueError) as error:
        return warning(name, f"the SuperLink was not asked: {error}.", "Try again.")
    if code == BAD_HEARTBEAT:
        return ok(name, "the SuperLink lets this key in.")
    if code == UNREGISTERED:
        advice = "Ask the coordinator: the key is not approved yet, or it was revoked."
        return fault(name, NOT_LET_IN, advice)
    if status == httpx.codes.UNAUTHORIZED:
        return fault(name, "the SuperLink refuses this site's signature.", "See the clock.")
    what = f"the SuperLink gave an unexpected answer (HTTP {status}, code {code})."
    return warning(name, what, "Compare the versions of flwr.")
