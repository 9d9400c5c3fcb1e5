"""What evaluated runs got right, with intervals over facts; files of earlier versions included.

An ``evaluation.json`` that counts no facts took questions for independent. Where its rows hold
each answer, the interval is made again; where they only hold how many were right, the answers
about one fact are taken to agree entirely. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora_app.data.questions import UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.evaluated_run import (
    Row,
    chosen_rows,
    fact_of,
    group_rows,
    question_id,
)
from fedlora_app.evaluation.names import (
    MEASURES,
    PASS_RATE,
    QUESTION_SETS,
    Measure,
    base_key,
    figure_key,
    own_answerer,
    shown_measures,
)
from fedlora_app.evaluation.statistics import Estimate, proportion, share_of_facts

Shares = dict[str, dict[str, Estimate]]
"""By measure and question set."""

COUNTS = {"accuracy": "n", "exact_match": "n_generated"}
"""What the rows of a swap table call the number of answers by a measure, else n_<measure>."""


def read_summary(evaluation: Mapping[str, Any], key: str = "summary") -> dict[str, Any]:
    """Return a run's summary with intervals over facts.

    Args:
        key: summary, or summary_chosen_scale.
    """
    summary = {name: {"facts": None} | entry for name, entry in (evaluation[key] or {}).items()}
    if any(entry["facts"] is not None for entry in summary.values()):
        return summary
    scales = {}
    if key != "summary":
        scales = {client: entry["chosen"] for client, entry in evaluation["scales"].items()}
    rows = [r for r in evaluation["questions"] if r["scale"] == scales.get(r["client"], 1.0)]
    for measure in (m for m in shown_measures() if m.passes_above is not None):
        sets = {figure_key(n, measure): _estimate(_select(rows, n), measure) for n in QUESTION_SETS}
        sets[measure.extend(PASS_RATE)] = _pass_rate(evaluation, measure)
        for name, estimate in sets.items():
            # Only what the rows hold all answers of: the pass rate is of full scale alone.
            if estimate.n and summary.get(name, {}).get("value") == estimate.value:
                summary[name] = estimate.dump()
    return summary


def read_shares(evaluation: Mapping[str, Any]) -> dict[str, Shares]:
    """Return what each choice of adapters got right over all clients, at full scale."""
    if "shares" not in evaluation:
        found = {who: _combine(rows, evaluation) for who, rows in group_rows(evaluation).items()}
        own = own_answerer(evaluation["answering"])
        return found | {own: _refine(found.get(own, {}), read_summary(evaluation))}
    shares: dict[str, Shares] = {}
    for row in evaluation["shares"]:
        for measure in (m.name for m in shown_measures() if row[m.name]["n"]):
            by_set = shares.setdefault(row["answered_by"], {}).setdefault(measure, {})
            by_set[row["question_set"]] = Estimate(**row[measure])
    return shares


def read_chosen_shares(evaluation: Mapping[str, Any]) -> Shares:
    """Return what the clients' own adapters got right at the scale that was chosen."""
    summary = read_summary(evaluation, "summary_chosen_scale")
    return _refine(_combine(chosen_rows(evaluation), evaluation), summary)


def read_unknown(evaluation: Mapping[str, Any]) -> tuple[Shares, Shares]:
    """Return what clients get right of the facts that the base model does not know.

    It knows a client's fact if it ranks the right answer first, or says it, in one of the wordings
    of the client's test. Adapters at full scale. Evaluations of old do not say it, and give none.

    Returns:
        By measure, the figures, and which share of the questions is about such facts.
    """
    rows = [row for row in evaluation["questions"] if row["scale"] == 1.0]
    by_base = [base_key(measure) for measure in shown_measures()]
    known = {_client_fact(row) for row in rows if any(map(row.get, by_base))}
    shares: Shares = {}
    extents: Shares = {}
    for measure in shown_measures():
        for name in QUESTION_SETS:
            asked = [row for row in _select(rows, name) if row.get(base_key(measure)) is not None]
            unknown = [row for row in asked if _client_fact(row) not in known]
            if unknown:
                shares.setdefault(measure.name, {})[name] = _estimate(unknown, measure)
            if asked:
                extent = _share([_client_fact(row) not in known for row in asked], asked)
                extents.setdefault(measure.name, {})[name] = extent
    return shares, extents


def _refine(shares: Shares, summary: Mapping[str, Any]) -> Shares:
    """Put a summary's figures, which know every answer, in the place of those of the rows."""
    entries = {
        (measure, name): summary.get(figure_key(name, MEASURES[measure]))
        for measure, by_set in shares.items()
        for name in by_set
    }
    return {
        measure: {
            name: Estimate(**entry) if (entry := entries[measure, name]) and entry["n"] else share
            for name, share in by_set.items()
        }
        for measure, by_set in shares.items()
    }


def _combine(rows: Iterable[Row], evaluation: Mapping[str, Any]) -> Shares:
    """Return the means of clients' rows, for as many questions and facts as were asked."""
    answers: dict[tuple[str, str], list[tuple[str, float, int]]] = {}
    for row in rows:
        for measure in (m.name for m in shown_measures()):
            count = row.get(COUNTS.get(measure, f"n_{measure}"), row["n"])
            if row.get(measure) is not None and count:
                found = answers.setdefault((measure, row["question_set"]), [])
                found.append((row["client"], row[measure], count))
    asked = {name: _select(evaluation["questions"], name) for name in QUESTION_SETS}
    facts = {name: len(set(map(fact_of, found))) for name, found in asked.items()}
    shares: Shares = {}
    for (measure, name), found in answers.items():
        shares.setdefault(measure, {})[name] = pool_shares(name, found, facts[name] or None)
    return shares


def pool_shares(
    question_set: str, found: Sequence[tuple[str, float, int]], facts: int | None
) -> Estimate:
    """Return the mean of clients' shares of right answers, each question counted once.

    Args:
        found: client, share and number of answers; a client may have several.
        facts: how many facts the questions are about, None if that is not known.
    """
    value = sum(share * n for _, share, n in found) / sum(n for *_, n in found)
    asked: dict[str, int] = {}
    for client, _, n in found:
        asked[client] = max(n, asked.get(client, 0))
    count = max if QUESTION_SETS[question_set].is_shared else sum
    num_questions = count(asked.values())
    return share_of_facts(value, num_questions, facts)


def _select(rows: Iterable[Row], question_set: str) -> list[Row]:
    """Return a set's rows; facts that a client never saw are a part of the universal set."""
    is_unseen = question_set == UNIVERSAL_UNSEEN
    asked = UNIVERSAL if is_unseen else question_set
    return [
        row for row in rows if row["question_set"] == asked and (row["is_unseen"] or not is_unseen)
    ]


def _estimate(rows: Iterable[Row], measure: Measure) -> Estimate:
    scored = [row for row in rows if row.get(measure.row_key) is not None]
    return _share([row[measure.row_key] for row in scored], scored)


def _share(outcomes: Sequence[float], rows: Sequence[Row]) -> Estimate:
    ids = [question_id(row["question_set"], row["client"], row["record"]) for row in rows]
    return proportion(outcomes, list(map(fact_of, rows)), ids)


def _client_fact(row: Row) -> tuple[str, str, str]:
    """Return what tells a client's facts apart: each may have an answer of its own to them."""
    return row["question_set"], row["client"], fact_of(row)


def _pass_rate(evaluation: Mapping[str, Any], measure: Measure) -> Estimate:
    key = measure.extend("passed")
    judged = [r for r in evaluation.get("conflicts") or () if r.get(key) is not None]
    return proportion([row[key] for row in judged], [fact_of(row) for row in judged])
