"""What is wrong with a section of YAML, in sentences with dotted paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from datetime import date
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedlora_app.foundation.errors import name_kind

MAX_FAULTS_SHOWN = 50
MAX_SHOWN_CHARS = 100


def describe_faults(error: ValidationError, model: type[BaseModel]) -> tuple[list[str], int]:
    """Return the faults that are worth showing, and how many more there are.

    Args:
        model: what was expected, whose keys are suggested for a mistyped one.
    """
    found = error.errors(include_url=False)
    shown = [_describe(fault, model) for fault in found[:MAX_FAULTS_SHOWN]]
    return shown, max(0, len(found) - MAX_FAULTS_SHOWN)


def list_faults(source: str, faults: list[str], num_more: int = 0) -> str:
    """Return the error that lists all faults of a file."""
    listing = "\n".join(f"  {fault}" for fault in faults)
    listing += f"\n  and {num_more} more." if num_more else ""
    num_faults = len(faults) + num_more
    count = "1 fault" if num_faults == 1 else f"{num_faults} faults"
    return f"{source} has {count}:\n{listing}"


def _describe(fault: Any, model: type[BaseModel]) -> str:
    """Return ``dotted.path: what is wrong``, with the value and a likely key."""
    parts = (str(part) for part in fault["loc"])
    path = shorten(".".join(part for part in parts if "[" not in part))
    value = fault["input"]
    if fault["type"] == "extra_forbidden":
        return f"{path}: unknown key.{_suggest(fault['loc'], model)}"
    if fault["type"] == "missing":
        return f"{path}: missing."
    if fault["type"] == "string_pattern_mismatch":
        return (
            f"{path}: {show(value)} is not a name. Expected letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 64."
        )
    if fault["type"] == "too_short":
        return f"{path}: at least one is needed."
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list) else f" (it is {show(value)})"
    return f"{path}: {message[0].lower()}{message[1:]}{shown}."


def show(value: Any) -> str:
    """Return a value as it may stand in a message, whatever its size and its characters."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_SHOWN_CHARS:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > MAX_SHOWN_CHARS:
        return f"{value[:MAX_SHOWN_CHARS]!r}... of {len(value)} characters"
    if isinstance(value, str | int | float | date | None):
        return repr(value)
    return name_kind(value)


def shorten(path: str) -> str:
    """Return a key or a dotted path as it may stand in a message, whatever it holds."""
    short = path if len(path) <= MAX_SHOWN_CHARS else f"{path[:MAX_SHOWN_CHARS]}..."
    return short if short.isprintable() else ascii(short)


def _suggest(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Name the most similar known key, first in the same section and then anywhere."""
    here = ".".join(str(part) for part in loc[:-1] if not isinstance(part, int))
    known = dict(_known_keys(model))
    siblings = [key for key, section in known.items() if section == here]
    last = str(loc[-1])[:MAX_SHOWN_CHARS]
    matches = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in siblings], n=1)
    if matches:
        return f' Did you mean "{matches[0]}"?'
    elsewhere = [key for key in known if key.rsplit(".", 1)[-1] == last]
    if elsewhere:
        return f' It belongs at "{elsewhere[0]}".'
    names = ", ".join(key.rsplit(".", 1)[-1] for key in siblings)
    return f" Known here: {names}." if names else ""


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, dotted section) of every field below ``section``."""
    for name, field in section.model_fields.items():
        key = f"{prefix}.{field.alias or name}".lstrip(".")
        yield key, prefix
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, key)
