"""An evidence log as people read it: a page per round, and what else happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from fedlora_app.deployment.audit import Comparison, Entry, Log
from fedlora_app.deployment.evidence import OWN_FIELDS
from fedlora_app.deployment.witness import NO_REPLY, NOT_COUNTED, RECEIVED, SENT, SERVER_END
from fedlora_app.foundation.terminal import render_table

PREFIX = 12
SHOWN_TIME = slice(0, 19)


@dataclass
class Exchange:
    """A message to a client and its reply, as one end's log has them."""

    client: str
    kind: str
    down: Entry | None = None
    up: Entry | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class Page:
    """A round of a run; round 0 has the registrations and the evaluation of the base model."""

    run: str
    round: int | None
    exchanges: list[Exchange] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def build_pages(log: Log) -> tuple[list[Page], list[Entry]]:
    """Return the log's rounds, and the entries that belong to none."""
    pages: dict[tuple[str, int | None], Page] = {}
    exchanges: dict[str, Exchange] = {}
    others: list[Entry] = []
    run = ""
    for entry in log.entries:
        run = entry.get("run", run)
        if type(entry.get("round")) is not int:
            others.append(entry)
            continue
        key = run, entry["round"]
        page = pages.setdefault(key, Page(*key))
        if entry["event"] not in (SENT, RECEIVED, NO_REPLY, NOT_COUNTED):
            page.remarks.append(f"{entry['event']}: {_describe_rest(entry)}")
            continue
        if entry["event"] == NOT_COUNTED:
            page.remarks.append(f"{entry['client']}: {entry['what']}{_describe_reason(entry)}")
            continue
        message = entry["message"]
        if message not in exchanges:
            exchanges[message] = Exchange(f"node {entry['node']}", entry["kind"])
            page.exchanges.append(exchanges[message])
        _enter(exchanges[message], entry)
    return list(pages.values()), others


def _enter(exchange: Exchange, entry: Entry) -> None:
    exchange.client = entry["client"] or exchange.client
    if entry["event"] == NO_REPLY:
        exchange.remarks.append(f"no reply{_describe_reason(entry)}")
        return
    is_down = (entry["end"] == SERVER_END) == (entry["event"] == SENT)
    if is_down:
        exchange.down = entry
        return
    exchange.up = entry
    if entry.get("is_error"):
        exchange.remarks.append(f"error{_describe_reason(entry)}")
    if "named" in entry:
        exchange.remarks.append(f"answered as {entry['named']}")


def describe_log(log: Log) -> str:
    """Return what a log says, round by round."""
    pages, others = build_pages(log)
    parts = [_describe_chain(log), *_describe_others(others)]
    return "\n\n".join([*parts, *map(_describe_page, pages)])


def describe_comparison(comparison: Comparison) -> str:
    """Return what two ends agree on and what they do not."""
    who = ", ".join(comparison.clients) or "no client"
    lines = [f"Compared for {who}: {comparison.num_agreed} messages and replies are the same."]
    lines += [f"CONTRADICTION: {text}" for text in comparison.contradictions]
    lines += [f"On the way: {text}" for text in comparison.undelivered]
    return "\n".join(lines)


def dump_log(log: Log, comparison: Comparison | None) -> dict[str, Any]:
    """Return the same as plain data."""
    pages, others = build_pages(log)
    return {
        "file": str(log.path),
        "entries": len(log.entries),
        "head": log.head,
        "fault": log.fault and asdict(log.fault),
        "notes": log.notes,
        "rounds": [asdict(page) for page in pages],
        "events": others,
        "compared": comparison and asdict(comparison),
    }


def _describe_chain(log: Log) -> str:
    lines = [f"{log.path}: {len(log.entries)} entries"]
    if log.entries:
        first, last = (log.entries[i]["time"][SHOWN_TIME] for i in (0, -1))
        lines[0] += f", {first} to {last} (UTC)"
        lines.append(f"Last line: sha256 {log.head}")
    lines += log.notes
    if log.fault is None:
        lines.append("The chain is whole. Whether its end was cut off only the other end's log or")
        lines.append("a last line's sha256 that was noted elsewhere tells.")
    else:
        lines.append(f"BROKEN at line {log.fault.line}: {log.fault.what}.")
        lines.append("Nothing from that line on is shown or relied on.")
    return "\n".join(lines)


def _describe_others(entries: list[Entry]) -> Iterator[str]:
    if not entries:
        return
    table = Table(title="What happened beside the messages")
    for name in ("time (UTC)", "event", "what"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        table.add_row(entry["time"][SHOWN_TIME], entry["event"], _describe_rest(entry))
    yield render_table(table)


def _describe_rest(entry: Entry) -> str:
    """Return what an entry says beside what every entry does."""
    rest = {k: v for k, v in entry.items() if k not in OWN_FIELDS and v is not None}
    return ", ".join(f"{name} {_shorten(value)}" for name, value in sorted(rest.items()))


def _describe_page(page: Page) -> str:
    table = Table(title=f"{page.run or 'No run'}, round {page.round}")
    for name in (
        "client",
        "message",
        "bytes down",
        "its sha256",
        "bytes up",
        "its sha256",
        "remarks",
    ):
        table.add_column(name, justify="right" if name.startswith("bytes") else "left")
    for one in page.exchanges:
        down, up = _describe_content(one.down), _describe_content(one.up)
        table.add_row(one.client, one.kind, *down, *up, "; ".join(one.remarks))
    return "\n".join([render_table(table), *page.remarks])


def _describe_content(entry: Entry | None) -> tuple[str, str]:
    """Return the bytes of a message's arrays and the beginning of their hash."""
    if entry is None:
        return "-", ""
    return f"{entry['bytes']:,}", entry["sha256"][:PREFIX]


def _describe_reason(entry: Entry) -> str:
    if "why" in entry:
        return f": {entry['why']}"
    if "why_sha256" in entry:
        return f" (reason {entry['why_sha256'][:PREFIX]})"
    return f" (Flower's code {entry['code']})" if "code" in entry else ""


def _shorten(value: Any) -> str:
    """Return a value of an entry as people read it, of a hash only its beginning."""
    if isinstance(value, dict):
        return " ".join(f"{name} {_shorten(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(_shorten, value))
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:PREFIX] if is_hash else text
