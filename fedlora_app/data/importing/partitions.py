"""Which client gets which record: pure functions of positions, labels and a seed.

Partitions are those of ``flwr-datasets``, on records in an order that the seed decides.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora_app.data.records import DataError
from fedlora_app.foundation.seeds import derive_seed

MAX_SEEDS = 10  # each of which DirichletPartitioner draws 11 times from


def partition_iid(num_records: int, num_clients: int, seed: int) -> list[int | None]:
    """Deal the shuffled records out; sizes differ by one at most."""
    from flwr_datasets.partitioner import IidPartitioner

    _require_records(num_records, num_clients, num_clients - num_records)
    return _divide(IidPartitioner(num_clients), num_clients, shuffle(num_records, seed, "clients"))


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
    return _divide(SizePartitioner(counts), len(counts), shuffle(num_records, seed, "clients"))


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
    order = shuffle(num_records, seed, "clients")
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
    order = [names[index] for index in shuffle(len(names), seed, "labels")]
    holders = defaultdict(list)
    for place in range(num_places):
        holders[order[place % len(order)]].append(place // labels_per_client)
    owners: list[int | None] = [None] * len(labels)
    dealt: Counter[str] = Counter()
    for position in shuffle(len(labels), seed, "clients"):
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

    order = shuffle(len(labels), seed, "clients")
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


def shuffle(length: int, seed: int, what: str) -> list[int]:
    """Return the positions 0 to ``length`` - 1 in an order that the seed and the purpose decide."""
    return np.random.default_rng(derive_seed(seed, "import", what)).permutation(length).tolist()


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a whole number by shares: rounded down, the largest rests up."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


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
