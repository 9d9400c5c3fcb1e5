"""Alpaca-style records from JSON or JSON Lines, checked, with every fault named.

A training or test record is ``{"instruction", "input", "output"}``, of which either of the first
two may be empty; a conflict record has ``answers: {client id: answer}`` in place of ``output``, or
the keyword form ``evaluation_guide: {"<client id>_keywords": [...]}``, or both. ``fact`` (which
rule the record is about), ``distractors`` (wrong answers) and ``evaluation_guide`` are optional
everywhere. Other fields are kept in the file and ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedlora_app.foundation.errors import UserError, name_kind

KEYWORD_SUFFIX = "_keywords"
MAX_FAULTS_SHOWN = 20
MAX_KEY_SHOWN = 100
FIELDS = {"instruction", "input", "output", "answers", "distractors", "fact", "evaluation_guide"}
WRAPPERS = ("data", "records", "rows", "examples", "items")
"""Keys of an object that a file's list may stand under."""
UNTAUGHT = {
    "system": "a client has one system prompt, which the experiment names",
    "tools": "the use of tools is not trained here",
    "functions": "the use of tools is not trained here",
    "images": "only text is trained on here",
    "rejected": "an answer that is not wanted is not trained on here",
}
"""Fields of other formats that change what an answer means, and why nothing is made of them."""
IGNORED = UNTAUGHT | {
    "history": "what was said before a question is no part of it",
    "messages": "only instruction, input and output are",
    "conversations": "only instruction, input and output are",
    "context": "only instruction, input and output are",
}
"""Fields that a data file may have and that are not read; an import makes something of the last."""
GZIP_MAGIC = b"\x1f\x8b"


class DataError(UserError):
    """A data file is missing or has faults; the message lists them with their records."""


@dataclass(frozen=True)
class Record:
    """One question with its answer."""

    instruction: str
    output: str
    input: str = ""
    fact: str | None = None
    distractors: tuple[str, ...] = ()
    keywords: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ConflictRecord:
    """One question that the clients answer in different ways.

    ``output`` is a gold answer of which the record does not say whose it is.
    """

    instruction: str
    input: str = ""
    output: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    keywords: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fact: str | None = None
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordFile:
    """The records of one file, and what had to be left out."""

    path: Path
    sha256: str
    records: list[Any]
    num_skipped: int = 0
    num_ignored: dict[str, int] = field(default_factory=dict)
    """Records by the fields of ``IGNORED`` that hold something."""


T = TypeVar("T", Record, ConflictRecord)


def load_records(path: Path, *, skip_invalid: bool = False) -> RecordFile:
    """Read training or test records.

    Raises:
        DataError: naming file, record number (from 1) and field of every fault.
    """
    return _load(path, parse_record, skip_invalid)


def load_conflicts(
    path: Path, client_ids: Iterable[str], *, skip_invalid: bool = False
) -> RecordFile:
    """Read conflict records, whose answers must belong to known clients.

    Raises:
        DataError: as ``load_records``.
    """
    known = list(client_ids)
    return _load(path, lambda raw: _parse_conflict(raw, known), skip_invalid)


def format_question(record: Record | ConflictRecord) -> str:
    """Return what the user says: the instruction, and the input below it if there is one."""
    return f"{record.instruction}\n\n{record.input}" if record.input else record.instruction


def _load(path: Path, parse: Callable[[dict[str, Any]], T], skip_invalid: bool) -> RecordFile:
    raw_records, sha256 = read_json_records(path)
    records: list[T] = []
    faults: list[str] = []
    ignored: Counter[str] = Counter()
    for number, raw in enumerate(raw_records, start=1):
        try:
            if not isinstance(raw, dict):
                raise ValueError(f"is {name_kind(raw)} and not an object.")
            refuse_repeated_keys(raw, FIELDS)
            records.append(parse(raw))
            ignored.update(name for name in IGNORED if raw.get(name))
        except ValueError as error:
            faults.append(f"record {number}: {error}")
    if faults and not skip_invalid:
        shown = "\n".join(f"  {fault}" for fault in faults[:MAX_FAULTS_SHOWN])
        more = len(faults) - MAX_FAULTS_SHOWN
        rest = f"\n  and {more} more." if more > 0 else ""
        raise DataError(
            f"{path}: {len(faults)} of {len(raw_records)} records are invalid:\n{shown}{rest}\n"
            "Fix them, or set data.skip_invalid: true to drop and count them."
        )
    if not records:
        raise DataError(f"{path} holds no {'valid ' if faults else ''}record.")
    return RecordFile(path, sha256, records, len(faults), dict(ignored))


def read_json_records(path: Path) -> tuple[list[Any], str]:
    """Return the raw records of a JSON list or of JSON Lines, and the file's sha256."""
    try:
        is_other = path.exists() and not path.is_file()  # a pipe would never end
        content = b"" if is_other else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise DataError(f"{str(path)!a} is not a possible file name.") from None
    if is_other:
        raise DataError(f"{path} is not a regular file. Expected JSON or JSON Lines.")
    return parse_json_records(content, str(path)), hashlib.sha256(content).hexdigest()


def parse_json_records(content: bytes, name: str, encoding: str = "utf-8") -> list[Any]:
    """Return the raw records of a JSON list, which may stand in an object, or of JSON Lines.

    An object of one line may be either, and is a record where the file is called .jsonl.

    Args:
        name: of the file, for errors.

    Raises:
        DataError: it is another kind of file, or in another encoding.
    """
    text = decode_text(content, name, encoding)
    beginning = text.lstrip()[:1]
    if beginning == "[":
        try:
            return _parse_json(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not valid JSON: {error}.") from None
    may_wrap = beginning == "{" and ".jsonl" not in Path(name.lower()).suffixes
    if may_wrap and (records := _unwrap(text)) is not None:
        return records
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse_json(line))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}, line {number} is not valid JSON: {error}. "
                "Expected a JSON list, or one JSON object per line."
            ) from None
    return records


def decode_text(content: bytes, name: str, encoding: str = "utf-8") -> str:
    """Return a file's text, without a mark of its byte order.

    Raises:
        DataError: it is not in this encoding.
    """
    if content.startswith(GZIP_MAGIC):
        raise DataError(f"{name} is compressed with gzip. Unpack it: gunzip {name}")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        byte = getattr(error, "start", 0)
        raise DataError(
            f"{name} is not {encoding.upper()} text (byte {byte}). Save it as UTF-8 (in "
            "Excel: CSV UTF-8); an import also takes --encoding, such as cp1252 for Western "
            "European and gb18030 for Chinese files of Windows."
        ) from None


def _unwrap(text: str) -> list[Any] | None:
    """Return the list of records in an object that is the whole file, None if there is none."""
    try:
        found = _parse_json(text)
    except (ValueError, RecursionError):  # of several lines, for one
        return None
    if isinstance(found, _Repeating) or FIELDS & found.keys():  # a record by itself
        return None
    lists = [
        key
        for key, value in found.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    return found[lists[0]] if len(lists) == 1 and lists[0] in WRAPPERS else None


class _Repeating(dict[str, Any]):
    """A JSON object in which a key stood more than once; the last of its values is kept."""

    repeated: str


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_build_object)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    [(repeating.repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
    return repeating


def refuse_repeated_keys(raw: dict[str, Any], known: Container[str]) -> None:
    """Raise where a key of a record stands in the file more than once.

    Args:
        known: keys that may be named; others could say what may not leave a client.

    Raises:
        ValueError: naming the key.
    """
    for value in (raw, raw.get("answers"), raw.get("evaluation_guide")):
        if isinstance(value, _Repeating):
            is_known = value.repeated in known
            key = f"the key {value.repeated!r}" if is_known else "a key that has no meaning here"
            raise ValueError(f"{key} is there more than once.")


def parse_record(raw: dict[str, Any]) -> Record:
    """Return a checked Alpaca record.

    Raises:
        ValueError: saying which field is wrong, to be put behind a file's name.
    """
    instruction, further = _question(raw)
    return Record(
        instruction,
        output=_text(raw, "output", required=True),
        input=further,
        fact=_fact(raw),
        distractors=_texts(raw, "distractors"),
        keywords=_keywords(raw),
    )


def _parse_conflict(raw: dict[str, Any], client_ids: list[str]) -> ConflictRecord:
    answers = _mapping(raw, "answers")
    keywords = _keywords(raw)
    if not answers and not keywords:
        raise ValueError(
            'has neither "answers" nor an "evaluation_guide" with "<client id>_keywords".'
        )
    for name, named in (("answers", answers), ("evaluation_guide", keywords)):
        unknown = [name[:MAX_KEY_SHOWN] for name in sorted(set(named) - set(client_ids))[:5]]
        if unknown:
            raise ValueError(
                f'"{name}" names {", ".join(map(repr, unknown))}, which is not a client. '
                f"Clients: {', '.join(client_ids)}."
            )
    instruction, further = _question(raw)
    return ConflictRecord(
        instruction,
        input=further,
        output=_text(raw, "output"),
        answers={client: _text(answers, client, required=True) for client in answers},
        keywords=keywords,
        fact=_fact(raw),
        distractors=_texts(raw, "distractors"),
    )


def _keywords(raw: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    guide = _mapping(raw, "evaluation_guide")
    for key in guide:
        if not key.isprintable():
            raise ValueError('"evaluation_guide" has a key with characters that cannot be shown.')
    return {
        key.removesuffix(KEYWORD_SUFFIX): _texts(guide, key, f"*{KEYWORD_SUFFIX}")
        for key in guide
        if key.endswith(KEYWORD_SUFFIX)
    }


def _question(raw: dict[str, Any]) -> tuple[str, str]:
    """Return the instruction and the input; the input alone is the instruction."""
    further, instruction = _text(raw, "input"), raw.get("instruction")
    if further.strip() and (instruction is None or str(instruction).strip() == ""):
        return further, ""
    return _text(raw, "instruction", required=True), further


def _text(raw: dict[str, Any], key: str, required: bool = False) -> str:
    value = raw.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {name_kind(value)}"
        raise ValueError(f'"{key}" {found}. Expected a string.')
    if required and not value.strip():
        raise ValueError(f'"{key}" is empty. Expected non-empty text.')
    _refuse_surrogates(key, value)
    return value


def _refuse_surrogates(key: str, value: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f'"{key}" holds a lone surrogate, which no UTF-8 text can.')


def _fact(raw: dict[str, Any]) -> str | None:
    """Return the fact's name, which is compared with others; None where it is blank."""
    return _text(raw, "fact").strip() or None


def _texts(raw: dict[str, Any], key: str, shown: str = "") -> tuple[str, ...]:
    """Return a list of texts; a key that is not ours is ``shown`` otherwise, as its text stays."""
    value = raw.get(key, [])
    key = shown or key
    if not isinstance(value, list) or not all(
        isinstance(item, str) and item.strip() for item in value
    ):
        raise ValueError(f'"{key}" is not a list of non-empty strings.')
    for item in value:
        _refuse_surrogates(key, item)
    return tuple(value)


def _mapping(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f'"{key}" is {name_kind(value)}. Expected an object.')
    return value
