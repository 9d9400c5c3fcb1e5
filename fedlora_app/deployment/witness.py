"""What both ends enter in their logs of a run's course and of the messages between them.

A message is named by the id that Flower gives to what the server sent, and a reply by that of the
message that it answers, so that two ends' entries can be laid beside each other. No text is taken
over that a client, a data file or a configuration may have brought along: reasons are entered as
their hash, and in words only where this package made all of them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord, Message

from fedlora_app.config.schema import SAFE_NAME, Config
from fedlora_app.deployment.record import is_recorded, record
from fedlora_app.federation.digest import Digester
from fedlora_app.federation.grid import REFUSED, PacedGrid
from fedlora_app.federation.messages import ABOUT_RECORD, METRIC_RECORD, TASK_RECORD
from fedlora_app.foundation.project import hash_package

SERVER_END, CLIENT_END = "server", "client"
RUN_STARTED, RUN_ENDED, RUN_FAILED = "run_started", "run_ended", "run_failed"
JOINED, SENT, RECEIVED = "joined", "sent", "received"
NO_REPLY, NOT_COUNTED = "no_reply", "not_counted"
RECORDED_PACKAGES = ("fedlora-app", "flwr", "torch", "transformers", "peft")
OWN_WORDS = re.compile(
    rf"(?:{SAFE_NAME.strip('^$')}: |node \d+: )?(?P<words>"
    r"no answer within [\d.e+]+ seconds \((?:federated\.client_timeout_seconds|the least for a "
    rf"registration)\)|{re.escape(REFUSED)}|its policy refuses: [a-z0-9_., -]{{1,500}})"
)
"""Reasons that hold nothing but this package's words, a client's id and the names of settings."""

Tell = Callable[[str, str, str], None]


@contextmanager
def witness_run(
    grid: PacedGrid, run: str, config: Config, resumed_after: int | None
) -> Iterator[None]:
    """Enter the course of a run at its server, and every message that it sends and gets.

    Args:
        run: its name.
        resumed_after: the round that it continues from; None for a new run.
    """
    if not is_recorded():
        yield
        return
    record(
        RUN_STARTED,
        run=run,
        clients=config.client_ids,
        config_sha256=hash_text(json.dumps(config.dump())),
        resumed_after=resumed_after,
        **describe_software(),
    )
    grid.watch = _ServerWitness(grid).watch
    try:
        yield
    except BaseException as error:
        record(RUN_FAILED, run=run, error=type(error).__name__, **describe_reason(str(error)))
        raise
    record(RUN_ENDED, run=run)


class _ServerWitness:
    """Enters what a grid sends and gets."""

    def __init__(self, grid: PacedGrid) -> None:
        self._grid = grid
        self._digester = Digester()

    def watch(self, request: Message, reply: Message | None) -> None:
        """Enter a message that was sent, or, with a reply, what came of it."""
        fields = _describe_request(request) | {"node": str(request.metadata.dst_node_id)}
        known = fields["client"] or self._grid.names.get(request.metadata.dst_node_id, "")
        fields |= {"end": SERVER_END, "client": known}
        if reply is None:
            record(SENT, **fields, **_describe_content(request, self._digester))
        elif reply.has_error():
            reason = describe_reason(str(reply.error.reason))
            record(NO_REPLY, **fields, code=int(reply.error.code), **reason)
        else:
            described = _describe_reply(reply)
            fields["client"] = known or described["named"]
            if described["named"] in ("", fields["client"]):
                del described["named"]  # and otherwise it answers as somebody else
            record(RECEIVED, **fields, **described, **_describe_content(reply, self._digester))


def witness_replies(tell: Tell, run: str, server_round: int) -> Tell:
    """Return ``tell``, of replies that do not count, which enters them in the server's log too."""
    if not is_recorded():
        return tell

    def tell_and_record(event: str, client: str, why: str) -> None:
        fields = describe_reason(why) if why else {}
        record(NOT_COUNTED, run=run, round=server_round, client=client, what=event, **fields)
        tell(event, client, why)

    return tell_and_record


def witness_received(message: Message, node_id: int) -> None:
    """Enter, at a client, a message from the server."""
    if not is_recorded():
        return
    task = _read_task(message)
    record(
        RECEIVED,
        end=CLIENT_END,
        node=str(node_id),
        **_describe_request(message),
        **_describe_content(message, Digester()),
        config_sha256=hash_text(_text(task, "experiment")),
        package_sha256=_text(task, "package_sha256")[:64],
    )


def witness_sent(message: Message, reply: Message, node_id: int) -> None:
    """Enter, at a client, the reply to a message: which metrics and facts, and none of them."""
    if not is_recorded():
        return
    described = _describe_reply(reply)
    fields = _describe_request(message)
    fields["client"] = described.pop("named", "") or fields["client"]
    record(
        SENT,
        end=CLIENT_END,
        node=str(node_id),
        **fields,
        **described,
        metrics=sorted(reply.content.metric_records.get(METRIC_RECORD, {})),
        **_describe_content(reply, Digester()),
    )


def describe_software() -> dict[str, Any]:
    """Return the versions that an end runs and the hash of this package."""
    versions = {package: version(package) for package in RECORDED_PACKAGES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "package_sha256": hash_package(),
    }


def describe_reason(text: str) -> dict[str, str]:
    """Return a reason's hash, and its words where they can hold nothing of anybody's."""
    found = OWN_WORDS.fullmatch(text)
    return {"why_sha256": hash_text(text)} | ({"why": found["words"]} if found else {})


def hash_text(text: str) -> str:
    """Return the sha256 of a text in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _describe_request(message: Message) -> dict[str, Any]:
    task = _read_task(message)
    server_round = task.get("server_round")
    return {
        "message": message.metadata.message_id,
        "kind": message.metadata.message_type,
        "run": _name(_text(task, "run_name")),
        "client": _name(_text(task, "client_id")),
        "round": server_round if type(server_round) is int else None,
    }


def _describe_reply(reply: Message) -> dict[str, Any]:
    """Return who a reply says that it is from, and whether it is an error."""
    about = reply.content.config_records.get(ABOUT_RECORD, ConfigRecord())
    described: dict[str, Any] = {"named": _name(_text(about, "client-id"))}
    if "error" in about:
        described |= {"is_error": True, **describe_reason(_text(about, "error"))}
    return described


def _describe_content(message: Message, digester: Digester) -> dict[str, Any]:
    found = digester.digest(message.content)
    return {"bytes": found.num_bytes, "sha256": found.sha256, "rest_sha256": found.rest_sha256}


def _read_task(message: Message) -> ConfigRecord:
    return message.content.config_records.get(TASK_RECORD, ConfigRecord())


def _text(record: ConfigRecord, name: str) -> str:
    value = record.get(name, "")
    return value if isinstance(value, str) else ""


def _name(text: str) -> str:
    """Return a name, and nothing of what cannot be one."""
    return text if re.fullmatch(SAFE_NAME, text) else ""
