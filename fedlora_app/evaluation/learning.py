"""Whether a run has learned anything that its questions show, and where its training loss goes.

From the run's history alone. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from fedlora_app.config.rounds import BASE
from fedlora_app.config.schema import Config
from fedlora_app.evaluation.chance import describe_chance, find_reported_chances
from fedlora_app.evaluation.names import (
    ACCURACY,
    EXACT_MATCH,
    QUESTION_SETS,
    Measure,
)
from fedlora_app.evaluation.reported import (
    Reports,
    collect_reports,
    describe_run,
    find_reported_leading,
    sort_labels,
)
from fedlora_app.evaluation.reported_shares import estimate_share, pair_answers
from fedlora_app.evaluation.statistics import SIGNIFICANT, flip_signs, over_seeds
from fedlora_app.foundation.percent import format_percent
from fedlora_app.runs.history import until_round

Trend = Literal["falling", "flat", "rising", "undefined"]
LOSS, FINAL_LOSS = "/train_loss", "/final_train_loss"
HEADLINES: dict[Trend | None, str] = {
    "falling": "Nothing was learned yet, and the training loss is still falling.",
    "flat": "Nothing was learned, and the training loss is flat.",
    "rising": "Nothing was learned, and the training loss is rising.",
    "undefined": "Nothing was learned: the training loss is not a number.",
    None: "Nothing was learned that the questions show.",
}
ADVICE: dict[Trend | None, str] = {
    "falling": (
        "More rounds (num-rounds), more epochs or a higher training.learning_rate go on from there."
    ),
    "flat": (
        "More of the same will not help: try another training.learning_rate, or adapters of a "
        "higher rank."
    ),
    "rising": "Try a lower training.learning_rate.",
    "undefined": "Try a lower training.learning_rate.",
    None: "More rounds (num-rounds) tell more.",
}
LEARNED_OTHERS = (
    "What clients train on they have learned, so the test questions ask for something else: "
    "fedlora check finds test answers that nobody trains on."
)


@dataclass(frozen=True)
class Loss:
    """Where the training loss went: the means over clients and phases of two rounds."""

    trend: Trend | None
    """None where one round tells none."""
    first: float
    last: float
    has_fallen: bool
    """The second half of the rounds lies below the first one, by Student's interval likewise."""
    is_of_one_round: bool = False

    def describe(self) -> str:
        """Return the loss in a sentence."""
        if self.trend == "undefined":
            return "The training loss is not a number."
        told = f"{self.last:.3g} nats per answer token"
        if self.trend is None:
            return f"The training loss is {told} after one round, which tells no trend."
        trend = f"The training loss is {'still ' * (self.trend == 'falling')}{self.trend}"
        if self.is_of_one_round:
            return f"{trend}: {told} in the one round that trained."
        return f"{trend}: {told} in the last round, {self.first:.3g} in the first."


@dataclass(frozen=True)
class NothingLearned:
    """That clients answer no question set better than the base model, in words."""

    headline: str
    sentence: str


def find_nothing_learned(history: Sequence[Mapping[str, Any]]) -> NothingLearned | None:
    """Return that nothing was learned; None where something was, or where that is not known.

    Something was learned where the answers to a question set match word for word more often than
    the base model's (its share lies below their interval), for nobody does that by chance; or where
    they rank the right answer first more often, by the test that flips the signs of whole facts,
    which also decides about matches where their share has no interval and the base has some.
    """
    reports = collect_reports(list(history))
    labels = sort_labels(reports)
    if len(labels) < 2 or labels[0] != BASE:
        return None
    own = labels[-1]
    if any(
        _is_better(reports, own, name, measure)
        for name in QUESTION_SETS
        for measure in (EXACT_MATCH, ACCURACY)
    ):
        return None
    loss = find_loss(history)
    trend = loss.trend if loss else None
    knows_others = loss is not None and loss.has_fallen and trend == "flat"
    sentences = (
        f"No question set is answered better than by the base model: {_compare(reports, own)}.",
        loss.describe() if loss else "",
        LEARNED_OTHERS if knows_others else ADVICE[trend] if loss else "",
    )
    return NothingLearned(HEADLINES[trend], " ".join(filter(None, sentences)))


def describe_end(
    history: list[dict[str, Any]], config: Config, final: Mapping[str, Any] | None = None
) -> str:
    """Return what a finished run prints before its last line.

    Args:
        final: what the manifest says of the round that was chosen, if one was.
    """
    if final is not None:
        history = until_round(history, final["round"])
    table = describe_run(history)
    sample = config.evaluation.sample
    if sample and BASE in sort_labels(collect_reports(history)):
        table += (
            f"\nThe base model's figures are of at most {sample} questions of each set "
            "(evaluation.sample); fedlora evaluate asks it all of them."
        )
    table += f"\n{final['why']}" if final else ""
    if (nothing := find_nothing_learned(history)) is not None:
        return f"{table}\n{nothing.headline} {nothing.sentence}"
    if config.federated.mode != "dual":
        return table
    return (
        f"{table}\nTo see what one averaged adapter makes of the same work, run it with "
        "mode='fedavg' in --run-config, or with fedlora train --mode fedavg."
    )


def find_loss(history: Sequence[Mapping[str, Any]]) -> Loss | None:
    """Return where the training loss goes, None where none is recorded.

    By the relative changes from round to round in the second half of the run, of every client
    and phase: it is falling or rising where Student's interval of their mean tells that from none.
    After one round by those from a phase's mean loss to that of its last step.
    """
    series: dict[tuple[str, str], dict[int, float]] = {}
    for entry in history:
        for name, value in entry["metrics"].items():
            if name.startswith("train_") and name.endswith(LOSS):
                series.setdefault((entry["client"], name), {})[entry["round"]] = float(value)
    losses = [[by_round[number] for number in sorted(by_round)] for by_round in series.values()]
    if not losses:
        return None
    first, last = (fmean(values[end] for values in losses) for end in (0, -1))
    if not all(math.isfinite(value) and value > 0 for values in losses for value in values):
        return Loss("flat" if math.isfinite(last) else "undefined", first, last, False)
    late = [change for values in losses for change in _changes(values[(len(values) - 1) // 2 :])]
    late = late or _changes_within(history)
    whole = [math.log(v / values[0]) for values in losses for v in values[(len(values) + 1) // 2 :]]
    trends: dict[int, Trend] = {-1: "falling", 0: "flat", 1: "rising"}
    trend = trends[_sign(late)] if whole or _sign(late) < 0 else None
    return Loss(trend, first, last, _sign(whole) < 0, not whole)


def _is_better(reports: Reports, own: str, question_set: str, measure: Measure) -> bool:
    """Return whether the clients' adapters do better on a question set than the base model."""
    ours, base = (estimate_share(reports, who, question_set, measure) for who in (own, BASE))
    if not ours.n or not base.n or ours.value <= base.value:
        return False
    is_exact = measure is EXACT_MATCH
    if is_exact and (ours.low is not None or base.value == 0):
        return base.value == 0 or ours.low > base.value
    ones, others, facts = pair_answers(reports, (own, BASE), question_set, measure)
    if not facts:  # histories of earlier versions
        return is_exact or (None not in (ours.low, base.low) and ours.differs_from(base) > 0)
    return sum(ones) > sum(others) and flip_signs(ones, others, facts) < SIGNIFICANT


def _compare(reports: Reports, own: str) -> str:
    """Return "conflict 0 % (base 0 %), local ranked first 30 % (base 28 %, chance 25 %)"."""
    chances = find_reported_chances(reports)
    parts = []
    for name, question_set in QUESTION_SETS.items():
        leads = find_reported_leading(reports, name)
        shares = [estimate_share(reports, who, name, leads) for who in (own, BASE)]
        if all(share.n for share in shares):
            ours, base = (format_percent(s.value, digits=None, unit=" %") for s in shares)
            is_ranked = leads is ACCURACY
            by_chance = describe_chance(chances, name, lead=", ") * is_ranked
            label = f"{question_set.heading}{f' {ACCURACY.label}' * is_ranked}"
            parts.append(f"{label} {ours} (base {base}{by_chance})")
    return ", ".join(parts)


def _changes(values: Sequence[float]) -> list[float]:
    """Return the logarithms of the ratios of each value to the one before it."""
    return [math.log(b / a) for a, b in pairwise(values)]


def _changes_within(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return by how much the loss of each phase's last step differs from the phase's mean."""
    pairs = (
        (value, entry["metrics"].get(name.replace(LOSS, FINAL_LOSS)))
        for entry in history
        for name, value in entry["metrics"].items()
        if name.startswith("train_") and name.endswith(LOSS)
    )
    return [math.log(final / mean) for mean, final in pairs if final and final > 0]


def _sign(changes: Sequence[float]) -> int:
    """Return 1 or -1 where the mean of changes differs from none, or the one change there is."""
    if not changes:
        return 0
    mean = over_seeds(changes)
    low, high = (mean.value, mean.value) if mean.low is None else (mean.low, mean.high)
    return (low > 0) - (high < 0)
