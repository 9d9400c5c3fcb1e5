"""Which of several runs are alike, and which two variants of them are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from fedlora_app.evaluation.comparison import CONDITIONS, EvaluatedRun

Evaluations = Mapping[str, Mapping[str, Any]]
"""Each run's ``evaluation.json``."""

Variant = dict[int, str]
"""Like runs by seed."""


def group_alike(names: Sequence[str], evaluations: Evaluations) -> list[Variant]:
    """Return the variants among evaluated runs; of several runs with one seed the first given.

    Alike is what ``comparison.group_by_mode`` takes for it.
    """
    variants: dict[str, Variant] = {}
    keys = ("mode", "answering", "num_parameters", "files", "settings")
    for name in names:
        if name in evaluations:
            evaluation = evaluations[name]
            identity = [*map(evaluation.get, keys), _describe_conditions(name, evaluations)]
            variant = variants.setdefault(json.dumps(identity, sort_keys=True), {})
            variant.setdefault(evaluation["seed"], name)
    return list(variants.values())


def choose_pair(
    ones: Sequence[Variant], others: Sequence[Variant], evaluations: Evaluations
) -> tuple[Variant, Variant]:
    """Return comparable variants if there are any, of these the most runs, then the first given."""

    def rank(pair: tuple[Variant, Variant]) -> tuple[bool, int]:
        one, other = (_describe_conditions(next(iter(v.values())), evaluations) for v in pair)
        return one != other, -sum(map(len, pair))

    return min(product(ones, others), key=rank)


def tell_left_out(
    names: Sequence[str],
    variants: Sequence[Variant],
    chosen: Sequence[Variant],
    evaluations: Evaluations,
) -> Iterator[str]:
    """Yield which of the runs have no part in the verdict, and why."""
    grouped = {name for variant in variants for name in variant.values()}
    compared = {name for variant in chosen for name in variant.values()}
    others = [name for name in names if name in grouped - compared]
    repeated = [name for name in names if name in evaluations and name not in grouped]
    unknown = [name for name in names if name not in evaluations]
    if others:
        yield (
            "Two variants are compared: comparable ones before others, then the most runs, then "
            f"the first given. Other variants stand in the table: {list_names(others)}."
        )
    if repeated:
        yield f"Not counted, because a like run has the same seed: {list_names(repeated)}."
    if unknown:
        yield (
            f"Not evaluated, so nothing tells what they are like: {list_names(unknown)}. They "
            "count after: fedlora evaluate."
        )


def list_names(names: Sequence[str], most: int = 3) -> str:
    """Return "a, b, c and 2 more"."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def _describe_conditions(name: str, evaluations: Evaluations) -> list[dict[str, str]]:
    run = EvaluatedRun(name, evaluations[name])
    return [describe(run) for describe in CONDITIONS.values()]
