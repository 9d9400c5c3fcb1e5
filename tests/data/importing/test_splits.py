from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from fedlora_app.data.importing.splits import assign_splits, group_questions
from fedlora_app.data.similarity import group_nearly, match_nearly

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


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
