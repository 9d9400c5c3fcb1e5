"""How questions went: what every measure says of each, and the means over a set.

Input: questions and what a model said to them (``scoring``). No measure runs the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedlora_app.data.questions import Question
from fedlora_app.evaluation.answering import OPEN_ABOVE
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    MEASURES,
    PER_BYTE,
    PMI,
    Measure,
)

if TYPE_CHECKING:
    from fedlora_app.evaluation.scoring import Answered


@dataclass(frozen=True)
class Score:
    """How one question went: ``values`` by measure, None where it could not be taken.

    ``openness`` is how sure the gate was that the question is the client's own.
    """

    values: Mapping[str, float | bool | None]
    generated: str
    log_likelihoods: tuple[float, ...] = ()
    openness: float | None = None

    def value(self, measure: Measure) -> float | bool | None:
        """Return what a measure says, a margin for instance."""
        return self.values[measure.name]

    def outcome(self, measure: Measure) -> float | bool | None:
        """Return whether the answer passes, or the value of a measure that has no threshold."""
        value = self.values[measure.name]
        if value is None or measure.passes_above is None:
            return value
        return value > measure.passes_above


def score_answer(question: Question, answered: Answered) -> Score:
    """Compare what the model made of a question with its right answer."""
    values = {name: measure.compute(question, answered) for name, measure in MEASURES.items()}
    likelihoods = tuple(answered.log_likelihoods)
    return Score(values, answered.generated, likelihoods, answered.openness)


def compute_interaction(
    own: Mapping[str, float], other: Mapping[str, float], own_answer: str, other_answer: str
) -> float:
    """Return [ll_i(a_i) - ll_i(a_j)] - [ll_j(a_i) - ll_j(a_j)], in nats.

    The priors of question and answers cancel: above 0, client i leans more to its own answer
    than client j does.

    Args:
        own, other: the log-likelihoods of the answers at clients i and j.
        own_answer, other_answer: a_i and a_j.
    """
    difference = own[own_answer] - own[other_answer]
    return difference - (other[own_answer] - other[other_answer])


def collect_outcomes(scores: Iterable[Score], measure: Measure) -> list[float | bool]:
    """Return a measure's outcomes where it could be taken."""
    return [o for score in scores if (o := score.outcome(measure)) is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is there; None if nothing is."""
    present = [float(value) for value in values if value is not None]
    return fmean(present) if present else None


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """Return the means over a question set as a client reports them; empty for an empty one.

    Only these names may travel: the server knows which metrics a client reports.
    """
    if not scores:
        return {}
    summary: dict[str, float] = {"n": len(scores)}
    gated = [score.openness > OPEN_ABOVE for score in scores if score.openness is not None]
    if gated:
        summary["gate_open"] = _sum_mean(gated)
    matched = collect_outcomes(scores, EXACT_MATCH)
    if matched:
        summary[EXACT_MATCH.reported] = _sum_mean(matched)
    ranked = collect_outcomes(scores, ACCURACY)
    if ranked:
        margins = [m for score in scores if (m := score.value(PER_BYTE)) is not None]
        summary |= {
            "n_ranked": len(ranked),
            ACCURACY.reported: _sum_mean(ranked),
            PER_BYTE.reported: _sum_mean(collect_outcomes(scores, PER_BYTE)),
            "margin_per_byte": _sum_mean(margins),
        }
        if by_pmi := collect_outcomes(scores, PMI):
            summary[PMI.reported] = _sum_mean(by_pmi)
    return summary


def _sum_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # not fmean, whose last bit may differ from saved histories
