"""What ``attack.json`` holds: the names in it, and how its rows are read. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora_app.data.questions import LOCAL_ANSWERS, LOCAL_SET, UNIVERSAL
from fedlora_app.foundation.percent import format_percent

FORMAT = 1

FACTS = "facts"
SETS = {
    UNIVERSAL: "wording of universal records",
    FACTS: "which universal facts it has",
    LOCAL_SET: "wording of local records",
    LOCAL_ANSWERS: "local answers",
}
"""What is told apart."""

LOSS_DROP, ALIGNMENT, PROJECTION = "loss_drop", "alignment", "projection"
HEADLINES = {FACTS: ALIGNMENT, UNIVERSAL: ALIGNMENT, LOCAL_SET: ALIGNMENT}
HEADLINES |= {LOCAL_ANSWERS: LOSS_DROP}
"""The attack by which a set is judged, chosen before any was measured: the best of several lies
above chance by chance."""
RECORD_ATTACKS = {
    LOSS_DROP: "likelier answer",
    ALIGNMENT: "gradient alignment",
    PROJECTION: "input subspace",
}
INPUT, EFFECT, OUTPUT = "input", "effect", "output"
TOKEN_ATTACKS = {
    INPUT: "input subspace, lowest layer",
    EFFECT: "change of the lowest layer's projections",
    OUTPUT: "writing direction, last layer",
}

UPDATE, OTHERS, AVERAGE = "update", "others", "average"
BEFORE, LOCAL_ALONE = "before", "local"
SOURCES = {UPDATE: "own update", OTHERS: "others' (control)", AVERAGE: "average"}
TEXT_SOURCES = {UPDATE: "own update", AVERAGE: "average", BEFORE: "before it"}
ALL_ROUNDS = "all"
ALLOWS_ANY = 0.99
"""An AUC that is no bound anybody would notice."""

OWN, PRIVATE = "own", "private"
WHOSE = {OWN: "own facts", OTHERS: "others' facts", PRIVATE: "own local"}
ABOUT_WHOSE = {
    OWN: "universal answers that only this client trained on",
    OTHERS: "universal answers that only other clients trained on",
    PRIVATE: "this client's local answers",
}
NOTHING, QUESTION = "nothing", "question"
ABOUT_PROMPTS = {NOTHING: "an empty question", QUESTION: "the question, guessed"}

ASSUMPTIONS = (
    "The attacker is the server, honest in the protocol and curious: it has the base model, every "
    "global adapter, every update as it came, the experiment's configuration with the system "
    "prompts that stand in it, and candidates to be told apart. It has none of the clients' data, "
    "which only judge its guesses here.",
    "A chance level of 0.5 is that of a coin. The others' updates are a second one: what they "
    "reach of wordings and local answers is due to how the candidates differ, not to what this "
    "client sent. Of facts the non-members are theirs, so that they lie below 0.5.",
)
NOT_TRIED = (
    "Weights that a malicious server plants before it asks for an update.",
    "Reconstruction of whole texts from a gradient, by inputs whose gradients match (DLG and its "
    "successors) or token by token (DAGER beyond its first step). It needs one plain gradient step "
    "and the batch's size; clients send the sum of many AdamW steps.",
    "Attacks with shadow models that are trained on other data of the kind.",
    "What scores, counts and hashes tell that clients report beside their updates.",
)

Row = Mapping[str, Any]


def group(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by what they have under these keys."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def choose_headline(rows: Iterable[Row], attack: str) -> dict[str, Row]:
    """Return an attack's rows by source.

    Over all rounds where there are several, else of the only one. Empty where the client sent none,
    or where one side has too few.
    """
    rows = [row for row in rows if row["attack"] == attack]
    rounds = ALL_ROUNDS if any(row["rounds"] == ALL_ROUNDS for row in rows) else None
    those = {row["source"]: row for row in rows if rounds in (None, row["rounds"])}
    return those if UPDATE in those and those[UPDATE]["auc"]["value"] is not None else {}


def choose_token_attack(rows: Iterable[Row]) -> str:
    """Return the attack by which tokens are judged: ``input``, where the adapter is low enough."""
    return INPUT if any(row["attack"] == INPUT for row in rows) else OUTPUT


def show_auc(row: Row | None) -> str:
    """Return an AUC in percent with its interval, "" where there is none."""
    if row is None:
        return ""
    auc = row["auc"]
    return format_percent(auc["value"], auc["low"], auc["high"], digits=0)


def exceeding(rows: Iterable[Row], limit: Mapping[str, Any] | None) -> list[Row]:
    """Return the rows whose AUC is above the limit with its whole interval."""
    if limit is None:
        return []
    return [
        row
        for row in rows
        if (row["set"], row["source"]) == (limit["set"], limit["source"])
        and row["auc"]["low"] is not None
        and row["auc"]["low"] > limit["auc"]
    ]


def describe_limit(found: Mapping[str, Any]) -> str:
    """Return a sentence on what the settings allow and what was reached; "" without noise."""
    limit = found.get("limit")
    if not limit:
        return ""
    where = limit["set"], limit["source"]
    rows = [row for row in found["records"] if (row["set"], row["source"]) == where]
    best = max((r["auc"]["value"] for r in rows if r["auc"]["value"] is not None), default=None)
    text = (
        f"privacy.unit {limit['unit']}, epsilon {limit['epsilon']:.3g} at delta "
        f"{limit['delta']:g}: of {SETS[limit['set']]}, by {SOURCES[limit['source']]}, no attack "
        f"may reach an AUC above {100 * limit['auc']:.2f} %"
    )
    if limit["auc"] > ALLOWS_ANY:
        text += ", which allows any"
    if best is None:
        return f"{text}."
    text += f"; the best one reached {100 * best:.1f} %."
    if exceeding(found["records"], limit):
        text += (
            " That is more than may be: either the noise is not what the settings say, or members "
            "and non-members of the set differ by themselves. Look at the others' updates."
        )
    return text
