"""What every aggregation rule must do, whatever it computes."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import get_args

import pytest
import torch
from conftest import ROOT

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


def load_example() -> type:
    """Return the rule that the documentation shows."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S).group(1), module)
    return module["Momentum"]


ALL_RULES = RULES | {"docs/extending.md": load_example()}


def aggregate(name, start, clients):
    rule = ALL_RULES[name]()
    rule.begin(start)
    for update, num_examples in clients:
        rule.add(update, num_examples)
    return rule.result()


CLIENTS = [(build_state(seed), 7 * seed) for seed in range(1, 5)]


def test_the_schema_names_the_rules_that_there_are():
    field = FederatedConfig.model_fields["aggregation"]
    assert set(get_args(field.annotation)) == set(RULES)


@pytest.mark.parametrize("name", ALL_RULES)
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

    def test_a_round_starts_without_the_updates_of_the_last(self, name):
        rule, start = ALL_RULES[name](), build_state(0)
        rule.begin(start)
        rule.add(*CLIENTS[0])
        assert rule.num_updates == 1
        rule.begin(start)
        assert rule.num_updates == 0
        with pytest.raises(RejectedUpdateError):
            rule.result()

    def test_what_is_kept_does_not_grow_with_the_clients(self, name):
        rule = ALL_RULES[name]()
        rule.begin(build_state(0))
        sizes = set()
        for update, num_examples in CLIENTS:
            rule.add(update, num_examples)
            sizes.add(len(pickle.dumps(vars(rule))))
        assert max(sizes) - min(sizes) < 64  # digits of counts, no tensor

    def test_without_an_update_there_is_no_result(self, name):
        rule = ALL_RULES[name]()
        rule.begin(build_state(0))
        with pytest.raises(RejectedUpdateError):
            rule.result()

    def test_a_rejected_update_leaves_no_trace(self, name):
        rule = ALL_RULES[name]()
        rule.begin(build_state(0))
        rule.add(*CLIENTS[0])
        with pytest.raises(RejectedUpdateError):
            rule.add({key: torch.full(shape, 1e30) for key, shape in SHAPES.items()}, 10)
        assert rule.num_updates == 1
        expected = aggregate(name, build_state(0), CLIENTS[:1])
        result = rule.result()
        assert all(torch.equal(result[key], expected[key]) for key in SHAPES)


def test_the_configuration_s_name_builds_the_rule():
    assert type(build_rule("fedavg")) is RULES["fedavg"]


def test_the_documentation_s_example_has_momentum():
    rule, start = ALL_RULES["docs/extending.md"](), build_state(0)
    for _ in range(2):
        rule.begin(start)
        rule.add(*CLIENTS[0])
        result = rule.result()
    for key in SHAPES:
        expected = start[key] + 1.9 * CLIENTS[0][0][key]
        torch.testing.assert_close(result[key], expected, rtol=0, atol=1e-7)


def test_fedavg_is_the_weighted_mean_of_the_updates():
    start = build_state(0)
    result = aggregate("fedavg", start, CLIENTS)
    total = sum(n for _, n in CLIENTS)
    for key in SHAPES:
        mean = sum(n * update[key].double() for update, n in CLIENTS) / total
        expected = (start[key].double() + mean).float()
        torch.testing.assert_close(result[key], expected, rtol=0, atol=1e-9)
