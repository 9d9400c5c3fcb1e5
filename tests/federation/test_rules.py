"""What every aggregation rule must do, whatever it computes, and what each of them computes."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny_config
from random_states import draw_state

from fedlora_app.config.schema import Aggregation
from fedlora_app.config.sharing import of_factors, travelling_factors
from fedlora_app.federation.rules import RULES, build_rule
from fedlora_app.federation.rules.collecting import CollectingRule, Module, module_keys
from fedlora_app.federation.rules.svd import compress, count_directions
from fedlora_app.federation.weighted_mean import RejectedUpdateError
from fedlora_app.model.ranks import fit_client, join_ranks, resize_ranks, take_ranks

RANK, CLIENTS = 2, ("ann", "bob", "cy", "dan")
WEIGHTS = dict(zip(CLIENTS, (7, 14, 21, 28), strict=True))
A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
SHAPES = {A: torch.Size([RANK, 15]), B: torch.Size([14, RANK])}
EXACT = {"rtol": 0, "atol": 1e-10}
ROUNDED = {"rtol": 0, "atol": 1e-6}  # of states that are kept in fp32


def build_config(rule: str, ranks: dict[str, int] | None = None, **federated):
    """Return four clients under a rule; their data do not matter here."""
    config = build_tiny_config(CLIENTS)
    clients = [
        client.model_dump() | {"rank": (ranks or {}).get(client.id)}
        for client in config.federated.clients
    ]
    return build_tiny_config(
        CLIENTS,
        federated={"aggregation": rule, "clients": clients, "trim_share": 0.3, **federated},
        adapters={"global": {"rank": RANK, "alpha": 4}},
    )


def start_of(config, seed: int = 0):
    return draw_state(seed, resize_ranks(SHAPES, config.adapters.global_.joint.rank))


def updates_of(config, server_round: int = 1, first_seed: int = 1, scale: float = 1e-2):
    """Return an update of what travels for every client, with the client's rank."""
    sent = of_factors(SHAPES, travelling_factors(config, server_round))
    return {
        client: draw_state(seed, resize_ranks(sent, config.adapters_of(client).global_.rank), scale)
        for seed, client in enumerate(CLIENTS, start=first_seed)
    }


def load_example() -> type:
    """Return the rule that the documentation shows."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S).group(1), module)
    return module["NormClipped"]


def build(name: str, config):
    return load_example()(config) if name == EXAMPLE else build_rule(config)


EXAMPLE = "docs/extending.md"
ALL_RULES = [*RULES, EXAMPLE]


def configure(name: str, **settings):
    return build_config("fedavg" if name == EXAMPLE else name, **settings)


def aggregate(name, config, start, updates, server_round: int = 1):
    rule = build(name, config)
    rule.begin(start, server_round)
    for client, update in updates.items():
        rule.add(client, update, WEIGHTS[client])
    return rule.result()


def product(state):
    return state[B].double() @ state[A].double()


def mean_product(start, updates):
    """sum_k p_k B_k A_k of dense matrices, fp64, of clients of any rank."""
    total = sum(WEIGHTS[client] for client in updates)
    dense = torch.zeros(14, 15, dtype=torch.float64)
    for client, update in updates.items():
        rank = update[A].shape[0]
        state = take_ranks(start, 0, rank)
        trained = {key: state[key].double() + update[key].double() for key in (A, B)}
        dense += WEIGHTS[client] / total * product(trained)
    return dense


def weighted_mean(updates, key):
    return sum(WEIGHTS[c] * u[key].double() for c, u in updates.items()) / sum(WEIGHTS.values())


def test_the_schema_names_the_rules_that_there_are():
    assert get_args(Aggregation) == tuple(RULES)


@pytest.mark.parametrize("name", ALL_RULES)
class TestEveryRule:
    def test_names_shapes_and_dtype_stay(self, name):
        config = configure(name)
        start = start_of(config)
        result = aggregate(name, config, start, updates_of(config))
        assert {k: t.shape for k, t in result.items()} == {k: t.shape for k, t in start.items()}
        assert {tensor.dtype for tensor in result.values()} == {torch.float32}
        assert all(tensor.isfinite().all() for tensor in result.values())

    def test_no_order_of_arrival_changes_a_bit(self, name):
        config = configure(name)
        start, updates = start_of(config), updates_of(config)
        results = [
            aggregate(name, config, start, dict(order))
            for order in itertools.permutations(updates.items())
        ]
        assert all(torch.equal(r[key], results[0][key]) for r in results for key in SHAPES)

    def test_the_received_adapter_and_the_updates_are_left_as_they_are(self, name):
        config = configure(name)
        start, updates = start_of(config), updates_of(config)
        aggregate(name, config, start, updates)
        again = updates_of(config)
        assert all(torch.equal(start[key], start_of(config)[key]) for key in SHAPES)
        assert all(torch.equal(u[key], again[c][key]) for c, u in updates.items() for key in u)

    def test_a_round_starts_without_the_updates_of_the_last(self, name):
        config = configure(name)
        rule, start, updates = build(name, config), start_of(config), updates_of(config)
        rule.begin(start, 1)
        rule.add("ann", updates["ann"], 3)
        assert rule.num_updates == 1
        rule.begin(start, 1)
        assert rule.num_updates == 0
        with pytest.raises(RejectedUpdateError):
            rule.result()

    def test_what_is_kept_grows_with_the_clients_where_the_algebra_needs_it(self, name):
        config = configure(name)
        rule = build(name, config)
        rule.begin(start_of(config), 1)
        sizes = []
        for client, update in updates_of(config).items():
            rule.add(client, update, WEIGHTS[client])
            sizes.append(len(pickle.dumps({k: v for k, v in vars(rule).items() if k != "config"})))
        grows = isinstance(rule, CollectingRule) or name == "rest-of-world"
        assert (sizes[-1] - sizes[0] > 1000) == grows
        assert grows or sizes[-1] - sizes[0] < 64  # digits of counts, no tensor

    def test_an_update_that_is_too_large_is_rejected_and_leaves_no_trace(self, name):
        config = configure(name)
        start, updates = start_of(config), updates_of(config)
        expected = aggregate(name, config, start, {"ann": updates["ann"]})
        rule = build(name, config)
        rule.begin(start, 1)
        rule.add("ann", updates["ann"], WEIGHTS["ann"])
        with pytest.raises(RejectedUpdateError):
            rule.add("bob", {k: torch.full_like(t, 1e30) for k, t in updates["bob"].items()}, 10)
        assert rule.num_updates == 1
        result = rule.result()
        assert all(torch.equal(result[key], expected[key]) for key in SHAPES)

    def test_one_client_gets_what_it_has_trained(self, name):
        """By what it does: a rule may write the product with other factors."""
        config = configure(name)
        start, update = start_of(config), updates_of(config)["bob"]
        start[B][:, 2 * RANK :] = 0  # of a frozen part; there is room for more in it
        learning = take_ranks(start, 0, RANK)
        trained = learning | {key: learning[key] + update[key] for key in update}
        expected = product(trained)
        if (frozen := config.adapters.global_.frozen_rank) > 0:
            expected += product(take_ranks(start, RANK, RANK + frozen))
        result = aggregate(name, config, start, {"bob": update})
        torch.testing.assert_close(product(result), expected, **ROUNDED)

    def test_what_it_remembers_has_it_go_on_as_if_it_had_not_stopped(self, name):
        config = configure(name)
        one = build(name, config)
        state = start_of(config)
        for server_round in (1, 2):
            one.begin(state, server_round)
            for client, update in updates_of(config, server_round, 10 * server_round).items():
                one.add(client, update, WEIGHTS[client])
            state = one.result()
        other = build(name, config)
        other.recall(one.memory)
        results = []
        for rule in (one, other):
            rule.begin(state, 3)
            for client, update in updates_of(config, 3, 30).items():
                rule.add(client, update, WEIGHTS[client])
            new = rule.result()
            results.append([new, *(rule.state_for(client, new) for client in CLIENTS)])
        for state, again in zip(*results, strict=True):
            assert all(torch.equal(state[key], again[key]) for key in SHAPES)


@pytest.mark.parametrize("name", ["fedavg", "share-a", "share-b", "freeze-a", "alternate"])
@pytest.mark.parametrize("server_round", [1, 2])
def test_means_are_of_what_travels_and_the_rest_stays(name, server_round):
    config = build_config(name)
    start, updates = start_of(config), updates_of(config, server_round)
    result = aggregate(name, config, start, updates, server_round)
    travels = {"share-a": {A}, "share-b": {B}, "freeze-a": {B}, "fedavg": {A, B}}
    expected = travels.get(name, {B} if server_round == 1 else {A})
    assert set(updates["ann"]) == expected
    for key in SHAPES:
        mean = weighted_mean(updates, key) if key in expected else 0.0
        torch.testing.assert_close(result[key].double(), start[key].double() + mean, **ROUNDED)


@pytest.mark.parametrize(
    ("name", "server_round"), [("freeze-a", 1), ("alternate", 1), ("alternate", 2)]
)
def test_one_factor_at_a_time_is_exact(name, server_round):
    config = build_config(name)
    start, updates = start_of(config), updates_of(config, server_round)
    still = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    expected = mean_product(start, {c: still | u for c, u in updates.items()})
    result = aggregate(name, config, start, updates, server_round)
    torch.testing.assert_close(product(result), expected, rtol=1e-6, atol=1e-9)


def read_module(config, start, updates) -> Module:
    """Return what a collecting rule sees of the only module, in fp64."""
    rule = RULES["svd"](config)
    rule.begin(start, 1)
    for client, update in updates.items():
        rule.add(client, update, WEIGHTS[client])
    ((name, keys),) = module_keys(start).items()
    return rule._read(name, *keys)


class TestProducts:
    """Rules on the mean of the products, against dense matrices in fp64."""

    def test_svd_is_the_best_approximation_of_its_rank(self):
        config = build_config("svd")
        start, updates = start_of(config), updates_of(config)
        dense = mean_product(start, updates)
        left, singular, right = torch.linalg.svd(dense, full_matrices=False)
        expected = left[:, :RANK] * singular[:RANK] @ right[:RANK]
        rule = RULES["svd"](config)
        a, b = rule.combine(read_module(config, start, updates))
        torch.testing.assert_close(b @ a, expected, **EXACT)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0))  # split evenly
        result = aggregate("svd", config, start, updates)
        torch.testing.assert_close(product(result), expected, **ROUNDED)

    def test_what_is_dropped_is_measured(self):
        config = build_config("svd")
        start, updates = start_of(config), updates_of(config)
        rule = RULES["svd"](config)
        rule.begin(start, 1)
        for client, update in updates.items():
            rule.add(client, update, WEIGHTS[client])
        result = rule.result()
        dense = mean_product(start, updates)
        lost = (dense - product(result)).norm()
        assert rule.errors.total == pytest.approx((lost / product(result).norm()).item())
        energy = 1 - (lost / dense.norm()).item() ** 2
        assert rule.figures["captured_energy"] == pytest.approx(energy)

    def test_a_frozen_part_of_earlier_rounds_is_no_error(self):
        config = build_config("stack")
        rule, state = RULES["stack"](config), start_of(config)
        for server_round in (1, 2):
            state = {k: t.clone() for k, t in state.items()}
            state[B][:, 2 * RANK :] = 0  # so that there is room for all
            before = product(take_ranks(state, RANK, 5 * RANK))
            rule.begin(state, server_round)
            updates = {
                c: {k: t * (1 if k == A else 10) for k, t in u.items()}
                for c, u in updates_of(config, first_seed=server_round).items()
                if c in ("ann", "bob")
            }
            for client, update in updates.items():
                rule.add(client, update, WEIGHTS[client])
            expected = before + mean_product(state, updates)
            state = rule.result()
            torch.testing.assert_close(product(state), expected, **ROUNDED)
            assert rule.errors.total < 1e-6 and rule.figures["captured_energy"] > 1 - 1e-12

    @pytest.mark.parametrize("name", ["svd", "residual", "stack"])
    def test_with_all_ranks_they_are_the_mean_product(self, name):
        """svd at rank K r, residual at full rank, stack in any case."""
        rank = len(CLIENTS) * RANK if name == "svd" else RANK
        base = build_config(name)
        adapters = {"global": {"rank": rank, "alpha": 4}}
        if name == "residual":
            adapters["global"]["frozen_rank"] = 14
        clients = [c.model_dump() for c in base.federated.clients]
        config = build_tiny_config(
            CLIENTS, federated={"aggregation": name, "clients": clients}, adapters=adapters
        )
        start = start_of(config)
        start[B][:, RANK:] = 0  # clients had two ranks to learn with, as yet
        updates = updates_of(config)
        updates = {c: take_ranks(u, 0, RANK) for c, u in updates.items()}
        module = read_module(config, start, updates)
        rule = RULES[name](config)
        rule.begin(start, 1)
        a, b = rule.combine(module)
        torch.testing.assert_close(b @ a, mean_product(start, updates), **EXACT)

    def test_residual_is_fedavg_and_what_it_misses(self):
        config = build_config("residual")
        assert config.adapters.global_.frozen_rank == len(CLIENTS) * RANK
        start, updates = start_of(config), updates_of(config)
        frozen = product(take_ranks(start, RANK, 5 * RANK))
        result = aggregate("residual", config, start, updates)
        for key in SHAPES:
            expected = take_ranks(start, 0, RANK)[key].double() + weighted_mean(updates, key)
            got = take_ranks(result, 0, RANK)[key].double()
            torch.testing.assert_close(got, expected, **ROUNDED)
        # Its frozen part had 8 ranks, and gets 8 of what is to be 8 + 8 + 2.
        full = mean_product(start, updates) + frozen
        left, singular, right = torch.linalg.svd(full - product(take_ranks(result, 0, RANK)))
        best = left[:, :8] * singular[:8] @ right[:8]
        torch.testing.assert_close(product(take_ranks(result, RANK, 5 * RANK)), best, **ROUNDED)

    def test_stack_freezes_all_that_was_learnt_and_begins_anew(self):
        config = build_config("stack")
        start, updates = start_of(config), updates_of(config)
        start = join_ranks(
            take_ranks(start, 0, RANK),
            {k: torch.zeros_like(t) for k, t in take_ranks(start, RANK, 5 * RANK).items()},
        )
        result = aggregate("stack", config, start, updates)
        torch.testing.assert_close(product(result), mean_product(start, updates), **ROUNDED)
        fresh = take_ranks(result, 0, RANK)
        assert not fresh[B].any() and fresh[A].abs().max() <= 15**-0.5
        other = aggregate("stack", config, start, updates, server_round=2)
        assert not torch.equal(take_ranks(other, 0, RANK)[A], fresh[A])  # by (seed, round)

    def test_the_energy_threshold_leaves_out_small_directions(self):
        config = build_config("svd", svd_energy=0.6)
        start, updates = start_of(config), updates_of(config)
        result = aggregate("svd", config, start, updates)
        singular = torch.linalg.svdvals(product(result))
        assert singular[0] > 1e-3 and singular[1] < 1e-8
        assert torch.equal(result[A][1], start[A][1])  # what it can learn with from here
        assert not result[B][:, 1].any()

    @pytest.mark.parametrize(
        ("energy", "count"), [(0.5, 1), (0.9, 2), (0.999, 3), (None, 3), (1, 3)]
    )
    def test_directions_are_counted_by_energy(self, energy, count):
        singular = torch.tensor([3.0, 2.0, 0.5, 1e-15], dtype=torch.float64)
        assert count_directions(singular, energy) == count

    def test_nothing_has_no_direction(self):
        assert count_directions(torch.zeros(3), 0.5) == count_directions(torch.zeros(0)) == 0

    def test_compressing_changes_no_product(self):
        a, b = torch.randn(9, 6, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
        new_a, new_b, singular = compress(a, b)
        torch.testing.assert_close(new_b @ new_a, b @ a, **EXACT)
        assert len(singular) == 6 and (singular.diff() <= 0).all()


RANKS = {"ann": 1, "bob": 1}  # the others have two


class TestMixedRanks:
    def test_svd_gives_each_client_its_largest_directions(self):
        config = build_config("svd", RANKS)
        start, updates = start_of(config), updates_of(config)
        assert updates["ann"][A].shape[0] == 1 and updates["cy"][A].shape[0] == 2
        result = aggregate("svd", config, start, updates)
        left, singular, right = torch.linalg.svd(mean_product(start, updates))
        own = product(fit_client(config, "ann", result))
        torch.testing.assert_close(own, singular[0] * left[:, :1] @ right[:1], **ROUNDED)

    def test_stack_takes_whatever_rank_there_is(self):
        config = build_config("stack", RANKS)
        assert config.adapters.global_.frozen_rank == 1 + 1 + 2 + 2
        start, updates = start_of(config), updates_of(config)
        start = {k: t.clone() for k, t in start.items()}
        start[B][:, RANK:] = 0
        result = aggregate("stack", config, start, updates)
        torch.testing.assert_close(product(result), mean_product(start, updates), **ROUNDED)

    def test_each_rank_is_the_mean_over_those_who_have_it(self):
        """Rank 1 of 7, 14, 21 and 28 examples, rank 2 of 21 and 28."""
        config = build_config("rank-partitioned", RANKS)
        start, updates = start_of(config), updates_of(config)
        trained = {
            c: {k: take_ranks(start, 0, u[A].shape[0])[k].double() + u[k].double() for k in u}
            for c, u in updates.items()
        }
        first = sum(WEIGHTS[c] / 70 * product(take_ranks(t, 0, 1)) for c, t in trained.items())
        second = sum(WEIGHTS[c] / 49 * product(take_ranks(trained[c], 1, 2)) for c in ("cy", "dan"))
        rule = RULES["rank-partitioned"](config)
        a, b = rule.target(read_module(config, start, updates))
        torch.testing.assert_close(b @ a, first + second, **EXACT)

    def test_with_equal_ranks_that_is_svd(self):
        start, updates = start_of(build_config("svd")), updates_of(build_config("svd"))
        one, other = (
            aggregate(name, build_config(name), start, updates)
            for name in ("svd", "rank-partitioned")
        )
        torch.testing.assert_close(product(one), product(other), **EXACT)


def test_median_and_trimmed_mean_are_of_each_entry():
    start, updates = start_of(build_config("median")), updates_of(build_config("median"))
    updates["dan"] = {key: torch.full_like(t, 1e5) for key, t in updates["dan"].items()}
    values = {k: np.stack([(start[k] + u[k]).numpy() for u in updates.values()]) for k in SHAPES}
    for name in ("median", "trimmed-mean"):
        result = aggregate(name, build_config(name), start, updates)
        for key in SHAPES:
            middle = np.sort(values[key], axis=0)[1:3].mean(axis=0)  # of four both are this
            torch.testing.assert_close(result[key], torch.from_numpy(middle), **ROUNDED)
            assert result[key].abs().max() < 1  # whatever dan sends


class TestRestOfWorld:
    def run(self, present=CLIENTS, rounds: int = 2):
        config = build_config("rest-of-world")
        rule, state = build_rule(config), start_of(config)
        starts, trained = dict.fromkeys(CLIENTS, state), {}
        for server_round in range(1, rounds + 1):
            rule.begin(state, server_round)
            trained = {}
            for client, update in updates_of(config, server_round, 10 * server_round).items():
                if client in present:
                    rule.add(client, update, WEIGHTS[client])
                    trained[client] = {k: (starts[client][k] + update[k]).double() for k in update}
            state = rule.result()
            starts = {client: rule.state_for(client, state) for client in CLIENTS}
        return state, starts, trained

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_each_gets_the_mean_of_the_others(self, rounds):
        state, starts, trained = self.run(rounds=rounds)
        for key in SHAPES:
            for client in CLIENTS:
                others = {c: t[key] * WEIGHTS[c] for c, t in trained.items() if c != client}
                expected = sum(others.values()) / sum(WEIGHTS[c] for c in others)
                torch.testing.assert_close(starts[client][key].double(), expected, **ROUNDED)
            mean = sum(WEIGHTS[c] * t[key] for c, t in trained.items()) / sum(WEIGHTS.values())
            torch.testing.assert_close(state[key].double(), mean, **ROUNDED)

    def test_to_who_took_no_part_all_are_others(self):
        state, starts, _ = self.run(present=CLIENTS[:3])
        assert all(torch.equal(starts["dan"][key], state[key]) for key in SHAPES)
        assert not torch.equal(starts["ann"][A], state[A])

    def test_who_was_alone_goes_on_from_its_own(self):
        state, starts, _ = self.run(present=CLIENTS[:1], rounds=1)
        assert all(torch.equal(starts["ann"][key], state[key]) for key in SHAPES)


def test_the_documentation_s_example_clips_large_updates():
    config = build_config("fedavg")
    start, updates = start_of(config), updates_of(config, scale=10.0)
    result = aggregate(EXAMPLE, config, start, updates)
    moved = torch.stack([(result[key] - start[key]).norm() for key in SHAPES]).norm()
    assert 0 < moved <= 1.0 + 1e-5
    small = updates_of(config, scale=1e-4)
    plain = aggregate("fedavg", config, start, small)
    result = aggregate(EXAMPLE, config, start, small)
    assert all(torch.equal(result[key], plain[key]) for key in SHAPES)
