"""What a user wants to import, opened: a file, a folder, or a ``datasets`` dataset.

Nothing is checked here but that it can be read; ``records`` does the rest.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pyarrow.parquet import read_metadata

from fedlora_app.data.records import DataError, decode_text, parse_json_records
from fedlora_app.foundation.files import hash_file

NO_CELL = object()  # where a CSV row ends before its header does
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
CSV_HEADER = re.compile(r'(?:"[^"]*"|[^"\r\n])*')
"""Up to the first end of a line that is not within quotes."""
EXCEL_SEPARATOR = re.compile(r'"?sep=(?P<separator>.)"?\r?\n', re.IGNORECASE)
"""A first line that Excel takes for what separates cells."""
GZIP = ".gz"
LISTING = "dataset_info.json"
"""LLaMA-Factory's list of a folder's data sets; ``datasets`` has another file of that name."""

HUB = "hub dataset"
FILE = "file"

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """One file, or one split of a dataset."""

    name: str
    rows: Sequence[Any] | Dataset

    @property
    def columns(self) -> list[str]:
        """The columns of any row, in their order."""
        if isinstance(self.rows, Dataset):
            return self.rows.column_names
        dicts = (row for row in self.rows if isinstance(row, dict))
        return [str(name) for name in dict.fromkeys(c for row in dicts for c in row if c)]

    def read(self, columns: Iterable[str]) -> Sequence[Any]:
        """Return the rows; of a dataset these columns only, with the names of its classes."""
        if not isinstance(self.rows, Dataset):
            return self.rows
        selected = self.rows.select_columns([c for c in self.rows.column_names if c in columns])
        rows = selected.to_list()
        for column, feature in selected.features.items():
            if isinstance(feature, ClassLabel):
                for row in rows:
                    label = row[column]
                    row[column] = None if label in (None, -1) else feature.int2str(label)
        return rows


@dataclass(frozen=True)
class Source:
    """Where the rows come from."""

    name: str
    """As the user typed it."""
    kind: str
    tables: list[Table]
    sha256: dict[str, str] = field(default_factory=dict)
    """By file, of sources that are files."""
    unread: tuple[str, ...] = ()
    """What else a folder holds, where no split of it is asked for."""


def load_source(
    name: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    encoding: str = "utf-8",
) -> Source:
    """Find out what the source is and open it.

    Args:
        name: a path; where there is none, a dataset on the hub.
        split: of a dataset, or the name without ending of a file in a folder (its name in a
            ``dataset_info.json`` there); all by default.
        subset: configuration of a dataset on the hub.
        revision: branch, tag or commit of a dataset on the hub.
        encoding: of JSON and CSV files.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    if not name.strip():
        raise DataError("The source has an empty name. Name a file, a folder or a hub dataset.")
    path = Path(name)
    if path.is_file():
        return Source(name, FILE, [_read_file(path, encoding)], {path.name: hash_file(path)})
    if any((path / note).is_file() for note in ("dataset_dict.json", "state.json")):
        return _load_saved(name, split)
    if path.is_dir():
        return _load_folder(name, split, encoding)
    if HUB_ID.fullmatch(name) and not _kind(path):
        return _load_from_hub(name, split, subset, revision)
    raise DataError(
        f"{name} does not exist. Expected a file ({', '.join(READERS)}), a folder of such files or "
        "of a saved dataset, or the name of a dataset on the hub (owner/name)."
    )


def suggest(name: str, known: Sequence[str]) -> str:
    """Return a question about the known name that is most like a mistyped one."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def _load_folder(name: str, split: str | None, encoding: str) -> Source:
    listed, others = _read_listing(Path(name) / LISTING)
    if listed:
        chosen = _select_split(list(listed), str, split, name)
        files = {key: Path(name) / listed[key]["file_name"] for key in chosen}
        tables = [_rename(_read_file(f, encoding), key, listed[key]) for key, f in files.items()]
        unread = _list_unread(name, files.values()) + others if split is None else ()
        hashes = {f.name: hash_file(f) for f in files.values()}
        return Source(name, "folder", tables, hashes, tuple(unread))
    found = sorted(
        file
        for file in Path(name).iterdir()
        if file.is_file() and _kind(file) and not file.name.startswith(".") and file.name != LISTING
    )
    if not found:
        raise DataError(
            f"{name} holds no data. Expected {', '.join(READERS)} files in it, or what "
            "save_to_disk of a dataset wrote."
        )
    found = _select_split(found, lambda file: SHARD.sub("", _stem(file)), split, name)
    unread = _list_unread(name, found) if split is None else ()
    hashes = {file.name: hash_file(file) for file in found}
    tables = [_read_file(file, encoding) for file in found]
    return Source(name, "folder", tables, hashes, tuple(unread))


def _list_unread(folder: str, files: Iterable[Path]) -> list[str]:
    """Return what else a folder holds, but for hidden files and those that are about the data."""
    known = {path for file in files for path in (file, *file.parents)}
    known |= {Path(folder, LISTING), Path(folder, "README.md")}
    others = (p for p in Path(folder).iterdir() if p not in known and not p.name.startswith("."))
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def _read_listing(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return a folder's data sets by name, as LLaMA-Factory lists them; none without a list.

    Beside them, the names of those that are no files there.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}, []
    entries = listed.items() if isinstance(listed, dict) else ()
    files = {
        str(name): entry
        for name, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }
    others = [f'"{name}" of {LISTING}' for name, _ in entries if name not in files]
    return files, others


def _rename(table: Table, name: str, entry: dict[str, Any]) -> Table:
    """Return a listed table whose columns have the names that they are known by here."""
    listed = entry.get("columns")
    columns = (
        {k: v for k, v in listed.items() if isinstance(v, str)} if isinstance(listed, dict) else {}
    )
    ours = {"prompt": "instruction", "query": "input", "response": "output"}
    names = {
        column: ours.get(key, key) for key, column in columns.items() if column in table.columns
    }
    new = [names.get(column, column) for column in table.columns]
    if len(set(new)) < len(new) or len(set(columns.values())) < len(columns):
        raise DataError(
            f"{name}: the columns that {LISTING} names for it would give several the same name. "
            "Rename them there, or import the file by itself."
        )
    if isinstance(table.rows, Dataset):
        return Table(name, table.rows.rename_columns({k: v for k, v in names.items() if k != v}))
    rows = [
        {names.get(key, key): value for key, value in row.items()}
        if type(row) is dict  # one with a key that stands twice stays as it is, and is refused
        else row
        for row in table.rows
    ]
    return Table(name, rows)


def _load_saved(name: str, split: str | None) -> Source:
    try:
        dataset = load_from_disk(name)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name} cannot be read as a saved dataset: {error}\nSave it again with save_to_disk."
        ) from error
    files = sorted(Path(name).rglob("*.arrow"))
    hashes = {file.relative_to(name).as_posix(): hash_file(file) for file in files}
    return Source(name, "saved dataset", _list_tables(name, dataset, split), hashes)


def _load_from_hub(
    name: str, split: str | None, subset: str | None, revision: str | None
) -> Source:
    try:
        dataset = load_dataset(name, subset, revision=revision, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name} is neither a file nor a folder here, and as a dataset of the Hugging Face hub "
            f"it could not be loaded: {error}\n"
            "Check the name, split, subset and revision. On a machine without network, load it on "
            f"another one with load_dataset({name!r}).save_to_disk(FOLDER), and import that folder."
        ) from error
    if isinstance(dataset, Dataset):  # the hub's splits may be expressions: train[:10%]
        return Source(name, HUB, [Table(str(split), dataset)])
    return Source(name, HUB, _list_tables(name, dataset, None))


def _list_tables(name: str, dataset: Dataset | DatasetDict, split: str | None) -> list[Table]:
    if isinstance(dataset, Dataset):
        dataset = DatasetDict({str(dataset.split or "data"): dataset})
    return [Table(key, dataset[key]) for key in _select_split(list(dataset), str, split, name)]


def _select_split(
    options: list[T], key: Callable[[T], str], wanted: str | None, name: str
) -> list[T]:
    """Return the options whose key is wanted, all of them where nothing is."""
    selected = [option for option in options if wanted in (None, key(option))]
    if not selected:
        known = list(dict.fromkeys(map(key, options)))
        raise DataError(
            f'{name} has no split "{wanted}".{suggest(wanted, known)} It has: {", ".join(known)}.'
        )
    return selected


def _kind(path: Path) -> str:
    """Return the ending by which a file is read, without that of its compression; "" if none is."""
    ending = (path.with_suffix("") if path.suffix.lower() == GZIP else path).suffix.lower()
    return ending if ending in READERS else ""


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().rindex(_kind(path))]


def _read_file(path: Path, encoding: str) -> Table:
    kind = _kind(path)
    if not kind:
        raise DataError(
            f"{path} is of a kind that cannot be read. Expected {', '.join(READERS)}, which may be "
            f"compressed ({GZIP}); save it as one of these."
        )
    try:
        content = path.read_bytes()
        if path.suffix.lower() == GZIP:
            content = gzip.decompress(content)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}.") from None
    return Table(path.name, READERS[kind](content, str(path), encoding))


def _read_csv(content: bytes, name: str, encoding: str) -> list[dict[str, Any]]:
    """Return the rows as texts. What separates them is what the header has most of.

    Columns behind the last one that has a name are none where they are empty.
    """
    csv.field_size_limit(sys.maxsize)
    text = decode_text(content, name, encoding)
    if said := EXCEL_SEPARATOR.match(text):
        text, delimiter = text[said.end() :], said["separator"]
    else:
        unquoted = re.sub(r'"[^"]*"', "", CSV_HEADER.match(text)[0])
        delimiter = max(",;\t", key=unquoted.count)
    file = io.StringIO(text, newline="")
    try:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True, restval=NO_CELL)
        names = list(reader.fieldnames or [])
        while names and not names[-1]:
            names.pop()
        reader.fieldnames = names
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{name} is not valid CSV after line {reader.line_num}: {error}.") from None
    repeated = [repr(column) for column, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{name} has several columns {', '.join(repeated)}. Rename all but one.")
    for row in rows:
        if not any(row.get(None, ())):
            row.pop(None, None)
    return rows


def _read_parquet(content: bytes, name: str, encoding: str) -> Sequence[Any] | Dataset:
    with tempfile.TemporaryDirectory() as cache_dir:  # no copy of the data stays elsewhere
        path = Path(cache_dir, "rows.parquet")
        path.write_bytes(content)
        try:
            if not read_metadata(path).num_rows:
                return []
            return Dataset.from_parquet(str(path), cache_dir=cache_dir, keep_in_memory=True)
        except (OSError, ValueError, DatasetsError) as error:
            reason = error.__cause__ or error
            raise DataError(f"{name} cannot be read as Parquet: {reason}") from error


READERS: dict[str, Callable[[bytes, str, str], Sequence[Any] | Dataset]] = {
    ".json": parse_json_records,
    ".jsonl": parse_json_records,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
