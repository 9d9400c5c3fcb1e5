"""Who takes part: what the coordinator does to let one site in, change its key, or remove it.

A command writes that site's files and its entry in ``coordinator.yaml``, and no other site's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora_app.deployment.coordinator import (
    APPROVED,
    INVITED,
    REVOKED,
    Coordinator,
    CoordinatorError,
    SiteEntry,
    former_fingerprints,
    load_coordinator,
    register_pending,
)
from fedlora_app.deployment.evidence import Evidence
from fedlora_app.deployment.happenings import (
    SITE_APPROVED,
    SITE_INVITED,
    SITE_REVOKED,
    SITE_ROTATED,
)
from fedlora_app.deployment.keys import (
    MAX_REQUEST_BYTES,
    CredentialError,
    Request,
    check_request,
    make_secret_dir,
    write_public,
)
from fedlora_app.deployment.package import build_package
from fedlora_app.deployment.registry import RegistryError, is_listening
from fedlora_app.foundation.files import lock_folder

LATER = "the next approve, rotate or revoke"
"""What tells the SuperLink of all sites besides its start."""


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
        which = f"which does not let in {request.client} yet"
        return _let_in(coordinator, request, SITE_APPROVED, which)


def rotate(coordinator: Coordinator, request: Request) -> str:
    """Let a site in by a new key and no longer by its old one; return what was done."""
    with _changing(coordinator):
        check_rotation(coordinator, request)
        _retire(coordinator, request.client)
        which = f"which may still let in {request.client} by its old key, and not by the new one"
        return _let_in(coordinator, request, SITE_ROTATED, which)


def revoke(coordinator: Coordinator, site: str) -> str:
    """Let a site in no longer, move its request and package aside, and return what was done."""
    which = f"which may still let in {site}"
    goes_on = (which, f"fedlora deploy revoke {site}, which can be repeated until it succeeds")
    with _changing(coordinator):
        entry = _find_entry(coordinator, site)
        if entry.status == REVOKED:  # the SuperLink may not have heard of it
            return _tell_superlink(coordinator, *goes_on)
        _retire(coordinator, site)
        coordinator.change_site(site, SiteEntry(status=REVOKED))
        _enter(coordinator, SITE_REVOKED, site, entry.fingerprint)
        return _tell_superlink(coordinator, *goes_on)


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
        _enter(coordinator, SITE_INVITED, site)


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


def _let_in(coordinator: Coordinator, request: Request, event: str, which: str) -> str:
    site, folder = request.client, coordinator.folder
    content = json.dumps(request.dump(), indent=2)
    write_public(folder.request(site), f"{content}\n".encode())
    write_public(folder.public_key(site), f"{request.public_key}\n".encode())
    entry = SiteEntry(status=APPROVED, fingerprint=request.fingerprint)
    coordinator.change_site(site, entry)
    write_package(coordinator, site)
    _enter(coordinator, event, site, request.fingerprint)
    return _tell_superlink(coordinator, which)


def _enter(coordinator: Coordinator, event: str, site: str, key: str = "") -> None:
    """Enter what was done in the coordinator's evidence, before the SuperLink is told."""
    Evidence(coordinator.folder.evidence).add(event, client=site, key=key or None)


def _tell_superlink(coordinator: Coordinator, which: str, again: str = LATER) -> str:
    """Register what changed, if the SuperLink runs, and return what was done.

    Args:
        which: what the SuperLink goes on doing until it is told.
        again: what tells it.

    Raises:
        RegistryError: it did not do it.
    """
    port = coordinator.settings.port
    if not is_listening(port):
        return "The SuperLink does not run; fedlora deploy start will tell it."
    try:
        done = register_pending(coordinator.folder.folder)
    except (RegistryError, OSError) as error:
        raise RegistryError(
            f"Here it is done, but not at the SuperLink, {which}. Something listens on port {port} "
            f"and did not do what was asked: {error} It is told of all sites by {again}, and when "
            "it starts."
        ) from None
    return "\n".join(done) or "The SuperLink knew already."


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
    if request.fingerprint in former_fingerprints(coordinator.folder):
        raise CoordinatorError(
            f"The key of this request is one that is no longer let in. {request.client} makes a "
            f"new one: fedlora deploy request {request.client} --new-key"
        )


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
