"""What ``fedlora deploy doctor`` looks at in a site's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from fedlora_app.deployment.connection import (
    NOT_LET_IN,
    examine_connection,
    examine_registration,
)
from fedlora_app.deployment.facts import Facts
from fedlora_app.deployment.finding import Finding, fault, ok, warning
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.machine_checks import (
    compare_code,
    examine_disk,
    examine_rights,
    guarded,
)
from fedlora_app.deployment.site import SiteError, fingerprint_key_file, load_facts
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.terminal import shell

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
LISTENING = "0A"  # a socket's state in /proc/net/tcp
LOOPBACK = ("127.", "::1")


def examine_site(folder: Path) -> Iterator[Finding]:
    """Yield what is found at a site's end."""
    from fedlora_app.deployment.own_file_checks import examine_own_files  # imports torch

    site = SiteFolder(folder)
    secrets = (site.key, site.next_key, site.client_file, site.executor_secret, site.store)
    yield from examine_rights(secrets, folder)
    yield examine_disk(folder)
    yield from examine_ports(site)
    try:
        facts = load_facts(site)
    except SiteError as error:
        yield fault("package", str(error), "")
        return
    yield from compare_code("the coordinator", facts.code_sha256, facts.flwr, facts.fedlora_app)
    yield from _examine_key(site, facts)
    root = site.root_certificate.read_text()
    yield from examine_connection(facts.host, facts.port, root, site.key.read_bytes())
    yield _examine_gpu()
    name = site.client_file.name
    yield from guarded(name, lambda: examine_own_files(site, facts))


def examine_own_registration(site: SiteFolder) -> Finding:
    """Ask the SuperLink whether it lets this site in."""
    facts = load_facts(site)
    root = site.root_certificate.read_text()
    return examine_registration(facts.address, root, site.key.read_bytes())


def explain_end(site: SiteFolder) -> str | None:
    """Return why a SuperNode that has ended is not to be started again; None where it may be.

    One whose key was revoked says only that it has "terminated gracefully", with status 0. A
    SuperLink that does not answer, or to a signature by a wrong clock, says nothing of the key.
    """
    try:
        found = examine_own_registration(site)
    except (OSError, UserError):  # the folder is being changed, as by fedlora deploy join
        return None
    return f"{found.what} {found.advice}" if found.what == NOT_LET_IN else None


def _examine_key(site: SiteFolder, facts: Facts) -> Iterator[Finding]:
    if fingerprint_key_file(site.key) == facts.key:
        yield ok("key", f"it is the one that the package is for, {facts.client}'s.")
    else:
        advice = f"fedlora deploy join the package that came last, --site {shell(site.folder)}"
        yield fault("key", "it is not the one that the package is for.", advice)


def _examine_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        what = (
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
        )
        return ok("gpu", f"{what}.")
    if NVIDIA_DRIVER.exists():
        advice = "Install the torch for this driver's CUDA: https://pytorch.org/get-started"
        return fault(
            "gpu", f"there is a driver, and torch {torch.__version__} sees no GPU.", advice
        )
    return warning("gpu", "none; training runs on the CPU.", "That is enough for small models.")


def examine_ports(site: SiteFolder) -> Iterator[Finding]:
    """Look at whether this site's SuperNode, if it runs, can be reached from other machines."""
    pids = find_supernodes(site)
    reachable = sorted({a for pid in pids for a in listening_addresses(pid) if _is_open(a)})
    if reachable:
        what = f"the SuperNode listens on {', '.join(reachable)}, which other machines may reach."
        yield fault("ports", what, "Start it by fedlora deploy start, on loopback alone.")
    elif pids:
        yield ok("ports", "the SuperNode listens on loopback alone; all its connections go out.")
    else:
        yield ok("ports", "no SuperNode of this site runs, and it needs no port from outside.")


def find_supernodes(site: SiteFolder) -> list[int]:
    """Return the processes that were given this site's key."""
    key, found = site.key.resolve(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (entry / "cmdline").read_text(errors="replace").split("\0")
            working = Path(os.readlink(entry / "cwd"))
            named = [working / a for a in arguments if a.endswith(site.key.name)]
            if any(path.resolve() == key for path in named):
                found.append(int(entry.name))
    return found


def listening_addresses(pid: int) -> set[str]:
    """Return where a process of this user listens, as Linux has it below /proc."""
    links = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in links:
                    found.add(_read_address(fields[1]))
    return found


def _read_address(text: str) -> str:
    """Return "0100007F:1F40" as "127.0.0.1:8000": each four bytes are the other way round."""
    digits, port = text.split(":")
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    return f"{ip_address(b''.join(words))}:{int(port, 16)}"


def _is_open(address: str) -> bool:
    return not ip_address(address.rpartition(":")[0]).is_loopback
