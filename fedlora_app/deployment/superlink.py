"""Flower's SuperLink, of which other machines reach nothing but what a SuperNode needs.

Flower serves its Fleet API (SuperNodes, each call signed), its Control API (``flwr run``) and its
Runtime API (the ServerApp) at one port. In its open edition the Control API asks nobody who they
are: whoever reaches the port could start a run, which is to run code here. So this is Flower's own
``flower-superlink`` with one middleware, put where Flower takes those of extensions: in front of
all others. It refuses what comes from elsewhere, except for the Fleet API and ``/health``.

    python -m fedlora_app.deployment.superlink --host 0.0.0.0 --port 8000 ...
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from logging import WARN

from flwr.supercore import log
from flwr.superlink import extensions, main
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedlora_app.deployment.happenings import CALL_REFUSED
from fedlora_app.deployment.proxies import spare_loopback
from fedlora_app.deployment.record import record
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import keep_files_private

OWN_ADDRESSES = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
"""Of this machine's own processes: ``flwr`` and the ServerApp."""
BIND_ADDRESSES = {"0.0.0.0", "::", "127.0.0.1", "::1", "localhost"}
"""With another one the ServerApp, which Flower starts, would not come from a loopback address."""
FLEET = "/v1/fleet/"
HEALTH = "/health"
REFUSAL = "From other machines this SuperLink serves the Fleet API only.\n"
ENTRY_SECONDS, MAX_PATH_CHARS = 60.0, 80
UNUSUAL = re.compile(r"[^\w/.%-]", re.ASCII)
"""In a path that anybody may have sent, and that people read in a terminal."""
REMOVED = {
    "FLWR_INTERNAL_GRPC_CONTROL_API",  # opens a second port with the same Control API
    "FLWR_INTERNAL_GRPC_FLEET_API",
    "FORWARDED_ALLOW_IPS",  # has uvicorn believe a header that says where a request comes from
}


class FleetOnly:
    """Refuses what is neither from this machine nor for SuperNodes, before anything reads it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.refusals = Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403 and enter it in log and evidence."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            self.refusals.close()
        elif is_served(scope):
            await self.app(scope, receive, send)
        else:
            address = (scope.get("client") or ("an unknown address",))[0]
            self.refusals.enter(address, str(scope.get("path")))
            await PlainTextResponse(REFUSAL, status_code=403)(scope, receive, send)


@dataclass
class Refusals:
    """What was refused, in log and evidence: one a minute, with how many came since the last.

    So who calls again and again fills neither, and both say how often.
    """

    entered: float = -math.inf
    """When the last entry was made, by the monotonic clock."""
    num_passed_over: int = 0

    def enter(self, address: str, path: str) -> None:
        """Enter a refusal, or count it where there was one within a minute."""
        if time.monotonic() - self.entered < ENTRY_SECONDS:
            self.num_passed_over += 1
            return
        shown = UNUSUAL.sub("?", path[:MAX_PATH_CHARS])
        log(WARN, "Refused %s from %s: %s", shown, address, REFUSAL.strip())
        self._record(address=address, path=shown)
        self.entered = time.monotonic()

    def close(self) -> None:
        """Enter how many were counted and not entered."""
        if self.num_passed_over:
            self._record()

    def _record(self, **fields: str) -> None:
        try:
            record(CALL_REFUSED, **fields, passed_over=self.num_passed_over)
        except (OSError, UserError) as error:  # it is refused all the same
            log(WARN, "Not entered in the evidence: %s", error)
        self.num_passed_over = 0


def is_served(scope: Scope) -> bool:
    """Return whether a request is one of this machine, or one that any machine may make."""
    client = scope.get("client")
    if client and client[0] in OWN_ADDRESSES:
        return True
    path = scope["path"]
    return scope["type"] == "http" and (
        path == HEALTH or (path.startswith(FLEET) and ".." not in path.split("/"))
    )


def run() -> None:
    """Run ``flower-superlink`` with its own arguments, and with the middleware in front."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    host = parser.parse_known_args()[0].host
    if host not in BIND_ADDRESSES:
        sys.exit(
            f"--host {host}: expected 0.0.0.0 or :: (all of this machine's addresses), or a "
            "loopback address. The ServerApp, on this machine, reaches the SuperLink by loopback; "
            "let a firewall choose the interface."
        )
    keep_files_private()  # its database holds every message that is under way
    spare_loopback()  # for the ServerApp, which Flower starts
    for name in REMOVED:
        os.environ.pop(name, None)
    theirs = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(FleetOnly), *theirs())
    if main._get_middleware()[0].cls is not FleetOnly:  # never open to all by a change in Flower
        sys.exit("This version of Flower puts another middleware first. Install flwr 1.41.")
    flower_superlink()


if __name__ == "__main__":
    run()
