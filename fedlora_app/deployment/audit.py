"""The check of an evidence log: is it whole, and does the other end's say the same?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora_app.deployment.evidence import (
    BEFORE_THE_FIRST,
    TORN,
    EvidenceError,
    hash_bytes,
    read_entry,
)
from fedlora_app.deployment.witness import CLIENT_END, RECEIVED, SENT, SERVER_END

Entry = dict[str, Any]
HASHES = ("bytes", "sha256", "rest_sha256")


@dataclass(frozen=True)
class Fault:
    """The first line that is not as it was written, counted from 1."""

    line: int
    what: str


@dataclass(frozen=True)
class Log:
    """What stands in a log before its first fault."""

    path: Path
    entries: list[Entry]
    head: str
    """Sha256 of the last line before the fault."""
    fault: Fault | None
    notes: list[str]


def read_log(path: Path) -> Log:
    """Read a log and check its chain.

    Raises:
        EvidenceError: there is no such file.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError):
        raise EvidenceError(
            f"{path} is no evidence log. The coordinator and every site have one in the folder of "
            "their deployment, evidence.jsonl."
        ) from None
    unfinished = lines.pop()
    fault, entries, notes, head = _check_chain(lines)
    if fault is None and unfinished:
        fault = Fault(
            len(lines) + 1,
            "it was not written to its end. A crash does that, and the next event says so and "
            "goes on; without one something was cut off",
        )
    return Log(path, entries, head, fault, notes)


def _check_chain(lines: list[bytes]) -> tuple[Fault | None, list[Entry], list[str], str]:
    parsed = [read_entry(line) for line in lines]
    entries: list[Entry] = []
    notes: list[str] = []
    head, torn = BEFORE_THE_FIRST, None
    for number, (line, entry) in enumerate(zip(lines, parsed, strict=True), start=1):
        if entry is None and torn is None and _is_told_of(line, parsed[number : number + 1]):
            torn = line
            notes.append(f"Line {number} was torn off by a crash, as the log says.")
            continue
        if entry is None:
            what = "it was changed after it was written, or is none of this log's"
            return Fault(number, what), entries, notes, head
        if entry["event"] == TORN and torn is None:
            what = "the torn line that it tells of was removed"
            return Fault(number, what), entries, notes, head
        if entry["previous"] != head or entry["seq"] != len(entries):
            return _explain_break(number, parsed, len(entries)), entries, notes, head
        if entries and entry["time"] < entries[-1]["time"]:
            notes.append(f"Line {number}: the clock stood earlier than at the line before.")
        entries.append(entry)
        head, torn = hash_bytes(line), None
    return None, entries, notes, head


def _is_told_of(line: bytes, following: Sequence[Entry | None]) -> bool:
    """Return whether the next line tells of this one as torn."""
    entry = following[0] if following else None
    return (
        entry is not None
        and entry["event"] == TORN
        and entry.get("torn_sha256") == hash_bytes(line)
    )


def _explain_break(number: int, parsed: list[Entry | None], expected: int) -> Fault:
    """Return what is wrong where a whole line does not follow the one before it."""
    found = parsed[number - 1]["seq"]
    elsewhere = [e["seq"] for i, e in enumerate(parsed) if e is not None and i != number - 1]
    if found > expected and expected in elsewhere:
        what = f"entry {found} stands at the place of entry {expected}: lines were moved"
    elif found > expected:
        missing = f"{expected}" if found == expected + 1 else f"{expected} to {found - 1}"
        what = f"removed before it: entry {missing}"
    elif found < expected:
        what = f"entry {found} comes once more, or too late: inserted or moved"
    elif number == 1:
        what = "it names a line before it, and is the first"
    else:
        what = (
            f"it names another line before it than line {number - 1}: one of the two was replaced"
        )
    return Fault(number, what)


@dataclass(frozen=True)
class Comparison:
    """What two ends say of the same messages."""

    clients: list[str]
    """Of which both logs tell."""
    num_agreed: int
    contradictions: list[str]
    undelivered: list[str]
    """Messages that one end sent and the other never got, which a network may do."""


def compare_logs(one: Log, other: Log) -> Comparison:
    """Compare what one end says that it sent with what the other says that it received.

    Raises:
        EvidenceError: they are not a server's and a client's of one federation.
    """
    ends = {end: log for log in (one, other) for end in _ends(log)}
    if _ends(one) == _ends(other) or set(ends) != {SERVER_END, CLIENT_END}:
        raise EvidenceError(
            f"{one.path} and {other.path} are not the logs of a coordinator and of a site that "
            "have exchanged messages, so there is nothing to compare."
        )
    server, client = ends[SERVER_END], ends[CLIENT_END]
    clients = sorted({e["client"] for e in _messages(client) if e["client"]})
    nodes = {e["node"] for e in _messages(client)}
    at_server = _by_message(
        e for e in _messages(server) if e["client"] in clients or e["node"] in nodes
    )
    at_client = _by_message(_messages(client))
    agreed, contradictions, undelivered = 0, [], []
    for message in {**at_server, **at_client}:
        there, here = at_server.get(message, {}), at_client.get(message, {})
        for sender, receiver, source, target in (
            ("the coordinator", "the site", there.get(SENT), here.get(RECEIVED)),
            ("the site", "the coordinator", here.get(SENT), there.get(RECEIVED)),
        ):
            if source is None and target is None:
                continue
            what = _describe(source or target)
            if source is None:
                contradictions.append(
                    f"{what}: {receiver} has received it, and {sender}'s log has not sent it."
                )
            elif target is None:
                undelivered.append(f"{what}: {sender} sent it, and {receiver} has not got it.")
            elif differing := [name for name in HASHES if source[name] != target[name]]:
                contradictions.append(
                    f"{what}: {sender} sent something else than {receiver} received "
                    f"({', '.join(differing)})."
                )
            else:
                agreed += 1
    return Comparison(clients, agreed, contradictions, undelivered)


def _ends(log: Log) -> set[str]:
    return {entry["end"] for entry in _messages(log)}


def _messages(log: Log) -> Iterator[Entry]:
    return (e for e in log.entries if e["event"] in (SENT, RECEIVED) and "end" in e)


def _by_message(entries: Iterator[Entry]) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        found.setdefault(entry["message"], {})[entry["event"]] = entry
    return found


def _describe(entry: Entry) -> str:
    answered = (entry["end"] == SERVER_END) == (entry["event"] == RECEIVED)
    kind = f"reply to {entry['kind']}" if answered else entry["kind"]
    who = entry["client"] or f"node {entry['node']}"
    return f"{entry['run']}, round {entry['round']}, {kind}, {who}"
