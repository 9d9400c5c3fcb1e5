"""Aggregation rules: what the server makes of the clients' updates, one rule per module.

A rule is an object that lives as long as the run. In every round it is told the global adapter that
the clients started from, gets their updates one by one as they arrive, and returns the new global
adapter. ``federated.aggregation`` names it. A new rule is one more module and one more entry
in ``RULES``; docs/extending.md has an example.
"""

from __future__ import annotations

from fedlora_app.config.schema import Config
from fedlora_app.federation.rules.alternate import Alternate
from fedlora_app.federation.rules.base import AggregationRule
from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.federation.rules.freeze_a import FreezeA
from fedlora_app.federation.rules.median import Median
from fedlora_app.federation.rules.rank_partitioned import RankPartitioned
from fedlora_app.federation.rules.residual import Residual
from fedlora_app.federation.rules.rest_of_world import RestOfWorld
from fedlora_app.federation.rules.share_one import ShareA, ShareB
from fedlora_app.federation.rules.stack import Stack
from fedlora_app.federation.rules.svd import Svd
from fedlora_app.federation.rules.trimmed_mean import TrimmedMean

__all__ = ["RULES", "AggregationRule", "build_rule"]

RULES: dict[str, type[AggregationRule]] = {
    "fedavg": FedAvg,
    "svd": Svd,
    "residual": Residual,
    "stack": Stack,
    "freeze-a": FreezeA,
    "alternate": Alternate,
    "share-a": ShareA,
    "share-b": ShareB,
    "rank-partitioned": RankPartitioned,
    "rest-of-world": RestOfWorld,
    "median": Median,
    "trimmed-mean": TrimmedMean,
}


def build_rule(config: Config) -> AggregationRule:
    """Return a new rule by the name that ``federated.aggregation`` gives."""
    return RULES[config.federated.rule](config)
