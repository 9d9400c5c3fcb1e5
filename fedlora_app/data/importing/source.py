"""What a user wants to import, opened: a file, a folder, or a ``datasets`` dataset.

Nothing is checked here but that it can be read; ``records`` does the rest.
"""

from __future__ import annotations

import csv
import difflib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from fedlora_app.data.records import DataError, read_json_records
from fedlora_app.foundation.files import hash_file

NO_CELL = object()  # where a CSV row ends before its header does
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")

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


def load_source(
    name: str, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> Source:
    """Find out what the source is and open it.

    Args:
        name: a path; where there is none, a dataset on the hub.
        split: of a dataset, or the name without ending of a file in a folder; all by default.
        subset: configuration of a dataset on the hub.
        revision: branch, tag or commit of a dataset on the hub.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return Source(name, FILE, [_read_file(path)], {path.name: hash_file(path)})
    if any((path / note).is_file() for note in ("dataset_dict.json", "state.json")):
        return _load_saved(name, split)
    if path.is_dir():
        return _load_folder(name, split)
    if HUB_ID.fullmatch(name) and path.suffix.lower() not in READERS:
        return _load_from_hub(name, split, subset, revision)
    raise DataError(
        f"{name} does not exist. Expected a file ({', '.join(READERS)}), a folder of such files or "
        "of a saved dataset, or the name of a dataset on the hub (owner/name)."
    )


def suggest(name: str, known: Sequence[str]) -> str:
    """Return a question about the known name that is most like a mistyped one."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def _load_folder(name: str, split: str | None) -> Source:
    files = sorted(
        file
        for file in Path(name).iterdir()
        if file.is_file() and file.suffix.lower() in READERS and not file.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{name} holds no data. Expected {', '.join(READERS)} files in it, or what "
            "save_to_disk of a dataset wrote."
        )
    files = _select_split(files, lambda file: SHARD.sub("", file.stem), split, name)
    hashes = {file.name: hash_file(file) for file in files}
    return Source(name, "folder", [_read_file(file) for file in files], hashes)


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


def _read_file(path: Path) -> Table:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path} is of a kind that cannot be read. Expected {', '.join(READERS)}; save it as "
            "one of these."
        )
    return Table(path.name, read(path))


def _read_json(path: Path) -> list[Any]:
    return read_json_records(path)[0]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows as texts. What separates them is what the header has most of."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            unquoted = re.sub(r'"[^"]*"', "", header)
            delimiter = max(",;\t", key=unquoted.count)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True, restval=NO_CELL)
            names = Counter(reader.fieldnames or [])
            rows = list(reader)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV after line {reader.line_num}: {error}.") from None
    repeated = [repr(column) for column, count in names.items() if count > 1]
    if repeated:
        raise DataError(f"{path} has several columns {', '.join(repeated)}. Rename all but one.")
    return rows


def _read_parquet(path: Path) -> Dataset:
    with tempfile.TemporaryDirectory() as cache_dir:  # no copy of the data stays elsewhere
        try:
            return Dataset.from_parquet(str(path), cache_dir=cache_dir, keep_in_memory=True)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], Sequence[Any] | Dataset]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
