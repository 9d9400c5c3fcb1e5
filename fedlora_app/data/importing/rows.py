"""From the rows of a source to checked records with their clients, as the settings say.

Nothing is written here. Every fault is named with its table and record number, counted from 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fedlora_app.config.schema import SAFE_NAME
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
from fedlora_app.data.importing.settings import SPLITS, ImportSettings
from fedlora_app.data.importing.shapes import (
    Shape,
    choose_shape,
    describe_left_out,
    read_exchanges,
)
from fedlora_app.data.importing.source import NO_CELL, Source, suggest
from fedlora_app.data.records import DataError, format_question, parse_record, refuse_repeated_keys
from fedlora_app.data.similarity import normalise_question
from fedlora_app.foundation.errors import name_kind

Report = Callable[[str, int, int], None]

JSON_FIELDS = ("distractors", "evaluation_guide")  # which a CSV cell can only hold as JSON
CONFLICT_FILES = tuple(f"conflict_{split}.json" for split in SPLITS[1:])
UNIVERSAL_FILES = tuple(f"universal_{split}.json" for split in SPLITS)
TOP_FILES = ("README.md", EXPERIMENT_FILE, *UNIVERSAL_FILES, *CONFLICT_FILES)
MAX_FAULTS_SHOWN = 10
MAX_NAME_LENGTH = 64  # of SAFE_NAME
REPORT_INTERVAL = 1000  # records
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ImportedRecord:
    """One checked record."""

    fields: dict[str, Any]
    """As it will be written."""
    question: str
    """Normalised, the input with it."""
    answer: str
    """Normalised."""
    client: str = ""
    """Id; empty where the record is universal, or a partition has yet to give it away."""
    label: str = ""
    row: int = 0
    """Of the source, counted through all tables: a conversation can make several records."""


@dataclass(frozen=True)
class ImportedRecords:
    """What was read."""

    records: list[ImportedRecord]
    num_invalid: int
    sha256: str
    """Of the valid records and their clients."""
    client_values: dict[str, str]
    """What stood in the client column, by id."""
    num_rows: int
    notes: tuple[str, ...]
    """What was taken for what, and what was left out."""


def read_records(source: Source, settings: ImportSettings, report: Report) -> ImportedRecords:
    """Check all rows and turn them into records.

    Raises:
        DataError: columns that are missing, or the first faults of the rows and their number.
    """
    if not any(len(table.rows) for table in source.tables):
        raise DataError(f"{source.name} holds no record.")
    shape = _check_columns(source, settings)
    named = {*shape.columns.values(), *_named_columns(settings)}
    tables = [(table.name, table.read(named)) for table in source.tables]
    num_rows, num_read = sum(len(rows) for _, rows in tables), 0
    records: list[ImportedRecord] = []
    faults: list[str] = []
    for table, rows in tables:
        for number, row in enumerate(rows, start=1):
            try:
                built = _build_records(row, settings, shape)
                records += [replace(record, row=num_read) for record in built]
            except (ValueError, RecursionError) as error:
                faults.append(f"{table}, record {number}: {error}")
            num_read += 1
            if num_read % REPORT_INTERVAL == 0:
                report("reading", num_read, num_rows)
    report("reading", num_rows, num_rows)
    if faults and not settings.skip_invalid:
        raise DataError(_describe_faults(source.name, faults, num_rows))
    if not records:
        raise DataError(f"{source.name} holds no {'valid ' if faults else ''}record.")
    ids = build_client_ids(record.client for record in records if record.client)
    if settings.client_column is not None and not ids:
        raise DataError(
            f'{source.name}: the client column "{settings.client_column}" is empty in every '
            "record. Name another column, or a partition."
        )
    digest = hashlib.sha256()
    for record in records:
        text = json.dumps([record.client, record.label, record.fields], sort_keys=True)
        digest.update(text.encode() + b"\n")
    owned = [replace(record, client=ids.get(record.client, "")) for record in records]
    values = {client: value for value, client in ids.items()}
    notes = [*shape.notes, *describe_left_out([row for _, rows in tables for row in rows], shape)]
    return ImportedRecords(owned, len(faults), digest.hexdigest(), values, num_rows, tuple(notes))


def build_client_ids(values: Iterable[str]) -> dict[str, str]:
    """Return a client id for every value, sorted by value.

    A safe name stays as it is. Otherwise accents are taken off and everything but ASCII letters,
    digits, ".", "_" and "-" becomes "-"; where no letter or digit is left, the id is "client-"
    and the beginning of the value's sha256.

    Raises:
        DataError: ids that are the same but for case, or taken by the import's own files.
    """
    ids = {value: _slugify(value) for value in sorted(set(values))}
    owners: dict[str, list[str]] = {}
    for value, client in ids.items():
        owners.setdefault(client.lower(), []).append(value)
    faults = [
        f"{', '.join(map(repr, rivals))} would all be client {ids[rivals[0]]!r}."
        for rivals in owners.values()
        if len(rivals) > 1
    ]
    taken = {name.lower() for name in TOP_FILES}
    faults += [
        f"{v!r} is the name of a file of the import." for v in ids if ids[v].lower() in taken
    ]
    if faults:
        listing = "\n".join(f"  {fault}" for fault in faults[:MAX_FAULTS_SHOWN])
        raise DataError(
            "The client column's values make no ids that differ by more than case:\n"
            f"{listing}\nRename them in the source."
        )
    return ids


def _slugify(value: str) -> str:
    if re.fullmatch(SAFE_NAME, value):
        return value
    decomposed = unicodedata.normalize("NFKD", value)
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    slug = UNSAFE.sub("-", bare).strip("._-")[:MAX_NAME_LENGTH].rstrip("._-")
    return slug or f"client-{hashlib.sha256(value.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _named_columns(settings: ImportSettings) -> dict[str, str]:
    """Return the columns beside the texts that the settings name, each with its setting."""
    named = dict.fromkeys(settings.keep_columns, "keep_columns")
    for setting in ("client_column", "label_column", "fact_column"):
        if (column := getattr(settings, setting)) is not None:
            named[column] = setting
    return named


def _check_columns(source: Source, settings: ImportSettings) -> Shape:
    """Return where the texts are; refuse a source without a named column."""
    known = list(dict.fromkeys(column for table in source.tables for column in table.columns))
    shape, faults = choose_shape(known, settings)
    faults += [
        f'  {setting}: there is no column "{column}".{suggest(column, known)}'
        for column, setting in _named_columns(settings).items()
        if column not in known
    ]
    if faults:
        listing = "\n".join(faults)
        columns = ", ".join(known) or "none"
        raise DataError(
            f"{source.name} lacks columns:\n{listing}\nIts columns: {columns}. Name those that are "
            "meant."
        )
    return shape


def _build_records(row: Any, settings: ImportSettings, shape: Shape) -> list[ImportedRecord]:
    """Turn a row into records whose client is still the column's value.

    Raises:
        ValueError: what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"is {name_kind(row)} and not an object.")
    if None in row:
        raise ValueError(f"has {len(row[None])} cells more than the header.")
    if NO_CELL in row.values():
        raise ValueError(f"has only {sum(v is not NO_CELL for v in row.values())} cells.")
    refuse_repeated_keys(row, row)
    if settings.client_column is not None and settings.client_column not in row:
        raise ValueError(
            f'has no "{settings.client_column}" (client_column). What is nobody\'s own has it, and '
            "empty: without it a client's records would be shared with all."
        )
    texts = {column: _to_text(row.get(column)) for column in shape.columns.values()}
    exchanges = read_exchanges(row | texts, shape, settings.turns)
    kept = {column: _read_kept(row, column) for column in settings.keep_columns}
    kept = {column: value for column, value in kept.items() if value is not None}
    if fact := _read_name(row, settings.fact_column):
        kept["fact"] = fact
    client = _read_name(row, settings.client_column)
    label = _read_name(row, settings.label_column)
    if settings.has_labels and not label:
        raise ValueError(f'"{settings.label_column}" (label_column) is empty.')
    if settings.client_column is not None and settings.role == "universal" and not client:
        raise ValueError(
            f'"{settings.client_column}" (client_column) is empty, but with role universal every '
            "record is some client's share."
        )
    return [_build_record(texts | kept, client, label) for texts in exchanges]


def _build_record(raw: dict[str, Any], client: str, label: str) -> ImportedRecord:
    record = parse_record(raw)
    return ImportedRecord(
        raw | {"instruction": record.instruction, "input": record.input},
        normalise_question(format_question(record)),
        normalise_question(record.output),
        client,
        label,
    )


def _read_kept(row: dict[str, Any], column: str) -> Any:
    value = _without_nulls(row.get(column))
    if column == "fact":
        value = _to_text(value)
    try:
        if column in JSON_FIELDS and isinstance(value, str):
            value = json.loads(value) if value.strip() else None
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f'"{column}" is no JSON: {error}.') from None
    return value


def _read_name(row: dict[str, Any], column: str | None) -> str:
    """Return a client or a label as text; a whole number without the ".0" of its column."""
    value = row.get(column) if column is not None else None
    if isinstance(value, list | dict | bytes):
        raise ValueError(f'"{column}" is {name_kind(value)}. Expected text.')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (_to_text(value) or "").strip()


def _to_text(value: Any) -> Any:
    """Return a number or the like as text, None for what is missing, the rest as it is."""
    if _is_missing(value) or isinstance(value, str | list | dict | bytes):
        return None if _is_missing(value) else value
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _without_nulls(value: Any) -> Any:
    """Drop what is missing: Arrow gives every object the keys of all others."""
    if isinstance(value, dict):
        plain = {key: _without_nulls(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item is not None}
    if isinstance(value, list):
        return [item for item in map(_without_nulls, value) if item is not None]
    return None if _is_missing(value) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _describe_faults(name: str, faults: list[str], num_rows: int) -> str:
    shown = "\n".join(f"  {fault}" for fault in faults[:MAX_FAULTS_SHOWN])
    more = len(faults) - MAX_FAULTS_SHOWN
    rest = f"\n  and {more} more." if more > 0 else ""
    return (
        f"{name}: {len(faults)} of {num_rows} records are invalid:\n{shown}{rest}\n"
        "Fix them, or set skip_invalid to drop and count them."
    )
