"""One line of what ``fedlora deploy doctor`` has looked at."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAULT = "ok", "warning", "fault"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not as it should be."""

    level: str
    name: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.level:8}{self.name}: {self.what}" + f" {self.advice}" * bool(self.advice)


def ok(name: str, what: str) -> Finding:
    """Return that something is as it should be."""
    return Finding(OK, name, what)


def warning(name: str, what: str, advice: str) -> Finding:
    """Return that something may become a fault, or could not be looked at."""
    return Finding(WARNING, name, what, advice)


def fault(name: str, what: str, advice: str) -> Finding:
    """Return that something keeps the deployment from working as it should."""
    return Finding(FAULT, name, what, advice)
