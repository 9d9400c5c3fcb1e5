"""Who gets which record, and in which split: pure functions of positions, labels and a seed.

Partitions are those of ``flwr-datasets``, on records in an order that the seed decides.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedlora_app.data.records import DataError
from fedlora_app.data.similarity import group_nearly
from fedlora_app.foundation.seeds import derive_seed

TRAIN = "train"
REPAIR_ORDER = ("train", "test", "validation")  # who gets a group where there are too few
MAX_SEEDS = 10  # each of which DirichletPartitioner draws 11 times from
REPORT_INTERVAL = 500  # groups


def partition_iid(num_records: int, num_clients: int, seed: int) -> list[int | None]:
    """Deal the shuffled records out; sizes differ by one at most."""
    from flwr_datasets.partitioner import IidPartitioner

    _require_records(num_records, num_clients, num_clients - num_records)
    return _divide(IidPartitioner(num_clients), num_clients, _shuffle(num_records, seed, "clients"))


def partition_sizes(num_records: int, sizes: Sequence[float], seed: int) -> list[int | None]:
    """Draw so many records for each client; None for those that nobody gets.

    Args:
        sizes: shares that sum to 1, or numbers of records.
    """
    from flwr_datasets.partitioner import SizePartitioner

    shares = max(sizes) <= 1
    counts = _apportion(num_records, sizes) if shares else [int(size) for size in sizes]
    if sum(counts) > num_records:
        raise DataError(
            f"sizes: {sum(counts)} records are asked for, but there are {num_records}. "
            "Ask for fewer, or give shares that sum to 1."
        )
    _require_records(num_records, len(counts), counts.count(0))
    return _divide(SizePartitioner(counts), len(counts), _shuffle(num_records, seed, "clients"))


def partition_growing(
    num_records: int, num_clients: int, growth: str, seed: int
) -> list[int | None]:
    """Draw records for clients n = 1, 2, ... in the proportions n, n squared or e to the n.

    Args:
        growth: linear, square or exponential.
    """
    from flwr_datasets import partitioner

    kinds = {
        "linear": partitioner.LinearPartitioner,
        "square": partitioner.SquarePartitioner,
        "exponential": partitioner.ExponentialPartitioner,
    }
    order = _shuffle(num_records, seed, "clients")
    try:
        return _divide(kinds[growth](num_clients), num_clients, order)
    except ValueError:
        raise DataError(
            f"With partition {growth}, some of {num_clients} clients would get none of the "
            f"{num_records} records. Ask for fewer clients."
        ) from None


def partition_labels(
    labels: Sequence[str], num_clients: int, labels_per_client: int, seed: int
) -> list[int | None]:
    """Give each client the records of a few labels (McMahan et al. 2017, arXiv:1602.05629).

    Labels are dealt out in a drawn order, as often as there are places; a label's records are
    divided evenly between those who have it.
    """
    # PathologicalPartitioner leaves out the records of labels that no client has drawn.
    names = sorted(set(labels))
    num_places = num_clients * labels_per_client
    if labels_per_client > len(names):
        raise DataError(
            f"labels_per_client is {labels_per_client}, but there are {len(names)} labels."
        )
    if num_places < len(names):
        raise DataError(
            f"{num_clients} clients with labels_per_client {labels_per_client} have room for "
            f"{num_places} labels, but there are {len(names)}, so records would be left over. "
            "Raise one of the two."
        )
    order = [names[index] for index in _shuffle(len(names), seed, "labels")]
    holders = defaultdict(list)
    for place in range(num_places):
        holders[order[place % len(order)]].append(place // labels_per_client)
    owners: list[int | None] = [None] * len(labels)
    dealt: Counter[str] = Counter()
    for position in _shuffle(len(labels), seed, "clients"):
        label = labels[position]
        owners[position] = holders[label][dealt[label] % len(holders[label])]
        dealt[label] += 1
    _require_records(len(labels), num_clients, num_clients - len(set(owners)))
    return owners


def partition_dirichlet(
    labels: Sequence[str], num_clients: int, alpha: float, seed: int, min_records: int = 1
) -> list[int | None]:
    """Divide each label's records by shares drawn from Dir(alpha) (Yurochkin et al. 2019).

    Drawn again, up to 110 times, until every client has ``min_records`` (arXiv:1905.12022 and
    the benchmarks after it do the same).
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    order = _shuffle(len(labels), seed, "clients")
    for draw in range(MAX_SEEDS):
        partitioner = DirichletPartitioner(
            *(num_clients, "label", alpha, min_records),
            shuffle=False,
            seed=derive_seed(seed, "import", "dirichlet", draw),
        )
        try:
            return _divide(partitioner, num_clients, order, labels)
        except ValueError:
            continue
    raise DataError(
        f"However often it was drawn with dirichlet_alpha {alpha:g}, some of the {num_clients} "
        f"clients never got {min_records} records. Raise dirichlet_alpha, or lower num_clients."
    )


def group_questions(questions: Sequence[str], report: Callable[[str, int, int], None]) -> list[int]:
    """Return for every question the number of its group of near-duplicates.

    Groups are numbered in the order in which they first appear.
    """
    found: dict[str, int] = {}
    num_distinct = len(set(questions))
    for number, group in enumerate(group_nearly(questions)):
        found |= dict.fromkeys(group, number)
        if number % REPORT_INTERVAL == 0 or len(found) == num_distinct:
            report("finding near-duplicates", len(found), num_distinct)
    order: dict[int, int] = {}
    return [order.setdefault(found[question], len(order)) for question in questions]


def assign_splits(
    groups: Sequence[int],
    owners: Sequence[str],
    shares: Mapping[str, float],
    *,
    seed: int,
    train_only: frozenset[int] = frozenset(),
    shared: bool = False,
) -> list[str]:
    """Give every group whole to one split, so that each owner's records come near the shares.

    Groups go, in a drawn order, to the split that is furthest behind: for their owners, and for
    groups of just these owners, so that questions that several clients ask reach all splits
    alike. Then each empty split of an owner gets a group from another one, where one can be
    spared; there is always something to train on.

    Args:
        shares: by split, ``train`` among them.
        train_only: groups that must be trained on.
        shared: the owners share every split but ``train``, which need not have records of each.

    Returns:
        The split of each record.
    """
    splitter = _Splitter(groups, owners, shares, train_only, shared)
    names = list(splitter.counts)
    order = [names[index] for index in _shuffle(len(names), seed, "splits")]
    for group in sorted(order, key=lambda group: group not in train_only):
        splitter.place(group)
    splitter.fill_empty(order)
    return [splitter.split_of[group] for group in groups]


class _Splitter:
    """Keeps count of what each owner has in each split while groups are placed."""

    def __init__(
        self,
        groups: Sequence[int],
        owners: Sequence[str],
        shares: Mapping[str, float],
        train_only: frozenset[int],
        shared: bool,
    ) -> None:
        self.counts: dict[int, Counter[str]] = defaultdict(Counter)
        for group, owner in zip(groups, owners, strict=True):
            self.counts[group][owner] += 1
        self.shares = shares
        self.train_only = train_only
        self.shared = shared
        self.split_of: dict[int, str] = {}
        self._placed: dict[object, Counter[str]] = defaultdict(Counter)  # by owner or owners
        self._held: Counter[tuple[str, str]] = Counter()  # by owner of a file, and split

    def place(self, group: int) -> None:
        """Give the group to the split that is furthest behind its share."""
        weights: dict[object, int] = dict(self.counts[group])
        if len(weights) > 1:
            weights[frozenset(weights)] = self.counts[group].total()

        def lag(split: str) -> float:
            return sum(
                weight * (self.shares[split] * (placed.total() + weight) - placed[split])
                for weight, placed in ((w, self._placed[key]) for key, w in weights.items())
            )

        split = TRAIN if group in self.train_only else max(self.shares, key=lag)
        for key, weight in weights.items():
            self._placed[key][split] += weight
        self._move(group, split)

    def fill_empty(self, order: Sequence[int]) -> None:
        """Give each empty split of an owner the smallest group that can be spared."""
        groups_of: dict[str, list[int]] = defaultdict(list)
        for group in order:
            for owner in self.counts[group]:
                groups_of[owner].append(group)
        for split in (name for name in REPAIR_ORDER if name in self.shares):
            for holder in sorted({self._holder(owner, split) for owner in groups_of}):
                if self._held[holder, split]:
                    continue
                groups = groups_of.get(holder, order)  # the holder of a shared split has all
                spare = [group for group in groups if self._can_spare(group, split)]
                if spare:
                    self._move(min(spare, key=lambda g: self.counts[g].total()), split)

    def _holder(self, owner: str, split: str) -> str:
        """Return whose file the owner's records of a split go into; empty: that of all."""
        return "" if self.shared and split != TRAIN else owner

    def _held_by(self, group: int, split: str) -> Counter[str]:
        held: Counter[str] = Counter()
        for owner, count in self.counts[group].items():
            held[self._holder(owner, split)] += count
        return held

    def _can_spare(self, group: int, split: str) -> bool:
        """Return whether moving the group there empties no split of the same or a higher rank."""
        now = self.split_of[group]
        if now == split or group in self.train_only:
            return False
        if REPAIR_ORDER.index(split) < REPAIR_ORDER.index(now):
            return True
        return all(self._held[o, now] > count for o, count in self._held_by(group, now).items())

    def _move(self, group: int, split: str) -> None:
        if group in self.split_of:
            for holder, count in self._held_by(group, self.split_of[group]).items():
                self._held[holder, self.split_of[group]] -= count
        for holder, count in self._held_by(group, split).items():
            self._held[holder, split] += count
        self.split_of[group] = split


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a whole number by shares: rounded down, the largest rests up."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _shuffle(length: int, seed: int, what: str) -> list[int]:
    return np.random.default_rng(derive_seed(seed, "import", what)).permutation(length).tolist()


def _divide(
    partitioner: Any, num_clients: int, order: Sequence[int], labels: Sequence[str] = ()
) -> list[int | None]:
    """Return whose each record is, by a partitioner that sees them in ``order``.

    Raises:
        ValueError: the partitioner cannot divide them so.
    """
    from datasets import Dataset

    columns = {"position": order}
    if labels:
        columns["label"] = np.unique(labels, return_inverse=True)[1][order]
    partitioner.dataset = Dataset.from_dict(columns)
    owners: list[int | None] = [None] * len(order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another draw, or records that are left over
        for client in range(num_clients):
            for position in partitioner.load_partition(client)["position"][:]:
                owners[position] = client
    return owners


def _require_records(num_records: int, num_clients: int, num_empty: int) -> None:
    """Refuse a partition with a client that has nothing."""
    if num_empty > 0:
        raise DataError(
            f"{num_empty} of {num_clients} clients would get none of the {num_records} records. "
            "Ask for fewer clients, or larger shares."
        )
