"""Aggregation settings that cannot work together are refused with the reason, before all else."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from conftest import build_tiny_config

from fedlora_app.config.loading import change_config, parse_config
from fedlora_app.config.participation import weigh
from fedlora_app.config.schema import MAX_FROZEN_RANK, ConfigError

CLIENTS = ("ann", "bob", "cy")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("federated.aggregation=median federated.fraction=0.5", "median needs the updates of 3"),
        ("federated.aggregation=trimmed-mean", "0.2 of 3 clients is less than one"),
        (
            "federated.aggregation=median federated.weighting=given federated.clients.0.weight=1 "
            "federated.clients.1.weight=1 federated.clients.2.weight=1",
            "median counts every client alike",
        ),
        ("federated.clients.0.rank=2", "ann has rank 2, others 4, and fedavg needs equal ranks"),
        ("federated.aggregation=svd federated.clients.0.rank=9", "rank 9, above adapters.global"),
        (
            "federated.aggregation=svd federated.mode=local-only federated.clients.0.rank=2",
            "each trains alone",
        ),
        (
            "federated.aggregation=svd federated.mode=finetuned adapters.local.rank=4 "
            "adapters.local.alpha=8 federated.clients.0.rank=2",
            "begins as a copy of one of rank 4",
        ),
        ("federated.aggregation=svd federated.server_optimizer=adam", "svd is not a mean update"),
        ("federated.aggregation=stack federated.server_learning_rate=0.5", "stack is not a mean"),
        ("federated.svd_energy=0.9", "belongs to federated.aggregation: svd"),
        ("adapters.global.frozen_rank=4", "fedavg makes no such part"),
        ("adapters.local.frozen_rank=4", "no part of a local adapter"),
        ("federated.aggregation=stack adapters.global.frozen_rank=0", "stack keeps there what"),
        ("federated.weighting=given", "ann has no weight"),
        ("federated.clients.0.weight=2", "which only federated.weighting: given uses"),
        ("federated.clients.0.first_round=3", "takes part from round 3 to 2, which is in no round"),
        (
            "federated.clients.0.last_round=1 federated.clients.1.last_round=1 "
            "federated.clients.2.last_round=1",
            "nobody takes part in round 2",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        change_config(build_tiny_config(CLIENTS), overrides)


def test_rules_of_one_client_alone_need_others():
    with pytest.raises(ConfigError, match="rest-of-world needs the updates of two"):
        build_tiny_config(("ann",), federated={"aggregation": "rest-of-world"})


@pytest.mark.parametrize("rule", ["residual", "stack"])
def test_a_frozen_part_has_the_ranks_of_all_clients_unless_one_is_given(rule):
    federated = {"aggregation": rule}
    config = build_tiny_config(CLIENTS, federated=federated)
    assert config.adapters.global_.frozen_rank == 3 * 4
    assert change_config(config, "adapters.global.frozen_rank=7").adapters.global_.frozen_rank == 7
    alone = build_tiny_config(CLIENTS, federated=federated | {"mode": "local-only"})
    assert alone.adapters.global_.frozen_rank == 0


def test_modes_without_an_average_have_no_rule():
    config = build_tiny_config(CLIENTS, federated={"aggregation": "svd", "mode": "centralized"})
    assert config.federated.rule == "fedavg"


@pytest.mark.parametrize("count", [3, 7, 9])
def test_the_share_that_is_advised_is_enough(count):
    ids = tuple(f"c{number}" for number in range(count))
    federated = {"aggregation": "trimmed-mean", "trim_share": 0.01}
    with pytest.raises(ConfigError, match="Set it to ") as refused:
        build_tiny_config(ids, federated=federated)
    advised = float(re.search(r"Set it to ([\d.]+) or more", str(refused.value))[1])
    assert 1 / count <= advised < 1 / count + 0.02
    build_tiny_config(ids, federated=federated | {"trim_share": advised})


def test_no_frozen_rank_is_filled_in_that_would_be_refused():
    ids = tuple(f"c{number}" for number in range(1100))
    config = build_tiny_config(ids, federated={"aggregation": "stack"})
    assert config.adapters.global_.frozen_rank == MAX_FROZEN_RANK < 1100 * 4


def weigh_all(weights):
    """Return what each client's update counts with these weights."""
    config = build_tiny_config(CLIENTS).dump()
    for client, weight in zip(config["federated"]["clients"], weights, strict=True):
        client["weight"] = weight
    config["federated"]["weighting"] = "given"
    return [weigh(parse_config(config), client, 5) for client in CLIENTS]


@pytest.mark.parametrize("weights", [(1, 7, 0.5), (0.1, 0.2, 0.3), (1e-3, 1, 1e3)])
def test_given_weights_count_as_they_are_written(weights):
    found = weigh_all(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    assert [Fraction(n, sum(found)) for n in found] == [w / sum(exact) for w in exact]


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 6, 1 / 7), (1e-5, 1, 1e6)])
def test_weights_of_many_digits_leave_room_for_the_updates(weights):
    found = weigh_all(weights)
    assert max(found) == 10**6 and min(found) >= 1
    assert [n / 10**6 for n in found] == pytest.approx(
        [w / max(weights) for w in weights], abs=1.1e-6
    )
