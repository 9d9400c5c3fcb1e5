"""A deployment on a network that fails: its SuperLink dies, its line is slow and breaks."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deployment.federated import Deployment, read_entries
from deployment.network import COORDINATOR, build_network
from deployment.sites import build_bare_config

from fedlora_app.deployment.processes import signal_session
from fedlora_app.deployment.witness import NO_REPLY, RECEIVED, SENT

pytestmark = [pytest.mark.deployment, pytest.mark.minutes]
CHUNK_BYTES = 4096
CUT_SECONDS = 8.0
DEADLINE_SECONDS = 25


@pytest.fixture(scope="module")
def near(tiny_project, tmp_path_factory):
    """A coordinator and two sites on loopback, all started."""
    model = {"name": str(tiny_project / "model")}
    config = build_bare_config(model=model, federated={"clients_at_once": 0, "min_clients": 1})
    deployment = Deployment(tmp_path_factory.mktemp("near"), tiny_project, config)
    with running(deployment):
        yield deployment


@pytest.fixture(scope="module")
def network():
    with build_network() as network:
        yield network


@pytest.fixture(scope="module")
def far(network, tiny_project, tmp_path_factory):
    """A coordinator and a site on two hosts, whose update takes some seconds of a slow line."""
    config = build_bare_config(
        ("ann",),
        model={"name": str(tiny_project / "model")},
        adapters={"global": {"rank": 256, "alpha": 256}},
    )
    deployment = Deployment(
        tmp_path_factory.mktemp("far"),
        tiny_project,
        config,
        host=COORDINATOR,
        at_coordinator=network.at_coordinator,
        at_site=network.at_site,
        variables={"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(CHUNK_BYTES)},
    )
    with running(deployment):
        network.limit("1mbit")
        yield deployment


@contextmanager
def running(deployment: Deployment) -> Iterator[None]:
    try:
        deployment.start()
        yield
    finally:
        deployment.stop()


def test_a_run_is_resumed_after_its_superlink_was_killed(near, tmp_path):
    """It is started again with its database; the sites' processes stay and reconnect."""
    before = {client: near.process(site, "supernode") for client, site in near.sites.items()}
    run = near.run("killed")
    run.wait_until(lambda: near.events(near.sites["ann"], RECEIVED, kind="train", round=2) > 0)
    signal_session(near.process(near.coordinator, "superlink").pid, signal.SIGKILL)
    assert "The run failed" in run.end(status=2)
    assert "Resuming after round 1 of 2." in near.run("killed", "--resume", "killed").end()
    assert near.process(near.coordinator, "superlink").num_restarts == 1
    for client, site in near.sites.items():
        assert near.process(site, "supernode") == before[client]
    near.check_evidence()
    near.check_result(run.path, tmp_path)


def test_a_round_goes_on_without_a_site_that_stands_still(near):
    """The next one has it again; what it answers late counts nothing."""
    deadline = f"federated.client_timeout_seconds={DEADLINE_SECONDS}"
    run = near.run("still", "--overrides", deadline)
    server, about = near.coordinator, {"run": "still", "client": "bob"}
    # Its SuperNode looks for the next message in some seconds, which it gets then or later.
    run.wait_until(lambda: near.events(server, RECEIVED, **about, kind="evaluate") > 0)
    paused = [near.process(near.sites["bob"], name) for name in ("supernode", "executor")]
    for process in paused:
        signal_session(process.pid, signal.SIGSTOP)
    try:
        run.wait_until(lambda: near.events(server, NO_REPLY, **about, round=1) > 0)
    finally:
        for process in paused:
            signal_session(process.pid, signal.SIGCONT)
    text = run.end()
    assert f"round 1: bob: no answer within {DEADLINE_SECONDS} seconds" in text
    assert [failed_in(entry) for entry in read_rounds(run.path)] == [[], ["bob"], []]
    assert near.events(server, RECEIVED, **about, kind="train", round=2) == 1
    near.check_evidence()


def test_a_slow_line_finishes_its_rounds_though_it_is_cut(far, network, tmp_path):
    """The second update is under way then; its pieces that were lost are sent again."""
    ann, about = far.sites["ann"], {"kind": "train", "round": 2}
    first = network.count_sent()
    run = far.run("slow")
    run.wait_until(lambda: far.events(ann, SENT, **about) > 0)
    update = find_update(far, server_round=1)
    assert update > 100 * CHUNK_BYTES  # so many pieces at least
    second = network.count_sent()
    assert second - first > update  # it went through the line
    run.wait_until(lambda: network.count_sent() - second > update // 4)
    network.cut()
    try:
        assert network.count_sent() - second < update
        assert far.events(far.coordinator, RECEIVED, **about) == 0
        time.sleep(CUT_SECONDS)
    finally:
        network.mend()
    assert "has lost the message" not in run.end()
    assert [failed_in(entry) for entry in read_rounds(run.path)] == [[], [], []]
    far.check_evidence()
    far.check_result(run.path, tmp_path)


def read_rounds(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "manifest.json").read_text())["rounds"]


def failed_in(entry: dict[str, Any]) -> list[str]:
    return sorted(entry.get("failures", {}))


def find_update(deployment: Deployment, server_round: int) -> int:
    """Return the size in bytes of a round's update, as the coordinator has got it."""
    about = {"event": RECEIVED, "kind": "train", "round": server_round}
    entries = read_entries(deployment.coordinator)
    (update,) = (entry["bytes"] for entry in entries if about.items() <= entry.items())
    return update
