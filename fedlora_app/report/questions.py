"""Single questions on a page, with what every client answered and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.gate_report import BLAMED
from fedlora_app.evaluation.names import ACCURACY, EXACT_MATCH, KEYWORD, Measure
from fedlora_app.report.parts import Plotter, Section
from fedlora_app.runs.partial import PartialRun

MOST_BYTES = 4_000_000  # of conflict questions on a page; the others stand in evaluation.json
MOST_BYTES_WRONG = 1_000_000  # likewise of wrong answers to universal ones
MOST_CHARACTERS = 400  # of one answer
ROW_BYTES = 300  # of markup around the answers of one client
UNMEASURED = "unmeasured"


def show_conflicts(run: PartialRun, plotter: Plotter) -> Section:
    """Return the section of the conflict questions, each with every client's answer."""
    section = Section("conflicts", "Conflict questions")
    if run.evaluation is None:
        section.text.append(
            "Each question with every client's answer stands here after: "
            f"fedlora evaluate {run.reference}"
        )
        return section
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in run.evaluation["questions"]:
        if row["question_set"] == CONFLICT:
            rows.setdefault(row["record"], {}).setdefault(row["client"], row)
    if not rows:
        section.text.append("This run has no conflict questions.")
        return section
    leads = find_leading(run.evaluation, CONFLICT)
    questions = [_describe_question(by_client, leads) for by_client in rows.values()]
    questions.sort(key=lambda question: question["status"] == "passed")  # failed ones first
    section.questions = list(_take_what_fits(questions, MOST_BYTES))
    num_shown = len(section.questions)
    section.clients = sorted({client for by_client in rows.values() for client in by_client})
    section.text.append(
        "One question, another right answer for each client. Log-likelihoods are sums over the "
        "answer's tokens. "
        + (
            "Passed is an own answer that is ranked first, as most right answers are long or free."
            if leads is ACCURACY
            else "Passed is a word-for-word answer; where none was generated or asked for, the "
            "keyword rule decides, and else the ranking."
        )
        + (
            " A wrong answer is due to the gate where that stayed closed, and else to the local "
            "adapter."
            if any(row.get("failed") for by_client in rows.values() for row in by_client.values())
            else ""
        )
    )
    if len(questions) > num_shown:
        section.text.append(
            f"{num_shown} of {len(questions)} questions are shown, failed ones first; "
            "evaluation.json holds all of them."
        )
    return section


def list_wrong(
    evaluation: Mapping[str, Any], question_set: str
) -> tuple[list[dict[str, Any]], int]:
    """Return a set's wrong answers of gated pairs as far as they fit, and how many there are.

    By question, with the clients that are wrong; those that a gate is to blame for come first.
    """
    leads = find_leading(evaluation, question_set)
    rows: dict[int, dict[str, dict[str, Any]]] = {}
    for row in evaluation["questions"]:
        if row["question_set"] == question_set and row["scale"] == 1.0 and row.get("failed"):
            rows.setdefault(row["record"], {}).setdefault(row["client"], row)
    questions = [_describe_question(by_client, leads) for by_client in rows.values()]
    questions.sort(key=lambda q: all(answer["failed"] != "gate" for answer in q["answers"]))
    shown = list(_take_what_fits(questions, MOST_BYTES_WRONG))
    return shown, sum(map(len, rows.values()))


def _take_what_fits(questions: list[dict[str, Any]], room: int) -> Iterator[dict[str, Any]]:
    """Yield questions while there is room on the page, and the first in any case."""
    for number, question in enumerate(questions):
        texts = (text for answer in question["answers"] for text in answer.values())
        room -= sum(len(text.encode(errors="replace")) for text in texts)
        room -= ROW_BYTES * len(question["answers"])
        if room < 0 and number:
            return
        yield question


def _describe_question(by_client: Mapping[str, dict[str, Any]], leads: Measure) -> dict[str, Any]:
    answers = [_describe_answer(client, row, leads) for client, row in sorted(by_client.items())]
    found = {answer["status"] for answer in answers}
    order = ("failed", UNMEASURED, "passed")
    status = next(status for status in order if status in found)
    return {
        "text": _cut(next(iter(by_client.values()))["instruction"]),
        "status": status,
        "mark": {UNMEASURED: "not measured"}.get(status, status),
        "answers": answers,
    }


def _describe_answer(client: str, row: Mapping[str, Any], leads: Measure) -> dict[str, Any]:
    order = (leads, EXACT_MATCH, KEYWORD, ACCURACY)
    candidates, values = row["candidates"], row["scores"]["log_likelihoods"]
    ranked = sorted(zip(values, candidates, strict=True), reverse=True)
    own = next((value for value, text in ranked if text == row["gold"]), None)
    other = next(((value, text) for value, text in ranked if text != row["gold"]), None)
    verdicts = (row[measure.row_key] for measure in dict.fromkeys(order))
    passed = next((verdict for verdict in verdicts if verdict is not None), None)
    return {
        "client": client,
        "status": {None: UNMEASURED, True: "passed", False: "failed"}[passed],
        "gold": _cut(row["gold"] or "(by keywords)"),
        "failed": BLAMED.get(row.get("failed") or "", ""),
        "said": _cut(row["generated"] if row["generated"] is not None else "(not generated)"),
        "own": "" if own is None else f"{own:.2f}",
        "rival": "" if other is None else _cut(other[1]),
        "other": "" if other is None else f"{other[0]:.2f}",
    }


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
