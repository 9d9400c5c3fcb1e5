from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from fedlora_app.data.importing.assignment import (
    assign_splits,
    group_questions,
    partition_dirichlet,
    partition_growing,
    partition_iid,
    partition_labels,
    partition_sizes,
)
from fedlora_app.data.records import DataError
from fedlora_app.data.similarity import group_nearly, match_nearly

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
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


def wordings(seed: int, num: int) -> list[str]:
    """Questions of few words in several spellings, so that chains of near-duplicates arise."""
    rng = random.Random(seed)
    words = ["permit", "permits", "permitt", "licence", "lisence", "please", "the", "garage", "7"]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(4, 7))) for _ in range(num)]


def test_groups_are_what_all_pairs_of_near_duplicates_connect():
    questions = list(dict.fromkeys(wordings(0, 250)))
    parent = {question: question for question in questions}

    def find(question: str) -> str:
        while parent[question] != question:
            question = parent[question]
        return question

    for one, other in combinations(questions, 2):
        if any(match_nearly([one], [other])):
            parent[find(one)] = find(other)
    expected = {frozenset(q for q in questions if find(q) == root) for root in map(find, questions)}
    assert {frozenset(group) for group in group_nearly(questions)} == expected
    assert max(map(len, expected)) > 3


def test_groups_are_numbered_as_they_appear_and_repeats_share_one():
    lamps, roads = "who mends a broken lamp in my street", "who mends a broken road in the town"
    questions = [lamps, roads, f"please {lamps}", roads]
    done = []
    numbers = group_questions(questions, lambda what, done_, total: done.append((done_, total)))
    assert numbers == [0, 1, 0, 1]
    assert done[-1] == (3, 3)


def build_case(seed: int) -> tuple[list[int], list[str]]:
    rng = random.Random(seed)
    groups, owners = [], []
    for group in range(300):
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            groups.append(group)
            owners.append(rng.choice(["ann", "bob", "cy", ""]))
    return groups, owners


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_whole_and_every_owner_comes_near_the_shares(seed):
    groups, owners = build_case(seed)
    splits = assign_splits(groups, owners, SHARES, seed=seed, train_only=frozenset({3, 4}))
    by_group = {frozenset({group, split}) for group, split in zip(groups, splits, strict=True)}
    assert len(by_group) == 300
    assert {s for g, s in zip(groups, splits, strict=True) if g in (3, 4)} == {"train"}
    for owner in set(owners):
        own = Counter(s for s, o in zip(splits, owners, strict=True) if o == owner)
        for split, share in SHARES.items():
            assert abs(own[split] / own.total() - share) < 0.04
    assert assign_splits(groups, owners, SHARES, seed=seed, train_only=frozenset({3, 4})) == splits
    assert assign_splits(groups, owners, SHARES, seed=seed + 1) != splits


def test_questions_that_several_ask_reach_every_split():
    groups = [*range(400), *range(300, 350)]
    owners = ["ann"] * 400 + ["bob"] * 50
    splits = assign_splits(groups, owners, SHARES, seed=0)
    asked_by_both = Counter(splits[400:])
    assert asked_by_both["test"] >= 4
    assert asked_by_both["validation"] >= 4


@pytest.mark.parametrize("seed", range(20))
def test_small_owners_get_every_split_that_their_groups_allow(seed):
    groups = [0, 1, 2, 3, 4, 5, 5, *range(10, 60)]
    owners = ["three"] * 3 + ["two"] * 2 + ["one"] * 2 + ["many"] * 50
    splits = assign_splits(groups, owners, SHARES, seed=seed)
    found = {
        owner: {s for s, o in zip(splits, owners, strict=True) if o == owner} for owner in owners
    }
    assert found == {
        "three": {"train", "validation", "test"},
        "two": {"train", "test"},
        "one": {"train"},
        "many": {"train", "validation", "test"},
    }


@pytest.mark.parametrize("seed", range(20))
def test_owners_of_the_same_questions_all_train(seed):
    groups = [0, 0, 0, 1, 1, 2]
    owners = ["ann", "bob", "cy", "ann", "bob", "ann"]
    splits = assign_splits(groups, owners, SHARES, seed=seed)
    assert {o for o, s in zip(owners, splits, strict=True) if s == "train"} == {"ann", "bob", "cy"}
    assert set(splits) == {"train", "validation", "test"}


@pytest.mark.parametrize("seed", range(10))
def test_shared_splits_need_no_record_of_everyone(seed):
    groups, owners = list(range(20)), ["ann", "bob"] * 10
    splits = assign_splits(groups, owners, SHARES, seed=seed, shared=True)
    assert set(splits) == set(SHARES)
    small = assign_splits([0, 1, 2, 3], ["ann", "ann", "bob", "cy"], SHARES, seed=seed, shared=True)
    trained = {o for o, s in zip(["ann", "ann", "bob", "cy"], small, strict=True) if s == "train"}
    assert trained == {"ann", "bob", "cy"}
    assert Counter(small) == {"train": 3, "test": 1}


def test_splits_that_are_not_asked_for_stay_empty():
    assert set(assign_splits(range(9), ["ann"] * 9, {"train": 1.0}, seed=0)) == {"train"}
    halves = assign_splits(range(10), ["ann"] * 10, {"train": 0.5, "test": 0.5}, seed=0)
    assert Counter(halves) == {"train": 5, "test": 5}
