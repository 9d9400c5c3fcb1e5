"""Two hosts on one machine: network namespaces joined by a cable that can be cut and slowed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

COORDINATOR, SITE = "10.231.7.1", "10.231.7.2"


class Network:
    """A coordinator's host and a site's, with one cable between them.

    Args:
        name: of the two namespaces, which end in ``-a`` (the coordinator) and ``-b``.
    """

    def __init__(self, name: str) -> None:
        self._hosts = f"{name}-a", f"{name}-b"
        self._ends = f"{name}a", f"{name}b"

    def at_coordinator(self, *command: str) -> list[str]:
        """Return the command as it runs on the coordinator's host."""
        return ["ip", "netns", "exec", self._hosts[0], *command]

    def at_site(self, *command: str) -> list[str]:
        """Return the command as it runs on the site's host."""
        return ["ip", "netns", "exec", self._hosts[1], *command]

    def limit(self, rate: str) -> None:
        """Let no more through in either direction: ``"1mbit"``."""
        for host, end in zip(self._hosts, self._ends, strict=True):
            limits = "burst", "32kbit", "latency", "400ms"
            command = "tc", "qdisc", "replace", "dev", end, "root", "tbf", "rate", rate, *limits
            _run("ip", "netns", "exec", host, *command)

    def cut(self) -> None:
        """Pull the cable: what is under way is lost, and nobody is told."""
        _run("ip", "-n", self._hosts[1], "link", "set", self._ends[1], "down")

    def mend(self) -> None:
        """Put the cable back."""
        _run("ip", "-n", self._hosts[1], "link", "set", self._ends[1], "up")

    def count_sent(self) -> int:
        """Return how many bytes the site's host has sent."""
        show = "ip", "-n", self._hosts[1], "-statistics", "-json", "link", "show", self._ends[1]
        shown = json.loads(subprocess.run(show, check=True, capture_output=True).stdout)
        return shown[0]["stats64"]["tx"]["bytes"]

    def build(self) -> None:
        """Make hosts and cable."""
        for host in self._hosts:
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "set", "lo", "up")
        here, there = self._ends
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there)
        addresses = COORDINATOR, SITE
        for host, end, address in zip(self._hosts, self._ends, addresses, strict=True):
            _run("ip", "link", "set", end, "netns", host)
            _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", end)
            _run("ip", "-n", host, "link", "set", end, "up")

    def remove(self) -> None:
        """Take hosts and cable away; what runs there must have ended."""
        for host in self._hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


@contextmanager
def build_network() -> Iterator[Network]:
    """Yield a network, or skip where this machine lets nobody make one."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root and iproute2")
    network = Network(f"fl{os.getpid() % 100_000}")
    try:
        try:
            network.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield network
    finally:
        network.remove()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
