"""What ``fedlora attack`` prints: tables 100 columns wide; all of it is in ``attack.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedlora_app.attacks.results import (
    ABOUT_PROMPTS,
    ABOUT_WHOSE,
    HEADLINES,
    LOCAL_ALONE,
    RECORD_ATTACKS,
    SETS,
    SOURCES,
    TEXT_SOURCES,
    TOKEN_ATTACKS,
    UPDATE,
    WHOSE,
    Row,
    choose_headline,
    choose_token_attack,
    describe_limit,
    group,
    show_auc,
)
from fedlora_app.foundation.percent import format_percent
from fedlora_app.foundation.terminal import WIDTH, render_table

PLANT = "No canaries were planted. How exposed a made-up secret is: fedlora check CONFIG --plant 16"
RECORDS_TITLE = (
    "Told apart, AUC in % with 95 % intervals by fact; 50 is chance. Each row has the attack that "
    "was chosen for it beforehand; the report has all {n}"
)
TOKENS_TITLE = (
    "Tokens of the client's texts, AUC in % beside other tokens of such texts; 50 is chance"
)
TEXTS_TITLE = "Answers given back word by word, in %"
CANARIES_TITLE = "Exposure of canaries in bits; {chance:.2f} is chance, {maximum:.2f} all of it"
NEVER_TRAINED = "never in an update"


def describe_attack(found: Mapping[str, Any]) -> str:
    """Return the tables and what is to be known of them."""
    parts = [
        _records(found["records"]),
        describe_limit(found),
        _tokens(found["tokens"]),
        _texts(found["texts"]),
    ]
    parts.append(_canaries(found["canaries"]) if found["canaries"] else PLANT)
    parts += [f"Assumed: {text}" for text in found["assumptions"]]
    parts += [f"Not tried: {text}" for text in found["not_tried"]]
    return "\n".join(part if "\n" in part else textwrap.fill(part, WIDTH) for part in parts if part)


def _records(rows: Sequence[Row]) -> str:
    table = _table(RECORDS_TITLE.format(n=len(RECORD_ATTACKS)), "client", "what", "attack")
    for label in SOURCES.values():
        table.add_column(label, justify="right", no_wrap=True)
    for (client, name), those in group(rows, "client", "set").items():
        best = choose_headline(those, HEADLINES[name])
        if not best:
            continue
        row = best[UPDATE]
        what = SETS[name] if row["was_trained"] else f"{SETS[name]} ({NEVER_TRAINED})"
        cells = (show_auc(best.get(source)) for source in SOURCES)
        table.add_row(client, what, RECORD_ATTACKS[row["attack"]], *cells)
    return render_table(table)


def _tokens(rows: Sequence[Row]) -> str:
    table = _table(TOKENS_TITLE, "client", "attack")
    for label in SOURCES.values():
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("found / chance", justify="right", no_wrap=True)
    domain = [row for row in rows if row["among"] == "domain"]
    for (client,), those in group(domain, "client").items():
        best = choose_headline(those, choose_token_attack(those))
        if not best:
            continue
        row = best[UPDATE]
        found = (row["precision"]["value"], row["chance"])
        share = " / ".join(format_percent(value, digits=0) for value in found)
        cells = (show_auc(best.get(source)) for source in SOURCES)
        table.add_row(client, TOKEN_ATTACKS[row["attack"]], *cells, share)
    return render_table(table)


def _texts(rows: Sequence[Row]) -> str:
    table = _table(TEXTS_TITLE, "client", "round", "whose answers", "asked")
    for label in TEXT_SOURCES.values():
        table.add_column(label, justify="right", no_wrap=True)
    for key, those in group(rows, "client", "rounds", "whose", "prompt").items():
        client, rounds, whose, prompt = key
        by_source = {row["source"]: row["verbatim"] for row in those}
        if not by_source[UPDATE]["n"]:
            continue
        cells = (
            format_percent(found["value"], found["low"], found["high"], digits=0)
            for found in (by_source[source] for source in TEXT_SOURCES)
        )
        table.add_row(client, str(rounds), WHOSE[whose], prompt, *cells)
    notes = (f"{WHOSE[whose]}: {text}" for whose, text in ABOUT_WHOSE.items())
    prompts = (f"asked {prompt}: {text}" for prompt, text in ABOUT_PROMPTS.items())
    return "\n".join([render_table(table), *notes, *prompts])


def _canaries(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = CANARIES_TITLE.format(chance=first["chance"], maximum=first["maximum"])
    table = _table(title, "client", "file", "round")
    columns = TEXT_SOURCES | {LOCAL_ALONE: "local adapter"}
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
