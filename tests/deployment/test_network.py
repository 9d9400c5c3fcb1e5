"""A deployment on a network that fails: its SuperLink dies, its line is slow and breaks."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from deployment.federated import Deployment, read_entries
from deployment.network import COORDINATOR, build_network
from deployment.sites import build_bare_config

from fedlora_app.deployment.processes import signal_session
from fedlora_app.deployment.witness import RECEIVED, SENT

pytestmark = [pytest.mark.deployment, pytest.mark.minutes]
CUT_SECONDS = 8.0


@pytest.fixture(scope="module")
def near(tiny_project, tmp_path_factory):
    """A coordinator and two sites on loopback, all started."""
    model = {"name": str(tiny_project / "model")}
    config = build_bare_config(model=model, federated={"clients_at_once": 0})
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
        federated={"num_rounds": 1},
    )
    deployment = Deployment(
        tmp_path_factory.mktemp("far"),
        tiny_project,
        config,
        host=COORDINATOR,
        at_coordinator=network.at_coordinator,
        at_site=network.at_site,
        variables={"FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": "4096"},
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


def test_a_round_is_finished_over_a_slow_line(far, network, tmp_path):
    before = network.count_sent()
    run = far.run("slow")
    run.end()
    update = find_update(far, "slow")
    assert update > 100 * 4096  # so many chunks at least
    assert network.count_sent() - before > update  # it went through the line
    far.check_evidence()
    far.check_result(run.path, tmp_path)


def test_an_update_whose_line_is_cut_arrives_in_the_end(far, network, tmp_path):
    """The site notices nothing but time-outs, and sends the pieces again that were lost."""
    run = far.run("cut")
    ann, about = far.sites["ann"], {"kind": "train", "run": "cut"}
    run.wait_until(lambda: far.events(ann, SENT, **about) > 0)
    before = network.count_sent()
    run.wait_until(lambda: network.count_sent() - before > 100_000)
    network.cut()
    assert far.events(far.coordinator, RECEIVED, **about) == 0
    time.sleep(CUT_SECONDS)
    network.mend()
    run.end()
    far.check_evidence()
    far.check_result(run.path, tmp_path)


def find_update(deployment: Deployment, run: str) -> int:
    """Return the size of the update that a run's coordinator has got, in bytes."""
    entries = read_entries(deployment.coordinator)
    about = {"event": RECEIVED, "kind": "train", "run": run}
    (update,) = (entry["bytes"] for entry in entries if about.items() <= entry.items())
    return update
