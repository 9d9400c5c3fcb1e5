"""What to import, whose it is and how it is split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

from fedlora_app.config.schema import ConfigError

Role = Literal["local", "universal"]
Partition = Literal["iid", "label", "dirichlet", "sizes", "linear", "square", "exponential"]

Turns = Literal["refuse", "last", "split"]

GROWING = ("linear", "square", "exponential")
"""Partitions whose clients have ever more records."""
SPLITS = ("train", "validation", "test")
TEXT_FIELDS = ("instruction", "input", "output")
SHARES_TOLERANCE = 1e-6
# The settings that only some schemes look at.
SCHEMES_OF_SETTING = {
    "num_clients": set(get_args(Partition)),
    "sizes": {"sizes"},
    "label_column": {"label", "dirichlet"},
    "labels_per_client": {"label"},
    "dirichlet_alpha": {"dirichlet"},
}


@dataclass(frozen=True)
class ImportSettings:
    """What to read, whose it is and how it is split.

    Raises:
        ConfigError: with every fault.
    """

    split: str | None = None
    """Of a dataset, or the name without ending of a file in a folder. Default: all together."""
    subset: str | None = None
    """Configuration of a dataset on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub."""
    encoding: str = "utf-8"
    """Of JSON and CSV files."""
    instruction_column: str = "instruction"
    input_column: str = "input"
    """May be missing while it is the default one."""
    output_column: str = "output"
    messages_column: str = "messages"
    """Read where there is no "instruction": a list of {role, content} or {from, value}; system
    messages are left out."""
    turns: Turns = "refuse"
    """Of a conversation of several questions: which become records, with what came before."""
    keep_columns: tuple[str, ...] = ()
    """Further columns to keep, such as fact, distractors, evaluation_guide."""
    fact_column: str | None = None
    """Its values say which fact a row is a wording of: they are kept as "fact", and of every fact a
    client trains on one wording at least."""
    client_column: str | None = None
    """Its values become client ids; rows where it is empty are universal data."""
    partition: Partition | None = None
    num_clients: int | None = None
    sizes: tuple[float, ...] = ()
    """Of the clients: shares that sum to 1, or numbers of records."""
    label_column: str | None = None
    labels_per_client: int = 2  # McMahan et al. 2017, the pathological partition
    dirichlet_alpha: float = 0.5
    """The smaller, the more the clients' labels differ."""
    role: Role = "local"
    """What the clients' records are: each one's own, or its share of what is true for all."""
    validation: float = 0.1
    test: float = 0.1
    seed: int = 42
    skip_invalid: bool = False
    """Drop and count invalid records instead of stopping."""

    def __post_init__(self) -> None:
        """Check everything at once."""
        faults = [*self._find_column_faults(), *self._find_client_faults()]
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name}: expected a share from 0 to below 1.")
        if self.validation + self.test >= 1:
            faults.append("validation and test: together they leave nothing to train on.")
        for name, choices in (("role", get_args(Role)), ("turns", get_args(Turns))):
            if getattr(self, name) not in choices:
                faults.append(f"{name}: {getattr(self, name)!r} is none of {', '.join(choices)}.")
        try:
            "a".encode(self.encoding).decode(self.encoding)
        except (LookupError, ValueError):
            faults.append(f"encoding: {self.encoding!r} is not known. Name one such as cp1252.")
        if faults:
            listing = "\n".join(f"  {fault}" for fault in faults)
            raise ConfigError(f"The import cannot be done as asked:\n{listing}")

    @property
    def shares(self) -> dict[str, float]:
        """The share of records of every split that was asked for, train first."""
        shares = {"train": 1 - self.validation - self.test}
        return shares | {n: getattr(self, n) for n in SPLITS[1:] if getattr(self, n)}

    @property
    def has_labels(self) -> bool:
        """Whether the partition goes by labels."""
        return self.partition in SCHEMES_OF_SETTING["label_column"]

    @property
    def idle(self) -> list[str]:
        """Settings that differ from their default and have no effect."""
        defaults = {setting.name: setting.default for setting in fields(self)}
        return [
            name
            for name, schemes in SCHEMES_OF_SETTING.items()
            if getattr(self, name) != defaults[name] and self.partition not in schemes
        ]

    def _find_column_faults(self) -> Iterator[str]:
        for column in self.keep_columns:
            if column in TEXT_FIELDS:
                yield f'keep_columns: "{column}" is written anyway, from {column}_column.'
        if self.fact_column is not None and "fact" in self.keep_columns:
            yield 'keep_columns: "fact" is written anyway, from fact_column.'

    def _find_client_faults(self) -> Iterator[str]:
        known = get_args(Partition)
        if (self.client_column is None) == (self.partition is None):
            yield "clients: give either client_column or partition, and not both."
        if self.partition is None:
            return
        if self.partition not in known:
            yield f"partition: {self.partition!r} is none of {', '.join(known)}."
        if self.partition == "sizes":
            yield from self._find_size_faults()
        elif self.num_clients is None or self.num_clients < 1:
            yield f"num_clients: partition {self.partition} needs a number of at least 1."
        if self.has_labels and self.label_column is None:
            yield f"label_column: partition {self.partition} needs the column of the labels."
        if self.labels_per_client < 1:
            yield "labels_per_client: expected at least 1."
        if not 0 < self.dirichlet_alpha < math.inf:
            yield "dirichlet_alpha: expected a positive number."

    def _find_size_faults(self) -> Iterator[str]:
        if not self.sizes or min(self.sizes) <= 0 or math.inf in self.sizes:
            yield "sizes: partition sizes needs one positive number for each client."
        elif max(self.sizes) <= 1 and abs(sum(self.sizes) - 1) > SHARES_TOLERANCE:
            yield f"sizes: the shares sum to {sum(self.sizes):g}. Expected 1."
        elif max(self.sizes) > 1 and any(size != int(size) for size in self.sizes):
            yield "sizes: expected shares that sum to 1, or whole numbers of records."
        if self.num_clients not in (None, len(self.sizes)):
            yield f"num_clients: {self.num_clients}, but sizes has {len(self.sizes)} numbers."
