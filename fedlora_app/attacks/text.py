"""What ``fedlora attack`` prints: tables 100 columns wide; all of it is in ``attack.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedlora_app.attacks import extraction, scores, tokens
from fedlora_app.attacks.meter import ALL_ROUNDS, AVERAGE, OTHERS, UPDATE
from fedlora_app.attacks.records import SETS
from fedlora_app.foundation.percent import format_percent
from fedlora_app.foundation.terminal import WIDTH, render_table

Row = Mapping[str, Any]

SOURCES = {UPDATE: "own update", OTHERS: "others' (control)", AVERAGE: "average"}
PLANT = "No canaries were planted. How exposed a made-up secret is: fedlora check CONFIG --plant 16"
RECORDS_TITLE = (
    "Told apart, AUC in % with 95 % intervals by fact; 50 is chance. Of {n} attacks each row has "
    "the one that did best with the client's own update"
)
TOKENS_TITLE = (
    "Tokens of the client's texts, AUC in % beside other tokens of such texts; 50 is chance"
)
TEXTS_TITLE = "Answers given back word by word, in %"
CANARIES_TITLE = "Exposure of canaries in bits; {chance:.2f} is chance, {maximum:.2f} all of it"
WHOSE = {extraction.OWN: "own facts", extraction.OTHERS: "others' facts"}
WHOSE |= {extraction.PRIVATE: "own local"}
NEVER_TRAINED = "never in an update"


def describe_attack(found: Mapping[str, Any]) -> str:
    """Return the tables and what is to be known of them."""
    parts = [_records(found["records"]), _tokens(found["tokens"]), _texts(found["texts"])]
    parts.append(_canaries(found["canaries"]) if found["canaries"] else PLANT)
    parts += [f"Assumed: {text}" for text in found["assumptions"]]
    parts += [f"Not tried: {text}" for text in found["not_tried"]]
    return "\n".join(part if "\n" in part else textwrap.fill(part, WIDTH) for part in parts if part)


def choose_best(rows: Sequence[Row]) -> dict[str, Row]:
    """Return by source the rows of the attack that does best with the client's own update.

    Over all rounds where there are several, else of the only one.
    """
    rounds = ALL_ROUNDS if any(row["rounds"] == ALL_ROUNDS for row in rows) else None
    those = [row for row in rows if rounds in (None, row["rounds"])]
    own = [row for row in those if row["source"] == UPDATE and row["auc"]["value"] is not None]
    if not own:
        return {}
    best = max(own, key=lambda row: row["auc"]["value"])["attack"]
    return {row["source"]: row for row in those if row["attack"] == best}


def group(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by what they have under these keys."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def show_auc(row: Row | None) -> str:
    """Return an AUC in percent with its interval, "" where there is none."""
    if row is None:
        return ""
    auc = row["auc"]
    return format_percent(auc["value"], auc["low"], auc["high"], digits=0)


def _records(rows: Sequence[Row]) -> str:
    table = _table(RECORDS_TITLE.format(n=len(scores.ATTACKS)), "client", "what", "attack")
    for label in SOURCES.values():
        table.add_column(label, justify="right", no_wrap=True)
    for (client, name), those in group(rows, "client", "set").items():
        best = choose_best(those)
        if not best:
            continue
        row = best[UPDATE]
        what = SETS[name] if row["was_trained"] else f"{SETS[name]} ({NEVER_TRAINED})"
        cells = (show_auc(best.get(source)) for source in SOURCES)
        table.add_row(client, what, scores.ATTACKS[row["attack"]], *cells)
    return render_table(table)


def _tokens(rows: Sequence[Row]) -> str:
    table = _table(TOKENS_TITLE, "client", "attack")
    for label in SOURCES.values():
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("found / chance", justify="right", no_wrap=True)
    domain = [row for row in rows if row["among"] == "domain"]
    for (client,), those in group(domain, "client").items():
        best = choose_best(those)
        if not best:
            continue
        row = best[UPDATE]
        found = (row["precision"]["value"], row["chance"])
        share = " / ".join(format_percent(value, digits=0) for value in found)
        cells = (show_auc(best.get(source)) for source in SOURCES)
        table.add_row(client, tokens.ATTACKS[row["attack"]], *cells, share)
    return render_table(table)


def _texts(rows: Sequence[Row]) -> str:
    table = _table(TEXTS_TITLE, "client", "round", "whose answers", "asked")
    columns = {UPDATE: "own update", AVERAGE: "average", "before": "before it"}
    for label in columns.values():
        table.add_column(label, justify="right", no_wrap=True)
    for key, those in group(rows, "client", "rounds", "whose", "prompt").items():
        client, rounds, whose, prompt = key
        by_source = {row["source"]: row["verbatim"] for row in those}
        if not by_source[UPDATE]["n"]:
            continue
        cells = (
            format_percent(found["value"], found["low"], found["high"], digits=0)
            for found in (by_source[source] for source in columns)
        )
        table.add_row(client, str(rounds), WHOSE[whose], prompt, *cells)
    notes = (f"{WHOSE[whose]}: {text}" for whose, text in extraction.WHOSE.items())
    prompts = (f"asked {prompt}: {text}" for prompt, text in extraction.PROMPTS.items())
    return "\n".join([render_table(table), *notes, *prompts])


def _canaries(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = CANARIES_TITLE.format(chance=first["chance"], maximum=first["maximum"])
    table = _table(title, "client", "file", "round")
    columns = {UPDATE: "own update", AVERAGE: "average", "before": "before it", "local": "local"}
    for label in columns.values():
        table.add_column(label, justify="right", no_wrap=True)
    for (client, role, rounds), those in group(rows, "client", "role", "rounds").items():
        by_source = {row["source"]: row["mean"] for row in those}
        table.add_row(client, role, str(rounds), *_bits(by_source, columns))
    return render_table(table)


def _bits(by_source: Mapping[str, Row], columns: Mapping[str, str]) -> Iterator[str]:
    for source in columns:
        mean = by_source.get(source)
        yield "" if mean is None else "{value:.1f} [{low:.1f}, {high:.1f}]".format(**mean)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
