"""Which round's adapters are a run's result, where validation chooses it (federated.final: best).

After every evaluated round each client reports, of each of its validation sets, the share of right
answers ranked first and of greedy answers that match exactly. A client's score is the mean over its
sets of the mean of both, by which the scale of its local adapter is chosen too; a round's score is
the mean over clients. The highest counts, the earliest of several such. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedlora_app.evaluation.names import ACCURACY, ASKED_SETS, EXACT_MATCH

VALIDATION = "validation"


@dataclass(frozen=True)
class FinalRound:
    """A round, and why its adapters are the run's result."""

    server_round: int
    scores: dict[int, float]
    """Of every evaluated round, 0 to 1; empty where nothing could be compared."""

    def describe(self, last_round: int) -> str:
        """Return why in a sentence."""
        if not self.scores:
            return (
                f"final/ holds round {self.server_round}, the last one: no client has answered its "
                "validation questions in every evaluated round, so none could be chosen."
            )
        score = self.scores[self.server_round]
        told = f"final/ holds round {self.server_round} of {last_round}, which does best on the "
        told += f"validation questions: {score:.3f}"
        if self.server_round == last_round:
            return f"{told}."
        return f"{told}, and {self.scores[last_round]:.3f} in the last round."

    def dump(self, last_round: int) -> dict[str, Any]:
        """Return what the manifest says of it."""
        scores = {str(server_round): score for server_round, score in self.scores.items()}
        return {
            "round": self.server_round,
            "why": self.describe(last_round),
            "validation_scores": scores,
        }


def choose_round(history: Iterable[Mapping[str, Any]], last_round: int) -> FinalRound:
    """Return the best of the evaluated rounds, by the clients that tell of all of them.

    Rounds count from 1 on, and from where every client has come: in one before, a client that came
    later has nothing but its first adapter. One that failed in a round has no say: what it lacks
    there is no worse answer.
    """
    evaluated = [e for e in history if e["phase"] == "evaluate" and e["round"] > 0]
    came = {entry["client"]: entry["round"] for entry in reversed(evaluated)}
    told: dict[int, dict[str, float]] = {}
    for entry in evaluated:
        score = score_client(entry["metrics"])
        if entry["round"] >= max(came.values()) and score is not None:
            told.setdefault(entry["round"], {})[entry["client"]] = score
    clients = set.intersection(*(set(by_client) for by_client in told.values())) if told else set()
    if not clients or last_round not in told:
        return FinalRound(last_round, {})
    scores = {n: fmean(told[n][client] for client in sorted(clients)) for n in sorted(told)}
    return FinalRound(max(scores, key=lambda n: (scores[n], -n)), scores)


def score_client(metrics: Mapping[str, Any]) -> float | None:
    """Return a client's score from what it reports; None where it has no validation questions."""
    by_set = []
    for name in ASKED_SETS:
        keys = (validation_key(name, m.reported) for m in (ACCURACY, EXACT_MATCH))
        values = [metrics[key] for key in keys if key in metrics]
        by_set += [fmean(values)] if values else []
    return fmean(by_set) if by_set else None


def validation_key(question_set: str, figure: str) -> str:
    """Return what a figure of a validation set is called in a client's report."""
    return f"{VALIDATION}/{question_set}_{figure}"
