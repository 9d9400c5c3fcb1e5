"""The hook by which both ends of a deployment can keep evidence of what they did."""

from __future__ import annotations

from typing import Any


def record(event: str, **fields: Any) -> None:
    """Enter an event in this end's log, if it keeps one.

    No text of a client's data, prompts or answers may be among the fields, nor the name of a file.
    """
