"""What ``flwr run --run-config`` takes, as it is declared in pyproject.toml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECLARED_DEFAULTS = {("config", "conf/demo.yaml"), ("output-dir", "results")}
"""Those of pyproject.toml that say something."""


def format_run_config(run_config: Mapping[str, Any]) -> str:
    """Return settings as one argument of the command; what is empty or a default is left out.

    Flower ends a text at the first quote that is like the one before it, and then reads it as TOML:
    what holds a single quote is written in double ones, and its double ones by their code points.
    """
    words = []
    for key, value in run_config.items():
        if value not in ("", 0, None) and (key, value) not in DECLARED_DEFAULTS:
            words.append(f"{key}={value if isinstance(value, int) else _quote(str(value))}")
    return " ".join(words)


def _quote(text: str) -> str:
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    escaped = (
        char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text
    )
    return f'"{"".join(escaped)}"'
