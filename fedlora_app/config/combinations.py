"""Aggregation settings that depend on each other: what is filled in, and what cannot work together.

On raw data, so that faults join those of single fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fedlora_app.config.schema import (
    AVERAGING_MODES,
    GLOBAL,
    LOCAL,
    MAX_FROZEN_RANK,
    AdapterConfig,
    FederatedConfig,
)
from fedlora_app.config.sharing import PERSONAL, PLAIN_MEANS, WITH_FROZEN_PART, WITH_MIXED_RANKS

ROBUST = ("median", "trimmed-mean")
MEANS = (*PLAIN_MEANS, *ROBUST)
"""Rules of which a server optimizer can take the result for a mean update."""
LEAST_ROBUST = 3


def fill_frozen_rank(raw: dict[str, Any]) -> dict[str, Any]:
    """Return raw data with the frozen rank that its rule needs, where it says none.

    It is that of all clients' updates side by side, which is exact for a first round, or the most
    that there is room for.
    """
    federated, adapters = _section(raw, "federated"), _section(raw, "adapters")
    rule, mode = federated.get("aggregation"), federated.get("mode", "dual")
    ours = _section(adapters, GLOBAL)
    if rule not in WITH_FROZEN_PART or mode not in AVERAGING_MODES or "frozen_rank" in ours:
        return raw
    rank, clients = _rank_of(ours), federated.get("clients")
    if rank is None or not isinstance(clients, list):
        return raw
    ranks = [_client_rank(client, rank) for client in clients]
    if not all(isinstance(r, int) for r in ranks):
        return raw
    filled = ours | {"frozen_rank": min(sum(ranks), MAX_FROZEN_RANK)}
    return raw | {"adapters": adapters | {GLOBAL: filled}}


def find_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Yield what cannot work together, each with the reason and what to do."""
    federated, adapters = _section(raw, "federated"), _section(raw, "adapters")
    listed = federated.get("clients")
    clients = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    rule, mode = federated.get("aggregation", "fedavg"), federated.get("mode", "dual")
    yield from _weight_faults(federated, clients)
    yield from _participation_faults(federated, clients)
    yield from _rank_faults(rule, mode, adapters, clients)
    if federated.get("keep_uploads") is True:
        yield from _upload_faults(rule, mode, federated)
    if mode in AVERAGING_MODES:
        yield from _rule_faults(rule, federated, _fewest_members(federated, clients))
    if rule != "svd" and federated.get("svd_energy") is not None:
        yield "federated.svd_energy: it belongs to federated.aggregation: svd. Set it to null."


def _rule_faults(rule: Any, federated: dict[str, Any], num_clients: int) -> Iterator[str]:
    fraction = federated.get("fraction", 1.0)
    at_once = num_clients
    if isinstance(fraction, float) and 0 < fraction < 1:
        at_once = max(1, round(fraction * num_clients))
    at_once = _fewest_answers(federated, at_once)
    if rule in ROBUST and at_once < LEAST_ROBUST:
        yield (
            f"federated.aggregation: {rule} needs the updates of {LEAST_ROBUST} clients and a "
            f"round may have {at_once}; of two there is no middle. Use fedavg, or more clients "
            "(federated.fraction, min_clients, first_round and last_round count)."
        )
    share = federated.get("trim_share", FederatedConfig.model_fields["trim_share"].default)
    trims = rule == "trimmed-mean" and isinstance(share, float) and at_once >= LEAST_ROBUST
    if trims and int(share * at_once) == 0:
        enough = math.ceil(100 / at_once) / 100
        yield (
            f"federated.trim_share: {share:g} of {at_once} clients is less than one, so that "
            f"nothing would be trimmed. Set it to {enough:g} or more, below 0.5."
        )
    if rule in ROBUST and federated.get("weighting") == "given":
        yield (
            f"federated.weighting: {rule} counts every client alike. Leave the weights out, or use "
            "another rule."
        )
    if rule == "rest-of-world" and at_once < 2:
        yield (
            "federated.aggregation: rest-of-world needs the updates of two clients in every round, "
            f"and one may have {at_once}; there are no others. Use more clients (federated."
            "fraction, min_clients, first_round and last_round count), or fedavg."
        )
    for key, default in (("server_optimizer", "none"), ("server_learning_rate", None)):
        if rule not in MEANS and federated.get(key, default) != default:
            yield (
                f"federated.{key}: the result of {rule} is not a mean update that an optimizer "
                f"could go on from. Leave it out, or use one of {', '.join(MEANS)}."
            )


def _upload_faults(rule: Any, mode: Any, federated: dict[str, Any]) -> Iterator[str]:
    kept, num_rounds = federated.get("keep_rounds"), federated.get("num_rounds", 5)
    if isinstance(kept, int) and isinstance(num_rounds, int) and kept < num_rounds:
        yield (
            f"federated.keep_uploads: forgetting a client begins with round 0 and takes all rounds "
            f"again, and federated.keep_rounds keeps {kept} of {num_rounds}. Set that to null, or "
            "federated.keep_uploads to false."
        )
    if rule in PERSONAL and mode in AVERAGING_MODES:
        yield (
            f"federated.keep_uploads: with {rule} each client has a global adapter of its own, of "
            "which no updates can take another client's share away. Set it to false, or use "
            "another rule."
        )


def _rank_faults(
    rule: Any, mode: Any, adapters: dict[str, Any], clients: list[dict[str, Any]]
) -> Iterator[str]:
    ours, local = _section(adapters, GLOBAL), _section(adapters, LOCAL)
    rank, frozen = _rank_of(ours), ours.get("frozen_rank", 0)
    if local.get("frozen_rank", 0) != 0:
        yield "adapters.local.frozen_rank: no part of a local adapter is the server's. Set it to 0."
    has_frozen = rule in WITH_FROZEN_PART and mode in AVERAGING_MODES
    if has_frozen and frozen == 0:
        yield (
            f"adapters.global.frozen_rank: {rule} keeps there what the mean misses, and it is 0. "
            "Leave it out for the ranks of all clients together."
        )
    makes_none = rule not in WITH_FROZEN_PART and mode != "adapted"  # which has what was made
    if makes_none and isinstance(frozen, int) and frozen > 0:
        yield (
            f"adapters.global.frozen_rank: {rule} makes no such part. Leave it out, or use one of "
            f"{', '.join(WITH_FROZEN_PART)}."
        )
    for client in clients:
        own, name = client.get("rank"), client.get("id")
        if not isinstance(own, int) or rank is None:
            continue
        if own > rank:
            yield (
                f"federated.clients: {name!s:.100} has rank {own}, above adapters.global.rank, "
                f"which is {rank}. Raise that, or lower the client's."
            )
        elif own < rank and (rule not in WITH_MIXED_RANKS or mode not in AVERAGING_MODES):
            averages = mode in AVERAGING_MODES
            reason = f"{rule} needs equal ranks" if averages else "each trains alone"
            rather = f", or use one of {', '.join(WITH_MIXED_RANKS)}" * averages
            yield (
                f"federated.clients: {name!s:.100} has rank {own}, others {rank}, and {reason}. "
                f"Leave it out{rather}."
            )
        elif own < rank and mode == "finetuned":
            yield (
                f"federated.clients: {name!s:.100} has rank {own}, and in mode finetuned the local "
                f"adapter begins as a copy of one of rank {rank}. Leave it out."
            )


def _weight_faults(federated: dict[str, Any], clients: list[dict[str, Any]]) -> Iterator[str]:
    given = federated.get("weighting", "examples") == "given"
    for client in clients:
        has_weight, name = client.get("weight") is not None, client.get("id")
        if given and not has_weight:
            yield (
                f"federated.clients: {name!s:.100} has no weight, and federated.weighting is given."
            )
        elif has_weight and not given:
            yield (
                f"federated.clients: {name!s:.100} has a weight, which only federated.weighting: "
                "given uses. Set that, or leave the weight out."
            )


def _participation_faults(
    federated: dict[str, Any], clients: list[dict[str, Any]]
) -> Iterator[str]:
    num_rounds = federated.get("num_rounds", 5)
    if not isinstance(num_rounds, int) or num_rounds < 1:
        return
    for client in clients:
        first, last = client.get("first_round", 1), client.get("last_round")
        last = num_rounds if last is None else last
        if not isinstance(first, int) or not isinstance(last, int):
            return
        if first > min(last, num_rounds):
            yield (
                f"federated.clients: {client.get('id')!s:.100} takes part from round {first} to "
                f"{last}, which is in no round of {num_rounds}."
            )
    empty = [n for n, members in _count_members(num_rounds, clients).items() if members == 0]
    if clients and empty:
        yield f"federated.clients: nobody takes part in round {empty[0]}."


def _count_members(num_rounds: int, clients: list[dict[str, Any]]) -> dict[int, int]:
    """Return how many take part in each round in which that may have changed, and in the first."""
    spans = []
    for client in clients:
        last = client.get("last_round")
        spans.append((client.get("first_round", 1), num_rounds if last is None else last))
    changes = {1, *(first for first, _ in spans), *(last + 1 for _, last in spans)}
    rounds = sorted(n for n in changes if 1 <= n <= num_rounds)
    return {n: sum(first <= n <= last for first, last in spans) for n in rounds}


def _fewest_members(federated: dict[str, Any], clients: list[dict[str, Any]]) -> int:
    """Return how many clients the smallest round has; all where that cannot be told."""
    num_rounds = federated.get("num_rounds", FederatedConfig.model_fields["num_rounds"].default)
    ends = [client.get("first_round", 1) for client in clients]
    ends += [n for client in clients if (n := client.get("last_round")) is not None]
    if not all(isinstance(n, int) for n in [num_rounds, *ends]) or num_rounds < 1:
        return len(clients)
    return min(_count_members(num_rounds, clients).values())


def _fewest_answers(federated: dict[str, Any], at_once: int) -> int:
    """Return with how many updates a round still counts."""
    least = federated.get("min_clients")
    return min(at_once, least) if isinstance(least, int) else at_once


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def _rank_of(adapter: dict[str, Any]) -> int | None:
    rank = adapter.get("rank", AdapterConfig.model_fields["rank"].default)
    return rank if isinstance(rank, int) else None


def _client_rank(client: Any, rank: int) -> Any:
    own = client.get("rank") if isinstance(client, dict) else None
    return rank if own is None else own
