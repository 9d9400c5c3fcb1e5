"""The estimate of the aggregation error, against the exact one of dense matrices."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from random_states import draw_state

from fedlora_app.federation.aggregation_error import NUM_COLUMNS, ProductSketch
from fedlora_app.federation.weighted_mean import WeightedMean

RANK = 3
SIZES = {"wide": (40, 24), "tall": (24, 40), "square": (32, 32)}  # in, out
COUNTS = [5, 1, 12, 7]


def key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


SHAPES = {
    key(module, factor): torch.Size([RANK, d_in] if factor == "A" else [d_out, RANK])
    for module, (d_in, d_out) in SIZES.items()
    for factor in "AB"
}


build_state = partial(draw_state, shapes=SHAPES, scale=0.1)


def average(sketch, updates, counts):
    mean = WeightedMean(SHAPES | sketch.shapes)
    for update, count in zip(updates, counts, strict=True):
        mean.add(update | sketch.project(update), count)
    return mean


def relative(found):
    return found.by_module, found.total


def estimate(start, updates, counts=COUNTS, seed=0, num_columns=NUM_COLUMNS):
    sketch = ProductSketch(SHAPES, seed, num_columns)
    mean = average(sketch, updates, counts)
    return relative(sketch.measure(mean, mean, mean.apply_to(start)))


def exact(start, updates, counts=COUNTS):
    """From the definition, with dense matrices of whole adapters and not of updates."""
    total, errors, products = sum(counts), {}, {}
    for module in SIZES:
        states = [{k: (start[k] + u[k]).double() for k in SHAPES} for u in updates]
        a, b = (
            sum(n * state[key(module, factor)] for n, state in zip(counts, states, strict=True))
            / total
            for factor in "AB"
        )
        weighted = (
            n * state[key(module, "B")] @ state[key(module, "A")]
            for n, state in zip(counts, states, strict=True)
        )
        errors[module] = (sum(weighted) / total - b @ a).norm().item()
        products[module] = (b @ a).norm().item()
    relative = {module: errors[module] / products[module] for module in SIZES}
    return relative, math.hypot(*errors.values()) / math.hypot(*products.values())


UPDATES = [build_state(seed) for seed in (1, 2, 3, 4)]


def dense_error(module, updates=UPDATES):
    """Likewise from the updates, where the adapters would cancel too many digits."""
    p = torch.tensor(COUNTS).double() / sum(COUNTS)
    a, b = (torch.stack([u[key(module, factor)].double() for u in updates]) for factor in "AB")
    mean_a, mean_b = (torch.einsum("k,kij->ij", p, factors) for factors in (a, b))
    return torch.einsum("k,kir,krj->ij", p, b, a) - mean_b @ mean_a


def test_many_columns_give_the_dense_error():
    by_module, total = estimate(build_state(0), UPDATES, num_columns=20_000)
    expected, expected_total = exact(build_state(0), UPDATES)
    assert set(by_module) == set(SIZES)
    for module, value in expected.items():
        assert by_module[module] == pytest.approx(value, rel=0.03)
    assert total == pytest.approx(expected_total, rel=0.03)


def test_the_squared_norms_are_estimated_without_bias_and_as_well_as_promised():
    """Of E and of the product, over 300 random matrices, each module by itself."""
    start, num_draws = build_state(0), 300
    _, reference = exact(start, UPDATES)
    squares = {module: [] for module in SIZES}
    for seed in range(num_draws):
        sketch = ProductSketch(SHAPES, seed)
        mean = average(sketch, UPDATES, COUNTS)
        for module, pair in sketch._pairs.items():
            means = {name: mean.mean_of(name) for name in pair}
            measured = sketch._measure_error(module, mean, means)
            squares[module].append(measured**2 / NUM_COLUMNS)
    for module, (d_in, d_out) in SIZES.items():
        error = dense_error(module)
        assert error.shape == (d_out, d_in)
        truth = error.square().sum().item()
        singular = torch.linalg.svdvals(error).square()
        spread = math.sqrt(2 / NUM_COLUMNS * singular.square().sum() / singular.sum() ** 2)
        drawn = torch.tensor(squares[module]) / truth
        assert abs(drawn.mean() - 1) < 4 * spread / math.sqrt(num_draws)
        assert drawn.std() == pytest.approx(spread, rel=0.25)
        assert spread <= math.sqrt(2 / NUM_COLUMNS)  # what the docstring promises
    assert reference > 0.01  # or there was nothing to estimate


def test_the_closed_form_of_two_clients_that_share_nothing():
    """b_1 a_1 = e_1 e_1', b_2 a_2 = e_2 e_2': E = [[1, -1], [-1, 1]] / 4, the product all 1 / 4."""
    shapes = {"x.lora_A.weight": torch.Size([1, 2]), "x.lora_B.weight": torch.Size([2, 1])}
    start = {name: torch.zeros(shape) for name, shape in shapes.items()}
    sketch = ProductSketch(shapes, seed=1, num_columns=40_000)
    mean = WeightedMean(shapes | sketch.shapes)
    for unit in torch.eye(2):
        update = {"x.lora_A.weight": unit[None], "x.lora_B.weight": unit[:, None]}
        mean.add(update | sketch.project(update), 10)
    by_module, total = relative(sketch.measure(mean, mean, mean.apply_to(start)))
    assert by_module["x"] == pytest.approx(1.0, abs=0.03) and total == by_module["x"]


@pytest.mark.parametrize("counts", [[7], [3, 3], [1, 1000, 12, 5, 9]])
@pytest.mark.parametrize("scale", [1e-5, 1e-1, 3.0])
def test_clients_that_agree_make_no_error_at_all(counts, scale):
    updates = [build_state(1, scale=scale)] * len(counts)
    by_module, total = estimate(build_state(0), updates, counts)
    assert by_module == dict.fromkeys(SIZES, 0.0) and total == 0.0


def test_a_small_error_is_not_taken_for_rounding():
    """Updates of a millionth, as after one step at a low learning rate."""
    start, updates = build_state(0), [build_state(seed, scale=1e-6) for seed in (1, 2, 3, 4)]
    by_module, _ = estimate(start, updates, num_columns=20_000)
    for module in SIZES:
        product = (start[key(module, "B")] @ start[key(module, "A")]).norm().item()
        expected = dense_error(module, updates).norm().item() / product
        assert by_module[module] == pytest.approx(expected, rel=0.05)
        assert 0 < expected < 1e-9


def test_no_update_or_a_product_of_zero():
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert estimate(zero, [zero], [1]) == (dict.fromkeys(SIZES, 0.0), 0.0)
    opposite = [build_state(1), {name: -tensor for name, tensor in build_state(1).items()}]
    assert estimate(zero, opposite, [1, 1]) == (dict.fromkeys(SIZES, None), None)


def test_no_order_of_arrival_changes_a_bit():
    start, clients = build_state(0), list(zip(UPDATES, COUNTS, strict=True))
    results = [
        estimate(start, *zip(*order, strict=True)) for order in itertools.permutations(clients)
    ]
    assert all(result == results[0] for result in results)
    assert estimate(start, UPDATES, seed=1) != results[0]  # the seed decides


def test_what_is_kept_does_not_grow_with_the_clients():
    sketch = ProductSketch(SHAPES, 0)
    mean = WeightedMean(SHAPES | sketch.shapes)
    sizes = set()
    for client in range(20):
        update = build_state(client)
        mean.add(update | sketch.project(update), 3)
        sizes.add(sum(total.nbytes for total in mean._sums.values()))
    smaller = sum(min(sizes_) for sizes_ in SIZES.values())
    assert sizes == {8 * (sum(map(torch.Size.numel, SHAPES.values())) + NUM_COLUMNS * smaller)}
