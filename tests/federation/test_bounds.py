from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_config
from random_states import STATE

from fedlora_app.config.loading import change_config
from fedlora_app.federation.bounds import (
    Change,
    NormBounds,
    find_usual,
    require_unplanted,
    share_of_largest,
    sum_learning,
)
from fedlora_app.federation.messages import MessageError
from fedlora_app.model.adapter_state import compute_norm
from fedlora_app.training.schedule import learning_rates

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
"""Of 4 ranks, 96 inputs and 80 outputs."""


def bounds_of(**federated) -> NormBounds:
    config = build_tiny_config(federated=federated)
    return NormBounds(change_config(config, "training.lr_scheduler=constant"))


def of_norm(norm: float):
    return {key: tensor * (norm / compute_norm(STATE)) for key, tensor in STATE.items()}


def test_what_is_usual_is_the_median_for_as_much_learning():
    changes = [Change(1.0, 1.0), Change(2.0, 1.0), Change(100.0, 1.0)]
    assert find_usual(changes, 1.0) == find_usual(changes, 0.1) == 2.0
    assert find_usual(changes, 3.0) == 6.0
    assert find_usual([Change(0.0, 1.0), Change(2.0, 0.5)], 1.0) == 4.0  # 0: has learnt nothing
    assert find_usual([], 1.0) is None


@pytest.mark.parametrize("num_rounds", [10, 20])
def test_a_warm_up_over_rounds_refuses_nobody(num_rounds):
    """What a client learns in the second round is up to four times that of the first."""
    config = build_tiny_config(federated={"num_rounds": num_rounds, "max_norm_ratio": 1.5})
    config = change_config(config, "training.warmup_ratio=0.1 training.lr_scheduler=cosine")
    rates = learning_rates(config.training, 20, num_rounds).reshape(num_rounds, 20).mean(1)
    bounds = NormBounds(config)
    for number, rate in enumerate(rates / config.training.learning_rate, start=1):
        bounds.begin(number)
        bounds.require("ann", of_norm(rate))
        bounds.note(of_norm(rate))
    with pytest.raises(MessageError, match="at this one's learning rate"):
        bounds.begin(num_rounds)
        bounds.require("ann", of_norm(3 * rates.max() / config.training.learning_rate))


def test_rounds_between_add_up():
    config = build_tiny_config(federated={"num_rounds": 10})
    config = change_config(config, "training.lr_scheduler=constant training.warmup_ratio=0")
    assert sum_learning(config, 3, 4) == sum_learning(config, 4, 3) == 1
    assert sum_learning(config, 2, 8) == 6 and sum_learning(config, 5, 5) == 1
    assert sum_learning(config, -1, 0) == 1
    assert sum_learning(config, 8, 2**31) == 2  # the run has ten


def test_norms_of_a_run_that_began_before_their_learning_was_kept_count_as_they_did():
    bounds = bounds_of(max_norm_ratio=2.0)
    bounds.recall({"norms": torch.tensor([1.0, 1.2, 1.4], dtype=torch.float64)})
    bounds.begin(2)
    bounds.require("ann", of_norm(2.3))
    with pytest.raises(MessageError, match=r"norm 2\.5, which is 2\.08 times"):
        bounds.require("ann", of_norm(2.5))


def test_an_update_is_held_against_those_of_earlier_rounds_and_not_of_its_own():
    bounds = bounds_of(max_norm_ratio=2.0)
    bounds.begin(2)
    for norm in (1.0, 50.0, 1.2):  # nothing says which of them is right
        bounds.require("ann", of_norm(norm))
        bounds.note(of_norm(norm))
    bounds.begin(2)
    bounds.require("ann", of_norm(2.3))
    bounds.note(of_norm(2.3))
    with pytest.raises(MessageError, match=r"bob sent .* norm 2\.5, which is 2\.08 times"):
        bounds.require("bob", of_norm(2.5))
    resumed = bounds_of(max_norm_ratio=2.0)
    resumed.recall(bounds.memory)
    resumed.begin(2)
    bounds.begin(2)
    assert resumed._earlier == sorted(bounds._earlier)
    norms = [change.norm for change in resumed._earlier]
    assert norms == pytest.approx([1.0, 1.2, 2.3, 50.0])


def test_a_largest_norm_holds_from_the_first_round_on():
    bounds = bounds_of(max_update_norm=2.0)
    bounds.require("ann", of_norm(1.99))
    with pytest.raises(MessageError, match=r"ann sent .* norm 2\.01, above federated\.max"):
        bounds.require("ann", of_norm(2.01))
    bounds.note(of_norm(1.0))
    assert bounds.memory == {}  # it needs none


def test_without_bounds_everything_passes_and_nothing_is_kept():
    bounds = bounds_of()
    for _ in range(2):
        bounds.begin(2)
        bounds.require("ann", of_norm(1e30))
        bounds.note(of_norm(1e30))
    assert bounds.memory == {}


def plant_row(state):
    state[B] = torch.zeros(80, 4)
    state[B][17] = torch.randn(4)


def plant_inputs(state):
    state[A] = torch.zeros(4, 96)
    state[A][range(4), [3, 5, 8, 90]] = 1e20  # whose squares no fp32 holds


@pytest.mark.parametrize(("plant", "key"), [(plant_row, B), (plant_inputs, A)])
def test_planted_weights_are_refused_with_their_matrix(plant, key):
    torch.manual_seed(0)
    state = {A: torch.randn(4, 96), B: torch.randn(80, 4)}
    require_unplanted(state, "The server sent a global adapter")
    plant(state)
    with pytest.raises(MessageError, match=rf"The server sent .*: 100% of {key} lie"):
        require_unplanted(state, "The server sent a global adapter")


def test_zeros_and_ranks_of_few_entries_pass():
    require_unplanted({B: torch.zeros(80, 4), A: torch.eye(4, 32)}, "It")
    assert share_of_largest(B, torch.eye(80, 4)) == 1
    assert share_of_largest(B, torch.ones(80, 4)) == pytest.approx(1 / 80)
