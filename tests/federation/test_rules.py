"""What every aggregation rule must do, whatever it computes."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from fedlora_app.config.schema import FederatedConfig
from fedlora_app.federation.rules import RULES, build_rule
from fedlora_app.federation.weighted_mean import RejectedUpdateError

SHAPES = {
    "base_model.model.x.lora_A.weight": torch.Size([2, 5]),
    "base_model.model.x.lora_B.weight": torch.Size([4, 2]),
}


def build_state(seed: int, scale: float = 1e-2):
    generator = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(shape, generator=generator) for k, shape in SHAPES.items()}


def aggregate(name, start, clients, rule=None):
    rule = rule or build_rule(name)
    rule.begin(start)
    for update, num_examples in clients:
        rule.add(update, num_examples)
    return rule.result()


CLIENTS = [(build_state(seed), 7 * seed) for seed in range(1, 5)]


def test_the_schema_names_the_rules_that_there_are():
    field = FederatedConfig.model_fields["aggregation"]
    assert set(get_args(field.annotation)) == set(RULES)


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_names_shapes_and_dtype_stay(self, name):
        result = aggregate(name, build_state(0), CLIENTS)
        assert {key: tensor.shape for key, tensor in result.items()} == SHAPES
        assert {tensor.dtype for tensor in result.values()} == {torch.float32}
        assert all(tensor.isfinite().all() for tensor in result.values())

    def test_no_order_of_arrival_changes_a_bit(self, name):
        start = build_state(0)
        results = [aggregate(name, start, order) for order in itertools.permutations(CLIENTS)]
        assert all(torch.equal(r[key], results[0][key]) for r in results for key in SHAPES)

    def test_the_received_adapter_and_the_updates_are_left_as_they_are(self, name):
        start, update = build_state(0), build_state(1)
        aggregate(name, start, [(update, 3)])
        for key in SHAPES:
            assert torch.equal(start[key], build_state(0)[key])
            assert torch.equal(update[key], build_state(1)[key])

    def test_a_round_leaves_no_update_for_the_next(self, name):
        rule, start = build_rule(name), build_state(0)
        aggregate(name, start, CLIENTS, rule)
        again = aggregate(name, start, CLIENTS[:1], rule)
        fresh = aggregate(name, start, CLIENTS[:1])
        assert rule.num_updates == 1
        assert all(torch.equal(again[key], fresh[key]) for key in SHAPES)

    def test_without_an_update_there_is_no_result(self, name):
        rule = build_rule(name)
        rule.begin(build_state(0))
        with pytest.raises(RejectedUpdateError):
            rule.result()

    def test_a_rejected_update_leaves_no_trace(self, name):
        rule = build_rule(name)
        rule.begin(build_state(0))
        rule.add(*CLIENTS[0])
        with pytest.raises(RejectedUpdateError):
            rule.add({key: torch.full(shape, 1e30) for key, shape in SHAPES.items()}, 10)
        assert rule.num_updates == 1
        expected = aggregate(name, build_state(0), CLIENTS[:1])
        assert all(torch.equal(rule.result()[key], expected[key]) for key in SHAPES)


def test_fedavg_is_the_weighted_mean_of_the_updates():
    start = build_state(0)
    result = aggregate("fedavg", start, CLIENTS)
    total = sum(n for _, n in CLIENTS)
    for key in SHAPES:
        mean = sum(n * update[key].double() for update, n in CLIENTS) / total
        expected = (start[key].double() + mean).float()
        torch.testing.assert_close(result[key], expected, rtol=0, atol=1e-9)
