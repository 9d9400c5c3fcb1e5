"""The hook by which both ends of a deployment write their evidence.

``fedlora deploy start`` names the log in an environment variable, which the processes that it
starts inherit. Without it nothing is written, hashed or computed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedlora_app.deployment.evidence import Evidence

EVIDENCE_VARIABLE = "FEDLORA_EVIDENCE"


def is_recorded() -> bool:
    """Return whether this process belongs to a deployment that keeps evidence."""
    return bool(os.environ.get(EVIDENCE_VARIABLE))


def record(event: str, **fields: Any) -> None:
    """Add an event to this end's log, if it keeps one.

    No text of a client's data, prompts or answers may be among the fields, nor the name of a file.

    Raises:
        OSError, EvidenceError: it cannot be written, and what it would tell must not happen.
    """
    if is_recorded():
        Evidence(Path(os.environ[EVIDENCE_VARIABLE])).add(event, **fields)
