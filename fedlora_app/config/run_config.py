"""What ``flwr run --run-config`` takes, as it is declared in pyproject.toml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DECLARED_DEFAULTS = {("config", "conf/demo.yaml"), ("output-dir", "results")}
"""Those of pyproject.toml that say something."""


def format_run_config(run_config: Mapping[str, Any]) -> str:
    """Return settings as one argument of the command; what is empty or a default is left out.

    Single quotes inside a text become double ones, which mean the same in ``overrides``.
    """
    words = []
    for key, value in run_config.items():
        text = str(value).replace("'", '"')
        if value not in ("", 0, None) and (key, text) not in DECLARED_DEFAULTS:
            words.append(f"{key}={text}" if isinstance(value, int) else f"{key}='{text}'")
    return " ".join(words)
