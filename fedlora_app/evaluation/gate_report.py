"""What gates do, from what is reported of them: how they separate, what errors are due to.

Input: a run's history, in which each client's gate says how well it separates that client's own
training questions, and ``evaluation.json``, which has of every question how far the gate opened
and which part a wrong answer is due to. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.questions import UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.answering import OPEN_ABOVE
from fedlora_app.evaluation.names import OWN_SETS, QUESTION_SETS
from fedlora_app.foundation.percent import format_percent

BAD_BELOW = 0.8
"""A gate separates badly with less than this of any kind on the right side."""
SEPARATION = {
    "opens_for_local": "open for its own",
    "closes_for_universal": "closed for universal",
    "closes_for_unknown": "closed for unknown",
}
"""The shares of training questions on the right side, and their columns."""
BLAMED = {"gate": "gate", GLOBAL: "global adapter", LOCAL: "local adapter"}
"""What a wrong answer of a gated pair can be due to."""
ADVICE = (
    "What helps: several wordings of every fact, a `fact` that they share, more questions; or "
    "adapters.gate: none with training.local_kept_share, which protects without a gate."
)
MOST_NAMED = 3  # clients in a warning

Figures = Mapping[str, float]
"""A gate's cross-validated figures by name."""


@dataclass(frozen=True)
class GatedSet:
    """What gates did with the questions of one set."""

    label: str
    is_own: bool
    """A gate should open for them."""
    openness: dict[str, list[float]] = field(default_factory=dict)
    """By client, of each question, in [0, 1]."""
    blamed: Counter[str] = field(default_factory=Counter)
    """Wrong answers by what they are due to."""

    @property
    def values(self) -> list[float]:
        """The openness of all clients' questions."""
        return list(chain.from_iterable(self.openness.values()))

    def share_open(self, client: str | None = None) -> float | None:
        """Return the share of a client's questions, or of all, that the gate opens for."""
        values = self.values if client is None else self.openness.get(client, [])
        return sum(v > OPEN_ABOVE for v in values) / len(values) if values else None


def collect_gates(history: Sequence[Mapping[str, Any]]) -> dict[str, Figures]:
    """Return the figures of each client's gate, the last that it reported."""
    gates = {}
    for entry in history:
        found = {
            name.removeprefix("gate/"): value
            for name, value in entry["metrics"].items()
            if name.startswith("gate/")
        }
        if found and entry["phase"] == "evaluate":
            gates[entry["client"]] = found
    return dict(sorted(gates.items()))


def describe_gate(figures: Figures) -> str:
    """Return what a gate compares, and how much of what was held out it gets right."""
    compared, held = ("facts", "wordings") if figures["by_fact"] else ("kinds", "facts")
    own, universal, unknown = (_percent(figures.get(name)) for name in SEPARATION)
    closed = [f"{universal} of the universal ones"] if universal else []
    closed += [f"{unknown} of unknown ones"] if unknown else []
    found = [f"opens for {own} of its own held-out {held}"] if own else []
    found += [f"stays closed for {' and '.join(closed)}"] if closed else []
    if not figures["by_fact"]:
        single = [kind for kind, share in (("local", own), ("universal", universal)) if not share]
        found += [f"a single {kind} fact cannot be held out" for kind in single]
    return f"compares {compared}; {', '.join(found)}"


def is_bad(share: float | None) -> bool:
    """Return whether a gate gets so much wrong that something should be done about it."""
    return share is not None and share < BAD_BELOW


def warn_of_gates(gates: Mapping[str, Figures]) -> str:
    """Return which clients' gates separate badly and what to do; "" where none does."""
    bad = [
        client for client, found in gates.items() if any(is_bad(found.get(n)) for n in SEPARATION)
    ]
    if not bad:
        return ""
    left = len(bad) - MOST_NAMED
    named = ", ".join(bad[:MOST_NAMED]) + (f" and {left} more" if left > 0 else "")
    limit = format_percent(BAD_BELOW, digits=0, unit=" %")
    subject = "The gate of {} separates" if len(bad) == 1 else "The gates of {} separate"
    return f"{subject.format(named)} badly, less than {limit} of a kind of question. {ADVICE}"


def describe_gates(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line per client that has a gate, and a warning of bad ones."""
    gates = collect_gates(history)
    lines = [f"{client}, gate: {describe_gate(found)}" for client, found in gates.items()]
    warning = warn_of_gates(gates)
    return lines + ([f"Warning: {warning}"] if warning else [])


def read_gated_sets(evaluation: Mapping[str, Any]) -> dict[str, GatedSet]:
    """Return what gates did by question set, full scale; empty where there was no gate.

    Universal questions about facts that a client never saw are a set of their own here, and no
    part of the universal one.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in evaluation.get("questions") or ():
        if row.get("gate") is not None and row["scale"] == 1.0:
            is_unseen = row["question_set"] == UNIVERSAL and row["is_unseen"]
            name = UNIVERSAL_UNSEEN if is_unseen else row["question_set"]
            rows.setdefault(name, []).append(row)
    sets = {}
    for name in (n for n in QUESTION_SETS if n in rows):
        seen = ", seen" * (name == UNIVERSAL and UNIVERSAL_UNSEEN in rows)
        gated = GatedSet(QUESTION_SETS[name].label + seen, name in OWN_SETS)
        for row in rows[name]:
            gated.openness.setdefault(row["client"], []).append(row["gate"])
            if row.get("failed"):
                gated.blamed[row["failed"]] += 1
        sets[name] = gated
    return sets


def _percent(share: float | None) -> str:
    return format_percent(share, digits=None, unit=" %")
