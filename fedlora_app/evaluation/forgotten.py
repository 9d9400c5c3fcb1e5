"""What changes with a client that is taken out of a run: both runs' answers, side by side.

Input: the run as it was with its questions, and the run that was made without the client. This one
does not know the client, so its questions are put to the new global adapter alone, by the old run's
configuration. Nothing is written into the old run.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, Question
from fedlora_app.evaluation.choices import Evaluator, Report, SavedRound, open_store
from fedlora_app.evaluation.names import EXACT_MATCH, MEASURES, QUESTION_SETS, Measure
from fedlora_app.evaluation.protocol import core_cells, find_leading
from fedlora_app.evaluation.statistics import Estimate
from fedlora_app.evaluation.summary import Pairs, Scores, average, compute_difference
from fedlora_app.foundation.percent import format_n, format_percent
from fedlora_app.foundation.terminal import WIDTH, render_table
from fedlora_app.runs.reading import SavedRun

FORMAT = 1
ALONE, OWN = "global_alone", "own_adapters"
BEFORE, AFTER, CHANGE = "before", "after", "change"

Row = dict[str, Any]


@dataclass(frozen=True)
class Topic:
    """Some questions of a set."""

    question_set: str
    of_forgotten_alone: bool = False
    """Only those about facts that no other client was trained on."""

    @property
    def heading(self) -> str:
        """What the questions are, for a narrow column."""
        heading = QUESTION_SETS[self.question_set].heading
        return f"{heading}, own" if self.of_forgotten_alone else heading


TOPICS = (
    Topic(LOCAL_SET),
    Topic(CONFLICT),
    Topic(UNIVERSAL),
    Topic(UNIVERSAL, of_forgotten_alone=True),
)


def measure_change(
    before: SavedRound, new: SavedRun, client: str, report: Report
) -> dict[str, Any]:
    """Ask both runs the test questions, and return what ``forgetting.json`` holds.

    Args:
        before: the run as it was.
        new: the run without the client.
        report: called with the progress.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    after = _open_without(before, new, client)
    cells = [cell for cell in core_cells(before) if cell.answering.adapters]
    alone = before.alone(client)
    both = [cell for cell in cells if cell.client != client or cell.answering == alone]
    store = open_store(before, new.paths.partial_evaluation)
    evaluator = Evaluator(before, store, report)
    leading = find_leading(before, evaluator.model.load()[0].tokenizer)
    old = _Answers(before, evaluator.evaluate(cells))
    answers = old, _Answers(after, Evaluator(after, store, report).evaluate(both))
    store.remove()
    return {
        "format": FORMAT,
        "client": client,
        "runs": {BEFORE: before.run.name, AFTER: new.name},
        "round": before.server_round,
        "rows": list(_rows(*answers, client, leading)),
    }


def _open_without(before: SavedRound, new: SavedRun, client: str) -> SavedRound:
    """Return the new run's round with the old configuration, which knows the client.

    Of the forgotten client it has no local adapter.
    """
    run = SavedRun(new.path, before.run.config, new.manifest)
    others = {k: v for k, v in before.hashes.items() if not k.endswith(f":{client}")}
    hashes = others | {GLOBAL: run.adapter_sha256(before.server_round)}
    return replace(before, run=run, hashes=hashes)


@dataclass(frozen=True)
class _Answers:
    """How the questions went in one of the runs."""

    saved: SavedRound
    scores: Scores

    def find(
        self, who: str, client: str, topic: Topic, is_asked: Callable[[Question], bool]
    ) -> Pairs:
        """Return the questions of a topic, and how they went; empty where they were not asked.

        Args:
            who: ``ALONE`` or ``OWN``.
        """
        answering = self.saved.alone(client) if who == ALONE else self.saved.own(client)
        wanted = client, topic.question_set, answering
        for cell, scores in self.scores.items():
            if (cell.client, cell.question_set, cell.answering) == wanted:
                pairs = zip(cell.questions, scores, strict=True)
                return [pair for pair in pairs if is_asked(pair[0])]
        return []


def _rows(
    before: _Answers, after: _Answers, client: str, leading: Mapping[str, str]
) -> Iterator[Row]:
    facts = {
        name: {record.fact for record in files.universal.records if record.fact}
        for name, files in before.saved.files.items()
    }
    known = set().union(*(found for name, found in facts.items() if name != client))
    only = facts[client] - known
    who = [ALONE] if before.saved.own(client) == before.saved.alone(client) else [ALONE, OWN]
    others = [name for name in before.saved.clients if name != client]
    for asked, clients in ((client, [client]), (None, others)):
        for topic in TOPICS:

            def is_asked(question: Question, narrow: bool = topic.of_forgotten_alone) -> bool:
                return question.fact in only or not narrow

            measure = MEASURES[leading.get(topic.question_set, EXACT_MATCH.name)]
            found = {
                name: [
                    (c, *(run.find(name, c, topic, is_asked) for run in (before, after)))
                    for c in clients
                ]
                for name in who
            }
            if any(pairs for _, pairs, _ in found[ALONE]):
                yield {
                    "asked": asked,
                    "question_set": topic.question_set,
                    "of_forgotten_alone": topic.of_forgotten_alone,
                    "measure": measure.name,
                    **{k: _compare(v, topic.question_set, measure) for k, v in found.items()},
                }


def _compare(
    asked: list[tuple[str, Pairs, Pairs]], name: str, measure: Measure
) -> dict[str, Row | None]:
    """Return a set's share of right answers before and after, and the paired difference."""
    sides = [[(name, client, pairs[i]) for client, *pairs in asked] for i in range(2)]
    old, new = (average(side, measure) for side in sides)
    if not new.n:
        return {BEFORE: old.dump(), AFTER: None, CHANGE: None}
    change = compute_difference(((c, ours, [theirs]) for c, theirs, ours in asked), name, measure)
    return {BEFORE: old.dump(), AFTER: new.dump(), CHANGE: change.dump()}


def describe_change(change: Mapping[str, Any]) -> str:
    """Return the table of what changed, 100 columns wide and without colour."""
    client, rows = change["client"], change["rows"]
    title = f"% right before and after {client} is forgotten, with the change's 95 % interval"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("asked", overflow="fold")
    topics = [Topic(row["question_set"], row["of_forgotten_alone"]) for row in rows]
    widest = max((len(topic.heading) for topic in topics), default=0)
    table.add_column("questions", min_width=widest)
    table.add_column("n/facts", justify="right", no_wrap=True)
    shown = [who for who in (ALONE, OWN) if any(who in row for row in rows)]
    labels = {ALONE: "global\nalone", OWN: "own\nadapters"}
    for who in shown:
        for heading in (labels[who], CHANGE):
            table.add_column(heading, justify="right", no_wrap=True)
    for row, topic in zip(rows, topics, strict=True):
        count = row[ALONE][BEFORE]
        cells = [text for who in shown for text in _write(row[who])]
        asked = row["asked"] or "others"
        table.add_row(asked, topic.heading, format_n(count["n"], count["facts"]), *cells)
    measures = {QUESTION_SETS[r["question_set"]].heading: r["measure"] for r in rows}
    lines = [render_table(table)]
    if own := next((topic.heading for topic in topics if topic.of_forgotten_alone), ""):
        lines.append(f"{own}: about facts that no other client than {client} was trained on.")
    counted = "; ".join(f"{name}: {MEASURES[m].label}" for name, m in measures.items())
    lines.append(f"What counts as right: {counted}.")
    return "\n".join([lines[0], *(textwrap.fill(line, WIDTH) for line in lines[1:])])


def _write(found: Mapping[str, Row | None]) -> tuple[str, str]:
    values = [_percent(found[side], with_interval=False) or "-" for side in (BEFORE, AFTER)]
    return " -> ".join(values), _percent(found[CHANGE], sign="+")


def _percent(row: Row | None, sign: str = "", *, with_interval: bool = True) -> str:
    if row is None:
        return ""
    found = Estimate(**row)
    interval = (found.low, found.high) if with_interval else ()
    return format_percent(found.value, *interval, digits=None, sign=sign)
