"""What things are called, once: question sets, who answers, and measures; in results and in words.

Needs no torch. Keys of saved results, ``evaluation.json`` and a run's history, are made from the
names here; tables, plots and sentences take their labels from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora_app.config.rounds import BASE, BOTH, adapters_label
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN, Question
from fedlora_app.evaluation import metrics

if TYPE_CHECKING:
    from fedlora_app.evaluation.scoring import Answered


@dataclass(frozen=True)
class QuestionSet:
    """A question set in words."""

    label: str
    heading: str
    """Of a narrow column."""
    is_shared: bool
    """Every client is asked the same questions."""


QUESTION_SETS = {
    UNIVERSAL: QuestionSet("universal", "universal", True),
    UNIVERSAL_UNSEEN: QuestionSet("universal, never seen", "never seen", True),
    LOCAL_SET: QuestionSet("local", "local", False),
    CONFLICT: QuestionSet("conflict", "conflict", True),
}
"""In the order of tables. Facts that a client never saw are a part of the universal set."""
ASKED_SETS = (UNIVERSAL, LOCAL_SET, CONFLICT)
"""Those that have a file of their own."""
OWN_SETS = (LOCAL_SET, CONFLICT)
"""Those whose answers are a client's own."""
PASS_RATE, LEAKAGE, SPECIFICITY = "conflict_pass_rate", "leakage", "specificity"
CHANCE, FACT_EACH, UNSEEN_EACH = "rank_chance", "fact_each", "unseen_each"
"""What clients report of their questions: how often a guess is right, and about which records."""
PASS_HEADING = "every client right"
"""Of a narrow column, or in a line."""


@dataclass(frozen=True)
class Measure:
    """One measure of an answer.

    ``name`` is its key in the rows of ``evaluation.json``; with a question set before it, in the
    summary.
    """

    name: str
    label: str
    compute: Callable[[Question, Answered], float | bool | None]
    """What an answer is worth, higher for a better one; None where that cannot be told."""
    passes_above: float | None = None
    """An answer passes above this value; None: there is no passing, and means are shown."""
    is_shown: bool = True
    """In summaries, tables and comparisons; else in rows only."""
    is_variant: bool = False
    """Another way of a measure before it, which stands in summaries alone."""
    suffix: str | None = None
    """What follows a derived figure's name, as in leakage_exact_match; by default _<name>."""
    question_key: str = ""
    reported: str = ""
    """What clients call it in a run's history; "" where they report none."""
    reported_each: str = ""
    """Likewise for one verdict per conflict record."""

    @property
    def row_key(self) -> str:
        """Its key in a question's row."""
        return self.question_key or self.name

    def extend(self, figure: str) -> str:
        """Return what a figure, such as "leakage", is called by this measure."""
        return figure + (f"_{self.name}" if self.suffix is None else self.suffix)


ACCURACY = Measure(
    "accuracy",
    "ranked first",
    metrics.margin,
    passes_above=0,
    suffix="",
    question_key="correct",
    reported="rank_accuracy",
    reported_each="ranked_first_each",
)
PER_BYTE = Measure(
    "accuracy_per_byte",
    "per byte",
    metrics.margin_per_byte,
    passes_above=0,
    is_variant=True,
    suffix="_per_byte",
    reported="rank_accuracy_per_byte",
)
PMI = Measure(
    "accuracy_pmi",
    "PMI",
    metrics.margin_pmi,
    passes_above=0,
    is_variant=True,
    suffix="_pmi",
    reported="rank_accuracy_pmi",
)
EXACT_MATCH = Measure(
    "exact_match",
    "greedy answer exact",
    metrics.exact_match,
    passes_above=0,
    reported="exact_match",
    reported_each="exact_match_each",
)
SEMANTIC = Measure(
    "accuracy_semantic",
    "meant",
    metrics.margin_semantic,
    passes_above=0,
    is_variant=True,
    suffix="_semantic",
)
ROUGE_L = Measure("rouge_l", "ROUGE-L", metrics.rouge_l, is_shown=False)
KEYWORD = Measure("keyword", "keyword rule", metrics.keyword, passes_above=0, is_shown=False)

MEASURES = {
    measure.name: measure
    for measure in (ACCURACY, PER_BYTE, PMI, EXACT_MATCH, SEMANTIC, ROUGE_L, KEYWORD)
}
"""All measures; one more entry is one more measure."""


def shown_measures(*, with_variants: bool = False) -> list[Measure]:
    """Return the measures that summaries, tables and comparisons hold."""
    return [m for m in MEASURES.values() if m.is_shown and (with_variants or not m.is_variant)]


def leading_measure(num_open: int, num_answers: int) -> Measure:
    """Return what a question set is judged by first.

    Exact match, unless most of its right answers are open: cut, long or free (``gold``). Then it
    is the ranking, and by the raw sum: among candidates of like length (``data.distractors``) it
    agrees with the mean per byte, and PMI says little about candidates on one matter.
    """
    return ACCURACY if 2 * num_open > num_answers else EXACT_MATCH


FIGURES = {
    PASS_RATE: "conflict, every client",
    CONFLICT: "conflict, each client",
    LOCAL_SET: QUESTION_SETS[LOCAL_SET].label,
    UNIVERSAL: QUESTION_SETS[UNIVERSAL].label,
    UNIVERSAL_UNSEEN: QUESTION_SETS[UNIVERSAL_UNSEEN].label,
    **{
        figure if name == LOCAL_SET else f"{figure}_{name}": f"{figure}, {name}"
        for figure in (LEAKAGE, SPECIFICITY)
        for name in OWN_SETS
    },
}
"""The figures of a summary in the order of tables: question sets and what is derived from them."""


def figure_key(figure: str, measure: Measure) -> str:
    """Return a figure's key in a summary by one measure."""
    return f"{figure}_{measure.name}" if figure in QUESTION_SETS else measure.extend(figure)


def base_key(measure: Measure) -> str:
    """Return the key, in a question's row, of what the base model's own answer is worth."""
    return f"{BASE}_{measure.row_key}"


OWN_PAIR = f"{adapters_label(BOTH)}:own"
ANSWERERS = {
    BASE: "base model",
    GLOBAL: "global alone",
    f"{LOCAL}:own": "own local alone",
    OWN_PAIR: "global + own local",
    f"{adapters_label(BOTH)}:foreign": "global + foreign local",
    f"{LOCAL}:foreign": "foreign local alone",
}
"""Who answers, as seen from the client that is asked, in the order of tables."""


def own_answerer(answering: str) -> str:
    """Return who answers where these adapters ("global+local") are the client's own."""
    return f"{answering}:own" if LOCAL in answering else answering


def relative_label(row: Mapping[str, Any]) -> str:
    """Return who answers, with "own" or "foreign" in the place of the client's name."""
    adapters, separator, owner = row["adapters"].partition(":")
    if not separator:
        return adapters
    return f"{adapters}:{'own' if owner == row['client'] else 'foreign'}"
