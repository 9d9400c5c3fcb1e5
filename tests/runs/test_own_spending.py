"""A client counts what its own noise has spent, whatever a server asks for and how often."""

from __future__ import annotations

import json
import math

import pytest
from deployment.sites import build_bare_config, build_federation, set_policy
from loopback import Federation

from fedlora_app import client_app
from fedlora_app.federation.accountant import Sampling, compute_epsilon
from fedlora_app.federation.messages import read_task
from fedlora_app.federation.replies import RoundError
from fedlora_app.runs.own_spending import OwnRelease, OwnSpending
from fedlora_app.runs.paths import RunDirectoryError

DELTA = 1e-5
CLIENT = {"unit": "client", "noise": "client", "clip_norm": 0.2, "delta": DELTA}
RECORD = {"unit": "record", "clip_norm": 1.0, "delta": DELTA}


def asking_twice(grid_class, **changes):
    """Return a grid whose server asks for round 1 once more before, with other settings."""

    class Twice(grid_class):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                is_training = message.metadata.message_type == "train"
                if not is_training or read_task(message).server_round != 1:
                    continue
                record = message.content.config_records["task"]
                told = record["experiment"]
                raw = json.loads(told)
                raw["training"] |= changes
                record["experiment"] = json.dumps(raw)
                context = self.contexts[message.metadata.dst_node_id]
                client_app.app(message, context)
                record["experiment"] = told
            return super().push_messages(messages)

    return Twice


def run(project, folder, privacy, grid="", rules=None, **changes):
    config = build_bare_config(privacy=privacy, evaluation={"interval": 0})
    federation = build_federation(project, folder, config)
    if rules is not None:
        set_policy(federation, "ann", privacy=rules)
    if grid:
        federation.grid_class = asking_twice(Federation.grid_class, **changes)
    federation.run()
    return federation


def listed(federation):
    """Return what ann has entered."""
    (path,) = federation.own_files["ann"].parent.rglob("clients/ann/releases.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.minutes
def test_what_is_asked_twice_counts_twice_only_where_it_is_another(tiny_project, tmp_path):
    privacy = CLIENT | {"noise_multiplier": 2.0}
    same = listed(run(tiny_project, tmp_path / "same", privacy, "twice"))
    assert [entry["server_round"] for entry in same] == [1, 2]
    other = listed(run(tiny_project, tmp_path / "other", privacy, "twice", learning_rate=0.5))
    assert [entry["server_round"] for entry in other] == [1, 1, 2]
    assert len({entry["sha256"] for entry in other}) == 3


@pytest.mark.minutes
def test_nothing_leaves_above_the_experiments_epsilon(tiny_project, tmp_path):
    privacy = RECORD | {"epsilon": 3.0}
    whole = listed(run(tiny_project, tmp_path / "whole", privacy, "twice"))  # the same
    assert [entry["steps"] for entry in whole] == [2, 2]  # of 2 of 4 records
    assert {(entry["per_step"], entry["records"]) for entry in whole} == {(2, 4)}
    with pytest.raises(RoundError, match=r"Round 2: with this update epsilon \d\.\d+ would have"):
        run(tiny_project, tmp_path / "other", privacy, "twice", learning_rate=0.5)


def test_nor_above_the_policys(tiny_project, tmp_path):
    """Which two rounds do not reach, and a third answer does."""
    rules = {"epsilon": compute_epsilon(DELTA, [(2.0, 2)])}
    privacy = CLIENT | {"noise_multiplier": 2.0}
    with pytest.raises(RoundError, match="ann: its policy refuses: privacy"):
        run(tiny_project, tmp_path, privacy, "twice", rules, learning_rate=0.5)
    lines = next(tmp_path.rglob("clients/ann/releases.jsonl")).read_text().splitlines()
    assert [json.loads(line)["server_round"] for line in lines] == [1, 1]


@pytest.mark.minutes
def test_without_own_noise_there_is_no_list(tiny_project, tmp_path):
    federation = run(tiny_project, tmp_path, {})
    assert not list(tmp_path.rglob("releases.jsonl")) and federation.path.is_dir()


class TestSpending:
    def test_it_is_the_accountants(self, tmp_path):
        spending = OwnSpending(tmp_path / "releases.jsonl")
        first, second = (OwnRelease(n, "client", 2.0, 1, 1, 1, str(n)) for n in (1, 2))
        assert spending.compute(first, DELTA) == compute_epsilon(DELTA, [(2.0, 1)])
        spending.note(first)
        spending.note(first)
        assert spending.compute(first, DELTA) == compute_epsilon(DELTA, [(2.0, 1)])
        assert spending.compute(second, DELTA) == compute_epsilon(DELTA, [(2.0, 2)])
        assert len(spending.path.read_text().splitlines()) == 1

    def test_the_highest_chance_bounds_all_steps(self, tmp_path):
        spending = OwnSpending(tmp_path / "releases.jsonl")
        spending.note(OwnRelease(1, "record", 2.0, 10, 2, 20, "a"))
        spent = spending.compute(OwnRelease(2, "record", 1.0, 5, 5, 20, "b"), DELTA)
        assert spent == compute_epsilon(DELTA, [(1.0, 5), (2.0, 10)], Sampling(5, 20))

    def test_two_units_have_no_sum(self, tmp_path):
        spending = OwnSpending(tmp_path / "releases.jsonl")
        spending.note(OwnRelease(1, "record", 2.0, 10, 2, 20, "a"))
        assert spending.compute(OwnRelease(2, "client", 9.0, 1, 1, 1, "b"), DELTA) == math.inf

    def test_a_damaged_list_is_named(self, tmp_path):
        spending = OwnSpending(tmp_path / "releases.jsonl")
        spending.path.write_text('{"round": 1}\n')
        with pytest.raises(RunDirectoryError, match=r"releases\.jsonl cannot be read"):
            spending.compute(OwnRelease(2, "client", 9.0, 1, 1, 1, "b"), DELTA)
