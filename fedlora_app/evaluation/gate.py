"""A gate before the local adapter: whether a question is one of the client's own.

Where it opens, the global and the local adapter answer together; where it stays closed, the global
one answers alone. So what a client trains into its local adapter costs the shared one nothing.

The gate compares the base model's view of a question (``prompt_features``) with the client's own
training questions: by cosine, after the directions in which wordings of one and the same fact
differ have been held down (within-class covariance normalisation: Hatch et al. 2006,
https://doi.org/10.21437/Interspeech.2006-183). It opens where the nearest local question is near
enough for how near the nearest universal one is: a logistic regression on these two similarities,
fitted to held-out wordings, and, so that what the client knows nothing of goes to the global
adapter, to the same questions with their own fact taken away. It stays closed for a question with a
token that speaks against it (``foreign_tokens``).

Where the data hold no second wordings, all local and all universal questions are one group each.
That tells kinds of questions apart and not facts, so it is of use where the nearest neighbours of
every fact are of its own kind (``GateFigures.purity``).

``gate_fit`` makes one from a client's data, where it is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

import torch

from fedlora_app.evaluation.answering import OPEN_ABOVE
from fedlora_app.evaluation.combiner import GLOBAL_ALONE, WHOLE_PAIR, Combiner, Weights
from fedlora_app.evaluation.feature_space import Space
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.model.adapters import AdaptedModel

Features = tuple[torch.Tensor, ...]
"""(N, D) for every feature."""


@dataclass(frozen=True)
class GateFigures:
    """How well a gate separates the client's own training questions, each share in [0, 1].

    Cross-validated: by wording where it compares facts, by fact where it compares kinds. But for
    the regression's three numbers and the tokens' limit, which are fitted to the same questions.
    """

    by_fact: bool
    """It compares a question with every fact, and not with each kind as a whole."""
    purity: float
    """Of the facts nearest to each fact, how many are of its own kind: 1 where local and universal
    questions differ in kind, near one half where only their entities do."""
    opens_for_local: float | None
    """Local questions that it opens for; None where nothing of them could be held out: it compares
    kinds and there is one local fact."""
    closes_for_universal: float | None
    """Universal questions that it stays closed for; None where none could be held out: it compares
    facts and none has a second wording, or kinds and there is one fact."""
    closes_for_unknown: float | None = None
    """Universal questions that it stays closed for without the training questions about their
    fact; None where it compares kinds."""

    def metrics(self) -> dict[str, float]:
        """Return them as metrics of a client."""
        return {f"gate/{k}": float(v) for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Gate(Combiner):
    """Opens for questions that are nearer to the client's local than to its universal ones.

    All tensors are fp32, as they are kept on disk. ``means`` (G, D) per feature are the unit
    vectors of the groups that ``is_local`` (G,) tells the kind of; ``coefficients`` (3,) weigh the
    similarities to the nearest local and universal group, and 1. Below the similarity ``floor`` ()
    to local questions it stays closed, and for the tokens ``foreign`` (T,), int64 in ascending
    order.
    """

    spaces: tuple[Space, ...]
    means: Features
    is_local: torch.Tensor
    coefficients: torch.Tensor
    floor: torch.Tensor
    foreign: torch.Tensor
    figures: GateFigures
    system_prompt: str = ""
    """The client's own, under which questions are judged whatever prompt they are asked with."""
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def find_weights(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[Weights]:
        """Return the whole pair's weights where it opens, and those of global alone elsewhere."""
        return [WHOLE_PAIR if own else GLOBAL_ALONE for own in self.weigh(model, prompts).tolist()]

    def find_openness(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[float]:
        """Return how sure it is that each prompt is the client's own, in [0, 1]."""
        return self.compute_openness(model, prompts).tolist()

    def weigh(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return the factor of each prompt's local adapter, (B,): 1 where it answers, or 0."""
        return (self.compute_openness(model, prompts) > OPEN_ABOVE).float()

    def compute_openness(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return how sure the gate is that each prompt is the client's own, (B,) in [0, 1]."""
        missing = [
            list(ids) for ids in dict.fromkeys(map(tuple, prompts)) if ids not in self._known
        ]
        if missing:
            values = self.judge(compute_features(model, missing), missing).tolist()
            self._known.update(zip(map(tuple, missing), values, strict=True))
        return torch.tensor([self._known[tuple(ids)] for ids in prompts])

    def judge(self, features: Features, prompts: Sequence[Collection[int]]) -> torch.Tensor:
        """Return how sure the gate is that questions are the client's own, (N,) in [0, 1].

        Args:
            prompts: the tokens of each.
        """
        similarities = compare(self.spaces, self.means, features)
        nearest = find_nearest(similarities, self.is_local)
        is_near = nearest[:, 0] >= self.floor
        foreign = set(self.foreign.tolist())
        is_free = torch.tensor([foreign.isdisjoint(prompt) for prompt in prompts])
        return torch.sigmoid(find_log_odds(nearest, self.coefficients)) * is_near * is_free


def compare(spaces: Sequence[Space], means: Features, features: Features) -> torch.Tensor:
    """Return similarities (N, G) in [-1, 1], the features' mean."""
    parts = [
        space.project(feature) @ mean.T.double()
        for space, mean, feature in zip(spaces, means, features, strict=True)
    ]
    return torch.stack(parts).mean(0)


def find_nearest(similarities: torch.Tensor, is_local: torch.Tensor) -> torch.Tensor:
    """Return the similarity to the nearest local and to the nearest universal group, (N, 2)."""
    kinds = [similarities[:, is_local], similarities[:, ~is_local]]
    return torch.stack([kind.max(1).values for kind in kinds], dim=1)


def find_log_odds(nearest: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Return how sure the regression is that questions are local, (N,), 0 where it cannot tell."""
    weights = coefficients.double()
    return nearest @ weights[:2] + weights[2]
