"""What ``fedlora deploy doctor`` looks at on the machines of both ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from fedlora_app import __version__
from fedlora_app.deployment.finding import Finding, fault, ok, warning
from fedlora_app.deployment.keys import describe_rights
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.project import hash_package

MIN_DISK_BYTES, GOOD_DISK_BYTES = 2 * 10**9, 20 * 10**9


def examine_rights(secrets: Iterable[Path], folder: Path) -> Iterator[Finding]:
    """Look at who may read the files that only their owner should."""
    open_ones = [path for path in (folder, *secrets) if path.exists() and describe_rights(path)]
    for path in open_ones:
        mode = "700" if path.is_dir() else "600"
        what = f"{path} has {describe_rights(path)}, so that others on this machine may use it."
        yield fault("rights", what, f"chmod {mode} {path}")
    if not open_ones:
        yield ok("rights", "keys and folder are their owner's alone.")


def examine_disk(folder: Path) -> Finding:
    """Look at the free space where the deployment writes."""
    free = shutil.disk_usage(folder).free
    what = f"{free / 1e9:.1f} GB are free."
    if free < MIN_DISK_BYTES:
        return fault("disk", what, "Make room: adapters and databases are written here.")
    if free < GOOD_DISK_BYTES:
        return warning("disk", what, "A long run with kept rounds may need more.")
    return ok("disk", what)


def compare_code(name: str, code_sha256: str, flwr: str, fedlora_app: str) -> Iterator[Finding]:
    """Look at whether this end's code and Flower are those that a package names."""
    if code_sha256 == hash_package():
        yield ok("code", f"fedlora-app {__version__} ({code_sha256[:12]}) is that of {name}.")
    else:
        what = f"the installed code ({hash_package()[:12]}) is not that of {name} "
        what += f"({code_sha256[:12]}, fedlora-app {fedlora_app})."
        yield fault("code", what, "Install the same commit at both ends, or ask for a new package.")
    if flwr == version("flwr"):
        yield ok("flwr", f"{flwr}, as {name} has it.")
    else:
        what = f"{version('flwr')} is installed and {name} has {flwr}."
        yield fault("flwr", what, f"pip install flwr=={flwr}")


def guarded(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what a look finds; an error that has a sentence becomes a fault."""
    try:
        yield from look()
    except (UserError, OSError) as error:
        yield fault(name, str(error), "")
