"""Everything that travels between server and clients, listed and checked in one place.

Down: the global adapter (fp32), the experiment, the round. Up: the update of the global
adapter, the metrics declared here, and hashes. Whatever else a client might try to send
is refused here before it leaves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from fedlora_app.config.loading import parse_config
from fedlora_app.config.private import without_private
from fedlora_app.config.schema import FEEDBACK, LOCAL, OWN_GLOBAL, Config
from fedlora_app.federation.packed_state import MessageError, pack_state
from fedlora_app.model.adapter_state import AdapterState, check_state

KEPT = {LOCAL: "local_adapter", OWN_GLOBAL: "own_global_adapter", FEEDBACK: "feedback"}
"""What clients keep by rounds: its role, and the fact by which they name a file's hash."""
REGISTRATION_ROUND = 0
ADAPTER_RECORD = "global-adapter"
UPDATE_RECORD = "global-update"
TASK_RECORD = "task"
PROBE_RECORD = "probe"
METRIC_RECORD = "metrics"
ABOUT_RECORD = "about"
SPOILT = "process-is-spoilt"
NEEDS = "needs"
GLOBAL_ADAPTER = "global adapter"
OWN_SETTINGS = "own settings"
"""What a client may need before it can do its task."""
MAX_ERROR_CHARS = 10_000
MAX_PATH_CHARS = 4096
MAX_FINDINGS = 10_000
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters by which a text could write over what a terminal shows, or turn its direction; a line
break is none."""
MOST_FACTS = 2**31  # that a client's files are about
TIME_TO_LIVE_SECONDS = 10 * 365 * 24 * 3600.0

COUNTED = ("examples", "truncated", "dropped")
DECLARED_METRICS = re.compile(
    r"""
    num-examples | update_norm | evaluation_(seconds|memory_retries) | peak_memory_bytes
    | (universal|local)_(examples|truncated|dropped) | skipped_records | unscored_conflicts
    | (universal|local|conflict)_((cut|altered|open)_)?answers
    | train_(global|local|global\+local)/
        (num_steps|num_examples|num_tokens|num_answer_tokens|train_loss|final_train_loss|penalty
        |seconds|peak_memory_bytes|memory_retries|gradient_checkpointing)
    | (base|global|local|global\+local)/(universal|universal_unseen|local|conflict)/
        (n|n_ranked|n_facts|n_open|gate_open|exact_match|rank_accuracy|rank_accuracy_per_byte
        |rank_accuracy_pmi|rank_chance|margin_per_byte)
    | validation/(universal|local|conflict)_(n|exact_match|rank_accuracy)
    | gate/(by_fact|purity|opens_for_local|closes_for_universal|closes_for_unknown)
    | (base|global|local|global\+local)/(universal|local|conflict)/(exact_match|ranked_first)_each
    | base/(universal|local|conflict)/fact_each | base/universal/unseen_each
    """,
    re.VERBOSE,
)
REGISTRATION_COUNTS = (
    *(f"{kind}_{what}" for kind in ("universal", "local") for what in COUNTED),
    *("skipped_records", "unscored_conflicts"),
    *(
        f"{name}_{what}answers"
        for name in ("universal", "local", "conflict")
        for what in ("", "cut_", "altered_", "open_")
    ),
)
SHA256 = r"[0-9a-f]{64}"
DECLARED_FACTS = {
    r"sha256/(universal|local)_train|sha256/(universal|local|conflict)(_validation)?"
    r"|sha256/public": SHA256,
    r"base_model|global_adapter|local_adapter|own_global_adapter|feedback": SHA256,
    r"device": r"[^\x00-\x1f\x7f-\x9f]{1,200}",
    r"process": r"\d+, base model loaded \d+ times",
    r"findings": r"\[.*\]",
    r"needs": r"global adapter|own settings",
}
"""What a fact may be called, and what it may say."""
FINDING_KEYS = {"severity", "rule", "file", "record"}


@dataclass(frozen=True)
class Kept:
    """What a client has kept in one role, as the server knows it."""

    round: int = -1
    """The last round whose file counts; below 0 there is none yet."""
    sha256: str = ""
    """Empty where it is not known."""
    oldest: int = 0
    """The oldest round that is still needed."""

    @property
    def is_possible(self) -> bool:
        """Whether the values are of their types and ranges."""
        rounds = (self.round, self.oldest)
        are_numbers = all(type(number) is int and -1 <= number < 2**31 for number in rounds)
        return are_numbers and isinstance(self.sha256, str)


@dataclass(frozen=True)
class Task:
    """What the server asks of a client, beside the adapter itself.

    ``kept`` says as JSON what the client continues from of what it has kept, which ``from_kept``
    reads. ``global_sha256`` is the hash of the global adapter, which the client has kept where the
    message does not bring it. ``resumes`` tells that the run is continued, so that the client's
    folder may be there already. ``date`` is the day that chat templates write. ``is_final`` says
    that the adapters named in ``kept`` are those to use from now on. ``run_id`` tells the run from
    another one of its name; "" for one that was begun without. With ``base_sha256`` the
    message brings only the tensors that the round has changed since that global adapter, which
    the client has kept.
    ``project_dir`` and ``output_dir`` hold for simulated nodes, which share the server's disk;
    others have folders of their own.
    """

    client_id: str
    server_round: int
    global_sha256: str
    resumes: bool
    run_name: str
    project_dir: str
    output_dir: str
    package_sha256: str
    experiment: str
    date: str = ""
    kept: str = "{}"
    is_final: bool = False
    base_sha256: str = ""
    run_id: str = ""

    @property
    def from_kept(self) -> dict[str, Kept]:
        """What the client continues from, by its role in ``KEPT``; nothing of the others."""
        try:
            kept = {role: Kept(*entry) for role, entry in json.loads(self.kept).items()}
            is_known = all(role in KEPT and entry.is_possible for role, entry in kept.items())
        except (ValueError, TypeError, AttributeError, RecursionError):
            is_known = False
        if not is_known:
            raise MessageError(f"The server sent {self.kept:.200} as what this client has kept.")
        return kept

    @property
    def config(self) -> Config:
        """The experiment's configuration."""
        source = "The experiment that was sent"
        try:
            raw = json.loads(self.experiment)
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{source} is not JSON: {error}.") from None
        return parse_config(raw, source=source)


def build_message(content: RecordDict, message_type: str, node_id: int) -> Message:
    """Return a message that does not expire while its client waits for its turn."""
    return Message(
        content, dst_node_id=node_id, message_type=message_type, ttl=TIME_TO_LIVE_SECONDS
    )


def build_probe(node_id: int) -> Message:
    """Return a message that a client only has to reply to."""
    content = RecordDict({PROBE_RECORD: ConfigRecord()})
    return build_message(content, MessageType.QUERY, node_id)


def is_probe(message: Message) -> bool:
    """Return whether a message asks for nothing but a reply, and holds nothing else."""
    return message.has_content() and dict(message.content) == {PROBE_RECORD: ConfigRecord()}


def build_task_content(
    task: Task, arrays: ArrayRecord | None = None, of: Collection[str] | None = None
) -> RecordDict:
    """Return the content of a message from the server.

    Args:
        of: the clients whose own settings (system prompt, names of files) the message may carry;
            None: whom it is for.
    """
    owners = [task.client_id] if of is None else of
    experiment = json.dumps(without_private(json.loads(task.experiment), owners))
    records: dict[str, Any] = {TASK_RECORD: ConfigRecord(asdict(task) | {"experiment": experiment})}
    if arrays is not None:
        records[ADAPTER_RECORD] = arrays
    return RecordDict(records)


def read_task(message: Message) -> Task:
    """Return the task of a message from the server.

    Raises:
        MessageError: there is none, or a part of it is missing, unknown or of another type.
    """
    records = message.content.config_records if message.has_content() else {}
    try:
        task = Task(**records[TASK_RECORD])
    except (KeyError, TypeError) as error:
        raise MessageError(f"The server's message holds no complete task: {error!r}.") from None
    for field in fields(Task):
        found = type(getattr(task, field.name)).__name__
        if found != field.type:
            raise MessageError(f"The server sent {field.name} as {found}, expected {field.type}.")
    if task.server_round < 0:
        raise MessageError(f"The server sent round {task.server_round}.")
    return task


def build_reply(
    message: Message,
    client_id: str,
    server_round: int,
    metrics: dict[str, Any],
    facts: dict[str, str],
    update: AdapterState | None = None,
    update_dtype: str = "float32",
    shapes: dict[str, torch.Size] | None = None,
) -> Message:
    """Return a client's reply after checking that all of it was declared.

    Args:
        shapes: those that an update must have.

    Raises:
        MessageError, AdapterError: something in it is not declared; nothing is sent.
    """
    undeclared = [
        name
        for name, value in metrics.items()
        if not DECLARED_METRICS.fullmatch(name) or not is_possible(name, value)
    ]
    undeclared += [name for name, value in facts.items() if not is_declared(name, value)]
    if undeclared:
        raise MessageError(f"These were not declared and stay here: {', '.join(undeclared)}.")
    about = {
        "client-id": client_id,
        "server-round": server_round,
        "dtype": update_dtype,
        "facts": json.dumps(facts),
    }
    records: dict[str, Any] = {
        METRIC_RECORD: MetricRecord(metrics),
        ABOUT_RECORD: ConfigRecord(about),
    }
    if update is not None:
        check_state(update, shapes or {}, "The update")
        records[UPDATE_RECORD] = pack_state(update, update_dtype)
    return Message(RecordDict(records), reply_to=message)


def build_need_reply(
    message: Message, client_id: str, server_round: int, need: str = GLOBAL_ADAPTER
) -> Message:
    """Return a reply that asks for the same message with what the client needs in it."""
    return build_reply(message, client_id, server_round, {}, {NEEDS: need})


def build_error_reply(
    message: Message, client_id: str, why: str, *, process_is_spoilt: bool = False
) -> Message:
    """Return a reply that says why the client could not do its task.

    Args:
        process_is_spoilt: whatever else this process does on its GPU would fail too.
    """
    about = {"client-id": client_id, "error": why[:MAX_ERROR_CHARS]}
    if process_is_spoilt:
        about[SPOILT] = True
    return Message(RecordDict({ABOUT_RECORD: ConfigRecord(about)}), reply_to=message)


def read_reason(text: Any) -> str:
    """Return why a client failed as it may be shown: not too long, and no control characters."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text)[:MAX_ERROR_CHARS])


def ends_worker(reply: Message) -> bool:
    """Return whether the process that sent a reply must not get another message."""
    if reply.has_error():
        return False
    return bool(reply.content.config_records.get(ABOUT_RECORD, ConfigRecord()).get(SPOILT))


def is_possible(name: str, value: Any) -> bool:
    """Return whether a value is a finite number, not a negative count, or a list.

    Lists are of verdicts (1, 0, and -1 where there is none), or of the facts' numbers.
    """
    if isinstance(value, list) or name.endswith("_each"):
        is_list = isinstance(value, list) and name.endswith("_each")
        if name.endswith("/fact_each"):
            return is_list and all(type(v) is int and abs(v) <= MOST_FACTS for v in value)
        return is_list and all(v in (-1, 0, 1) for v in value)
    return math.isfinite(value) and not (isinstance(value, int) and value < 0)


def is_declared(fact: str, value: str) -> bool:
    """Return whether a fact is one that may be sent, and says only what it may say."""
    f"{fact}{value}".encode()  # it is going to be written to a file
    patterns = [text for name, text in DECLARED_FACTS.items() if re.fullmatch(name, fact)]
    if not patterns or not re.fullmatch(patterns[0], value):
        return False
    if fact != "findings":
        return True
    findings = json.loads(value)
    return len(findings) <= MAX_FINDINGS and all(map(_is_finding, findings))


def _is_finding(finding: Any) -> bool:
    """Return whether something names a rule, a file and a number, and holds no other text."""
    return (
        isinstance(finding, dict)
        and set(finding) == FINDING_KEYS
        and finding["severity"] in ("error", "warning")
        and isinstance(finding["rule"], str)
        and re.fullmatch("[a-z-]{1,60}", finding["rule"]) is not None
        and isinstance(finding["file"], str)
        and len(finding["file"]) <= MAX_PATH_CHARS
        and not CONTROL.search(finding["file"])
        and (finding["record"] is None or isinstance(finding["record"], int))
    )
