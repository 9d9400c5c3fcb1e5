from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from random_states import draw_state

from fedlora_app.federation.weighted_mean import RejectedUpdateError, WeightedMean

SHAPES = {"a": torch.Size([3, 4]), "b": torch.Size([2])}
build_state = partial(draw_state, shapes=SHAPES)


def test_the_mean_is_the_closed_form():
    start, updates, counts = build_state(0), [build_state(i) for i in (1, 2, 3)], [10, 1, 29]
    mean = WeightedMean(SHAPES)
    for update, count in zip(updates, counts, strict=True):
        mean.add(update, count)
    result = mean.apply_to(start)
    for key in SHAPES:
        weighted = sum(c * u[key].double() for u, c in zip(updates, counts, strict=True))
        expected = (start[key].double() + weighted / 40).float()
        torch.testing.assert_close(result[key], expected, rtol=0, atol=1e-9)
    assert (mean.num_updates, mean.num_examples) == (3, 40)


def test_no_order_of_arrival_changes_a_bit():
    start = build_state(0)
    clients = [(build_state(i, scale=10.0 ** (-i)), 7 * i) for i in range(1, 6)]
    results = []
    for order in itertools.islice(itertools.permutations(clients), 0, 120, 11):
        mean = WeightedMean(SHAPES)
        for update, count in order:
            mean.add(update, count)
        results.append(mean.apply_to(start))
    assert all(torch.equal(r[key], results[0][key]) for r in results for key in SHAPES)


def test_the_accumulator_does_not_grow():
    mean = WeightedMean(SHAPES)
    sizes = []
    for client in range(50):
        mean.add(build_state(client), 3)
        sizes.append(sum(total.nbytes for total in mean._sums.values()))
    assert set(sizes) == {(12 + 2) * 8}


def test_a_diverged_update_is_refused_before_it_overflows():
    mean = WeightedMean(SHAPES)
    with pytest.raises(RejectedUpdateError, match="probably diverged"):
        mean.add({key: torch.full(shape, 1e6) for key, shape in SHAPES.items()}, 1000)
    assert mean.num_updates == 0
    mean.add(build_state(1), 2)  # the refused one left no trace
    zero = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    for key, tensor in mean.apply_to(zero).items():
        torch.testing.assert_close(tensor, build_state(1)[key], rtol=0, atol=1e-10)
    mean = WeightedMean(SHAPES)
    with pytest.raises(RejectedUpdateError, match="nothing to average"):
        mean.apply_to(build_state(0))
