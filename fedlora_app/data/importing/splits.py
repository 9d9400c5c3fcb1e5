"""Which split a record goes into: groups of near-duplicates stay whole, across all clients."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedlora_app.data.importing.partitions import shuffle
from fedlora_app.data.similarity import group_nearly

TRAIN = "train"
REPAIR_ORDER = ("train", "test", "validation")  # who gets a group where there are too few
REPORT_INTERVAL = 500  # groups


def name_file(client: str, split: str, role: str) -> str:
    """Return where a client's records of a split go; "" is the client of universal records."""
    if client and role == "local":
        return f"{client}/local_{split}.json"
    folder = f"{client}/" if client and split == TRAIN else ""
    return f"{folder}universal_{split}.json"


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


def join_groups(groups: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Return groups anew, of which those that a row of the source connects are one.

    What a conversation says in one record stands in the question of the next.
    """
    first_row = max(groups) + 1
    ends = (list(groups), [first_row + row for row in rows])
    size = first_row + max(rows) + 1
    edges = coo_array(([True] * len(groups), ends), shape=(size, size))
    _, labels = connected_components(edges, directed=False)
    order: dict[int, int] = {}
    return [order.setdefault(labels[group], len(order)) for group in groups]


def choose_taught(
    groups: Sequence[int],
    facts: Sequence[tuple[str, str] | None],
    train_only: Collection[int],
    seed: int,
) -> frozenset[int]:
    """Return the groups that must be trained on, with one wording of every fact among them.

    A test question about what nobody trains on has an answer that nobody can learn.

    Args:
        facts: the owner and the fact of each record; None where it names none.
        train_only: groups that are among them anyway.
    """
    groups_of: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)
    for group, fact in zip(groups, facts, strict=True):
        if fact is not None:
            groups_of[fact][group] = None
    chosen, names = set(train_only), list(groups_of)
    for index in shuffle(len(names), seed, "wordings"):
        wordings = list(groups_of[names[index]])
        if chosen.isdisjoint(wordings):
            chosen.add(wordings[shuffle(len(wordings), seed, f"wordings {index}")[0]])
    return frozenset(chosen)


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
    order = [names[index] for index in shuffle(len(names), seed, "splits")]
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
