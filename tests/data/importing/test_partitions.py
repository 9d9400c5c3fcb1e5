from __future__ import annotations

from collections import Counter

import pytest

from fedlora_app.data.importing.partitions import (
    partition_dirichlet,
    partition_growing,
    partition_iid,
    partition_labels,
    partition_sizes,
)
from fedlora_app.data.records import DataError

LABELS = [f"label {number % 5}" for number in range(200)]


def count(owners: list, label: str) -> list[int]:
    counted = Counter(o for o, own in zip(owners, LABELS, strict=True) if own == label)
    return [counted[client] for client in range(4)]


@pytest.mark.parametrize(
    "divide",
    [
        lambda seed: partition_iid(200, 4, seed),
        lambda seed: partition_sizes(200, (0.4, 0.3, 0.2, 0.1), seed),
        lambda seed: partition_growing(200, 4, "square", seed),
        lambda seed: partition_labels(LABELS, 4, 2, seed),
        lambda seed: partition_dirichlet(LABELS, 4, 0.5, seed),
    ],
)
def test_every_record_goes_to_one_client_as_the_seed_says(divide):
    owners = divide(1)
    assert len(owners) == 200
    assert set(owners) == {0, 1, 2, 3}
    assert divide(1) == owners
    assert divide(2) != owners


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(Counter(partition_iid(11, 4, 0)).values()) == [2, 3, 3, 3]


def test_sizes_are_shares_or_numbers_of_records():
    assert Counter(partition_sizes(10, (0.55, 0.25, 0.2), 0)) == {0: 6, 1: 2, 2: 2}
    assert Counter(partition_sizes(10, (5, 2), 0)) == {0: 5, 1: 2, None: 3}
    assert Counter(partition_sizes(10, (1.0,), 0)) == {0: 10}


@pytest.mark.parametrize(
    ("growth", "expected"),
    [("linear", [20, 40, 60, 80]), ("square", [6, 26, 60, 108]), ("exponential", [6, 17, 47, 130])],
)
def test_clients_of_growing_size(growth, expected):
    counted = Counter(partition_growing(200, 4, growth, 0))
    assert [counted[client] for client in range(4)] == expected


def test_each_client_has_a_few_labels_which_their_holders_share_evenly():
    owners = partition_labels(LABELS, 4, 2, 3)
    pairs = set(zip(owners, LABELS, strict=True))
    assert Counter(client for client, _ in pairs) == {0: 2, 1: 2, 2: 2, 3: 2}
    for label in set(LABELS):
        held = [number for number in count(owners, label) if number]
        assert sum(held) == 40
        assert max(held) - min(held) <= 1


def test_a_small_alpha_skews_the_labels_and_a_large_one_does_not():
    def largest_share(alpha: float) -> float:
        owners = partition_dirichlet(LABELS, 4, alpha, 0)
        return sum(max(count(owners, label)) for label in set(LABELS)) / 200

    assert largest_share(0.05) > 0.8
    assert largest_share(1000) < 0.35
    sizes = Counter(partition_dirichlet(LABELS, 4, 0.3, 0, min_records=20))
    assert min(sizes.values()) >= 20


@pytest.mark.parametrize(
    ("divide", "message"),
    [
        (lambda: partition_iid(2, 3, 0), "1 of 3 clients would get none of the 2 records"),
        (lambda: partition_sizes(5, (4, 2), 0), "6 records are asked for, but there are 5"),
        (lambda: partition_sizes(5, (0.99, 0.01), 0), "1 of 2 clients would get none"),
        (lambda: partition_growing(20, 5, "exponential", 0), "some of 5 clients would get none"),
        (lambda: partition_growing(20, 900, "exponential", 0), "some of 900 clients"),
        (lambda: partition_labels(LABELS, 2, 2, 0), "room for 4 labels, but there are 5"),
        (lambda: partition_labels(LABELS, 2, 6, 0), "is 6, but there are 5 labels"),
        (lambda: partition_labels(["a", "b"], 4, 1, 0), "2 of 4 clients would get none"),
        (lambda: partition_dirichlet(LABELS, 4, 1e-3, 0, 50), "Raise dirichlet_alpha"),
    ],
)
def test_partitions_that_leave_clients_or_records_out_are_refused(divide, message):
    with pytest.raises(DataError, match=message):
        divide()
