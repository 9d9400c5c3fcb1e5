"""Proxies that the environment names: Flower goes through them, by httpx, even to this machine."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

OWN_NAMES = ("127.0.0.1", "::1", "localhost")


def spare_loopback() -> None:
    """Have this process, and those that it starts, reach this machine's own addresses directly.

    In a network with ``HTTPS_PROXY`` Flower's own processes would look for each other at the proxy.
    """
    named = [
        n for n in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy", "")).split(",") if n
    ]
    if "*" not in named:
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
            dict.fromkeys((*(name.strip() for name in named), *OWN_NAMES))
        )


def find_proxy(host: str) -> str | None:
    """Return the proxy through which Flower reaches a host, without what a password may be in."""
    proxies = getproxies_environment()
    url = proxies.get("https") or proxies.get("all")
    if not url or proxy_bypass_environment(host, proxies):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
