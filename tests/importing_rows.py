"""Rows of a source, and what an import reads from them."""

from __future__ import annotations

from fedlora_app.data.importing.rows import ImportedRecords, read_records
from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.importing.source import Source, Table


def row(**fields) -> dict:
    return {"instruction": "Who mends lamps?", "output": "Ann.", "city": "Ayr"} | fields


def read(*rows, **settings) -> ImportedRecords:
    chosen = {"client_column": "city"} | settings
    source = Source("rows.json", "file", [Table("rows.json", list(rows))])
    return read_records(source, ImportSettings(**chosen), lambda *_: None)


def written(*rows, **settings) -> list[dict]:
    return [record.fields for record in read(*rows, **settings).records]
