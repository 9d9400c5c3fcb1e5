"""What the SuperLink's middleware refuses, and how much of it is entered."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette

from fedlora_app.deployment import superlink
from fedlora_app.deployment.audit import read_log
from fedlora_app.deployment.happenings import CALL_REFUSED
from fedlora_app.deployment.record import EVIDENCE_VARIABLE
from fedlora_app.deployment.superlink import FleetOnly

STRANGER = "203.0.113.9"


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    monkeypatch.setenv(EVIDENCE_VARIABLE, str(tmp_path / "evidence.jsonl"))
    return tmp_path / "evidence.jsonl"


def call(app: FleetOnly, *paths: str, address: str = STRANGER) -> list[int]:
    """Return the statuses of calls from an address."""

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app, client=(address, 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://fed") as client:
            return [(await client.post(path)).status_code for path in paths]

    return asyncio.run(ask())


def live_and_end(app: FleetOnly) -> None:
    """Let a server's life pass, as it tells its application of it."""
    tells = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, str]:
        return {"type": next(tells)}

    async def send(message: object) -> None:
        pass

    asyncio.run(app({"type": "lifespan"}, receive, send))


def test_refusals_are_entered_once_a_minute_and_counted(evidence):
    app = FleetOnly(Starlette())
    assert call(app, *["/v1/control/start-run?1"] * 30) == [403] * 30
    assert len(read_log(evidence).entries) == 1
    live_and_end(app)
    first, last = read_log(evidence).entries
    assert first["event"] == last["event"] == CALL_REFUSED
    assert (first["address"], first["path"]) == (STRANGER, "/v1/control/start-run")
    assert (first["passed_over"], last["passed_over"]) == (0, 29)
    assert "address" not in last


def test_later_ones_are_entered_and_paths_are_short_and_plain(evidence, monkeypatch):
    monkeypatch.setattr(superlink, "ENTRY_SECONDS", 0.0)
    call(FleetOnly(Starlette()), "/%1b%5b31m" + "x" * 10_000, "/docs")
    long, short = read_log(evidence).entries
    assert long["path"].startswith("/??31mxx") and len(long["path"]) == 80
    assert short["path"] == "/docs"


def test_what_is_served_is_not_entered(evidence):
    app = FleetOnly(Starlette())  # which has none of them, and says so
    assert call(app, "/v1/control/list-runs", address="127.0.0.1") == [404]
    assert call(app, "/v1/fleet/pull-messages") == [404]
    live_and_end(app)
    assert not evidence.exists()


def test_who_cannot_be_entered_is_refused_all_the_same(evidence):
    evidence.mkdir()
    assert call(FleetOnly(Starlette()), "/docs") == [403]
