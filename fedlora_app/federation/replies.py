"""Clients' replies: reading them, what they must hold, and which of a round's replies count."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedlora_app.config.schema import SAFE_NAME
from fedlora_app.federation.messages import (
    ABOUT_RECORD,
    DECLARED_METRICS,
    GLOBAL_ADAPTER,
    METRIC_RECORD,
    NEEDS,
    OWN_SETTINGS,
    REGISTRATION_COUNTS,
    UPDATE_RECORD,
    MessageError,
    is_declared,
    is_possible,
    read_reason,
)
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.federation.roster import Roster
from fedlora_app.model.adapter_state import AdapterError, AdapterState
from fedlora_app.model.fingerprint import COVERS, explain_fingerprint


class RoundError(RuntimeError):
    """Too few clients returned valid results; the last complete round is untouched."""


@dataclass(frozen=True)
class Reply:
    """A client's reply, read and checked except for the update itself."""

    client_id: str
    metrics: dict[str, Any]
    facts: dict[str, str]
    arrays: ArrayRecord | None

    @property
    def needs_global(self) -> bool:
        """Whether the client has lost the global adapter and has done nothing without it."""
        return self.facts.get(NEEDS) == GLOBAL_ADAPTER

    @property
    def needs_settings(self) -> bool:
        """Whether the client has no file of its own and asks for its own settings."""
        return self.facts.get(NEEDS) == OWN_SETTINGS


def read_reply(message: Message, client_id: str | None, server_round: int) -> Reply:
    """Read the reply of the node that is ``client_id``, or, with None, that says who it is.

    Raises:
        MessageError: the client failed, or answered for another client or round.
    """
    sender = client_id or f"node {message.metadata.src_node_id}"
    if message.has_error():
        raise MessageError(f"{sender}: {read_reason(message.error.reason)}")
    about = message.content.config_records.get(ABOUT_RECORD, ConfigRecord())
    named = about.get("client-id")
    if client_id is None and isinstance(named, str) and re.fullmatch(SAFE_NAME, named):
        client_id = sender = named
    if "error" in about:
        raise MessageError(f"{sender}: {read_reason(about['error'])}")
    if client_id is None or named != client_id or about.get("server-round") != server_round:
        raise MessageError(
            f"{sender} answered as {named!r:.100} for round {about.get('server-round')!r:.100}, "
            f"expected its own id and round {server_round}."
        )
    record = message.content.metric_records.get(METRIC_RECORD, MetricRecord())
    metrics = {sys.intern(name): value for name, value in record.items()}  # the same of all clients
    undeclared = [name for name in metrics if not DECLARED_METRICS.fullmatch(name)]
    if undeclared:
        raise MessageError(
            f"{client_id} sent metrics that are not declared: {undeclared[:5]!r:.500}."
        )
    for name, value in metrics.items():
        if not is_possible(name, value):
            raise MessageError(f"{client_id} sent an impossible value as {name}: {value!r:.100}.")
    return Reply(
        client_id=client_id,
        metrics=metrics,
        facts=_read_facts(client_id, about.get("facts", "{}")),
        arrays=message.content.array_records.get(UPDATE_RECORD),
    )


def require_counts(reply: Reply) -> None:
    """Raise ``MessageError`` unless a client that registers says how many examples it has."""
    missing = [name for name in REGISTRATION_COUNTS if not isinstance(reply.metrics.get(name), int)]
    if missing:
        raise MessageError(f"{reply.client_id} did not say how many {', '.join(missing)} it has.")


def require_facts(expected: Sequence[str], reply: Reply) -> None:
    """Raise ``MessageError`` unless a client says all that is expected of it."""
    for name in expected:
        if name not in reply.facts:
            what = name.replace("_", " ")
            raise MessageError(f"{reply.client_id} did not say which {what} it holds.")


def require_examples(reply: Reply, registered: Iterable[Mapping[str, int]]) -> int:
    """Return the number of examples that a client trained on, which is its weight.

    Args:
        registered: what the clients whose data it can have trained on reported of themselves.

    Raises:
        MessageError: it is not a number from 1 to the number of all these examples.
    """
    num_examples = reply.metrics.get("num-examples")
    if not isinstance(num_examples, int) or num_examples < 1:
        raise MessageError(
            f"{reply.client_id} reports {num_examples!r} examples; at least 1 is needed."
        )
    most = sum(counts["universal_examples"] + counts["local_examples"] for counts in registered)
    if num_examples > most:
        raise MessageError(
            f"{reply.client_id} reports {num_examples} examples, and at registration it had "
            f"{most}. They would be its weight in the mean."
        )
    return num_examples


def require_update(reply: Reply, shapes: dict[str, torch.Size], dtype: str) -> AdapterState:
    """Return the update of the global adapter in a reply, fp32.

    Args:
        dtype: in which it travelled.

    Raises:
        MessageError: there is none, or its names, shapes, dtype or values are not possible.
    """
    if reply.arrays is None:
        raise MessageError(f"{reply.client_id} sent no update.")
    return unpack_state(reply.arrays, shapes, reply.client_id, dtype)


def require_same_base(recorded: dict[str, Any], base_models: Mapping[str, str]) -> None:
    """Enter the clients' base model in what the run has recorded of it.

    Args:
        recorded: ``base_model`` of the manifest, which is changed.
        base_models: the fingerprint that each client reports.

    Raises:
        RoundError: they differ from each other, or from the recorded one.
    """
    found = dict(base_models)
    if "fingerprint" in recorded:
        found["the run"] = recorded["fingerprint"]
    if len(set(found.values())) > 1:
        listing = ", ".join(f"{c}: {f[:12]}" for c, f in sorted(found.items()))
        raise RoundError(
            f"The clients do not hold the same base model ({listing}). Compare model.name, "
            "model.revision and the model's files: weights, config.json, tokenizer, chat "
            f"template.{explain_fingerprint(recorded)}"
        )
    for fingerprint in found.values():
        recorded |= {"fingerprint": fingerprint, "fingerprint_covers": COVERS}


def require_the_runs_base(recorded: Mapping[str, Any], reply: Reply) -> None:
    """Raise ``MessageError`` where a client holds another base model than the run has recorded."""
    found, expected = reply.facts["base_model"], recorded["fingerprint"]
    if found != expected:
        raise MessageError(
            f"{reply.client_id} holds another base model ({found[:12]}) than the run "
            f"({expected[:12]}). Compare model.name, model.revision and the model's files."
        )


def choose_valid(
    messages: Iterable[Message],
    server_round: int,
    roster: Roster,
    use: Callable[[Reply], None],
    *,
    ask_again: Callable[[list[str]], Iterable[Message]],
    count: Callable[[int], None],
    tell: Callable[[str, str, str], None],
) -> Iterator[Reply]:
    """Yield a round's valid replies as they come, without their updates.

    One update is in memory at a time: ``use`` folds it in, and it is freed before the next
    message is taken.

    Args:
        use: takes what a reply brings; raises ``MessageError`` or ``AdapterError`` where that is
            not valid.
        ask_again: is called once, after all others have replied, with the clients that have lost
            the global adapter, if any; returns their replies to the same messages with it.
        count: is called with the number of clients that have replied, valid or not.
        tell: is told what does not count, as (event, client, why): "failure" of a client,
            "lost_adapter", or "unasked_reply".
    """
    replied: set[str] = set()
    missing_global: list[str] = []

    def all_messages() -> Iterator[Message]:
        yield from messages
        if missing_global:
            yield from ask_again(missing_global)

    for message in all_messages():
        client = roster.sender(message)
        if client in roster.nodes:
            roster.traffic.add(client, "up", message)
        if client not in roster.nodes or client in replied:
            tell("unasked_reply", client, "")
            del message
            continue
        replied.add(client)
        count(len(replied))
        try:
            reply = read_reply(message, client, server_round)
            if reply.needs_global:
                if client in missing_global:
                    raise MessageError(f"{client} lost the global adapter that it was just sent.")
                missing_global.append(client)
                replied.remove(client)
                tell("lost_adapter", client, "")
                continue
            use(reply)
            reply = replace(reply, arrays=None)
        except (MessageError, AdapterError) as error:
            reply = None
            tell("failure", client, str(error))
            continue
        finally:
            del message  # and with it the update, before the next one comes
        yield reply


def _read_facts(client_id: str, text: Any) -> dict[str, str]:
    try:
        facts = json.loads(text)
        unknown = [name for name, value in facts.items() if not is_declared(name, value)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise MessageError(f"{client_id} sent facts that are not what was agreed on.") from None
    if unknown:
        raise MessageError(
            f"{client_id} sent facts that are not what was agreed on: {unknown[:5]!r:.500}."
        )
    return facts
