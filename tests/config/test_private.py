"""Clients of which an experiment names no more than the id."""

from __future__ import annotations

import pytest
from conftest import build_tiny_config

from fedlora_app.config.loading import parse_config
from fedlora_app.config.private import PRIVATE, without_private
from fedlora_app.config.schema import ConfigError


def test_nothing_of_their_own_is_left_but_of_who_is_named():
    clients = build_tiny_config(("ann", "bob")).dump()["federated"]["clients"]
    clients[1] |= {"weight": 2.0, "first_round": 2}
    federated = {"clients": clients, "weighting": "given"}
    clients[0]["weight"] = 1.0
    raw = build_tiny_config(federated=federated).dump()
    left = without_private(raw, ["ann"])
    ann, bob = left["federated"]["clients"]
    assert ann == raw["federated"]["clients"][0]
    assert bob == {k: v for k, v in raw["federated"]["clients"][1].items() if k not in PRIVATE}
    config = parse_config(left)
    assert [client.is_bare for client in config.federated.clients] == [False, True]
    assert config.entry("bob").weight == 2.0 and config.entry("bob").first_round == 2
    assert parse_config(config.dump()) == config
    with pytest.raises(ConfigError, match="bob has no system_prompt and no local_train here"):
        config.client("bob")


def test_who_reads_everybodys_data_is_told_all():
    raw = build_tiny_config(federated={"mode": "centralized"}).dump()
    assert without_private(raw, ["ann"]) == raw


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"universal_train": None}},  # which its own file names
        {"federated": {"final": "best"}, "evaluation": {"interval": 1}},  # it may have questions
    ],
)
def test_what_only_its_own_file_can_say_is_no_fault(changes):
    changes.setdefault("federated", {})["clients"] = [{"id": "ann"}, {"id": "bob"}]
    build_tiny_config(**changes)


@pytest.mark.parametrize(("given", "at_once"), [(0, 2), (1, 1), (9, 2)])
def test_how_many_are_served_at_once(given, at_once):
    federated = build_tiny_config(federated={"clients_at_once": given}).federated
    assert federated.at_once == at_once
