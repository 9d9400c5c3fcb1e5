"""Fitting a gate to a client's training questions, and telling how well it separates them.

Every question is held out once, with the other wordings of its fact among what is compared and
without them: what a gate without it sees of it is what the regression of ``gate`` and the tokens of
``foreign_tokens`` are fitted to, and what ``GateFigures`` count.

A gate is made from the client's data where it is needed; nothing of it but how well it
separates is ever sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from transformers import PreTrainedTokenizerBase

from fedlora_app.data.records import Record, format_question
from fedlora_app.evaluation.combiner import encode_judged
from fedlora_app.evaluation.feature_space import Space
from fedlora_app.evaluation.foreign_tokens import TokenCounts, choose_threshold
from fedlora_app.evaluation.gate import (
    Features,
    Gate,
    GateFigures,
    compare,
    find_log_odds,
    find_nearest,
)
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapters import AdaptedModel

MAX_PROMPTS = 4096  # of either kind
NUM_FOLDS = 3
FACTS_AT_ONCE = 512  # compared: each time takes the basis and all means to fp64
NUM_NEIGHBOURS = 5
PURE = 0.9
"""Share of facts' nearest neighbours that are of their own kind, from which the kinds differ."""
RAREST = 0.01
"""Share of held-out local questions that may be farther from all others than the gate opens for."""
PENALTY = 1e-5  # on the logistic regression's squared coefficients
UNKNOWN = -1.0
"""The similarity to what is not there."""


@dataclass(frozen=True)
class FactFeatures:
    """A fact's kind, and the features and tokens of all its wordings."""

    is_local: bool
    features: Features
    tokens: tuple[frozenset[int], ...]

    def __len__(self) -> int:
        """Return the number of wordings."""
        return len(self.features[0])

    def part(self, places: Sequence[int]) -> Features:
        """Return the features of some of the wordings."""
        return tuple(feature[list(places)] for feature in self.features)

    def join_tokens(self, places: Sequence[int]) -> tuple[bool, frozenset[int]]:
        """Return the kind, and the tokens of some of the wordings together."""
        return self.is_local, frozenset().union(*(self.tokens[place] for place in places))


class Trial(NamedTuple):
    """Held-out questions of one name, and what a gate without them sees of them."""

    nearest: torch.Tensor
    """(N, 2): as ``find_nearest`` returns it."""
    evidence: list[int]
    """(N,): what their tokens say against their being local."""
    name: str


def fit_gate(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    local: Sequence[Record],
    universal: Sequence[Record],
) -> Gate | None:
    """Fit a gate to a client's training questions; None where one kind has none."""
    if not local or not universal:
        return None
    facts = []
    for is_local, records in ((True, local), (False, universal)):
        wordings = choose_wordings(records, all_facts=is_local)
        prompts = [encode_judged(tokenizer, system_prompt, q) for qs in wordings for q in qs]
        sizes = [len(questions) for questions in wordings]
        parts = zip(*(f.split(sizes) for f in compute_features(model, prompts)), strict=True)
        tokens = map(frozenset, prompts)
        facts += [
            FactFeatures(is_local, tuple(part), tuple(islice(tokens, size)))
            for part, size in zip(parts, sizes, strict=True)
        ]
    return replace(separate(facts), system_prompt=system_prompt)


def choose_wordings(records: Sequence[Record], *, all_facts: bool) -> list[list[str]]:
    """Return the questions about each fact, some of them where there are very many.

    Records without ``fact`` are about the same fact where their answers are the same.

    Args:
        all_facts: every fact is kept, and long ones lose wordings; otherwise whole facts go.
    """
    by_fact: dict[str, dict[str, None]] = {}
    for record in records:
        questions = by_fact.setdefault(record.fact or record.output.strip(), {})
        questions[format_question(record)] = None
    wordings = [list(questions) for questions in by_fact.values()]
    if all_facts:
        most = max(NUM_FOLDS, MAX_PROMPTS // len(wordings))
        return [questions[:most] for questions in wordings]
    random.Random(derive_seed("gate", "facts")).shuffle(wordings)
    chosen, total = [], 0
    for questions in wordings:
        total += len(questions)
        if total <= MAX_PROMPTS or not chosen:
            chosen.append(questions)
    return chosen


def separate(facts: Sequence[FactFeatures], by_fact: bool | None = None) -> Gate:
    """Return the gate between the local and the universal facts, at least one of each.

    Args:
        by_fact: whether it compares facts or kinds; None: facts if half of the local ones have
            three wordings or more, and there is more than one universal question to hold out.
    """
    purity = _measure_purity(facts)
    num_local = sum(fact.is_local for fact in facts)
    if by_fact is None:
        have_wordings = sum(len(f) >= NUM_FOLDS for f in facts if f.is_local)
        num_universal = sum(len(f) for f in facts if not f.is_local)
        by_fact = 2 * have_wordings >= num_local and num_universal > 1
    trials = list(_try_facts(facts) if by_fact else _try_kinds(facts))
    inputs = torch.cat([trial.nearest for trial in trials])
    names = [trial.name for trial in trials for _ in trial.evidence]
    is_own = torch.tensor([name == "local" for name in names])
    coefficients = _regress(inputs, is_own)
    opens = find_log_odds(inputs, coefficients) > 0
    evidence = torch.tensor([value for trial in trials for value in trial.evidence])
    threshold = choose_threshold(evidence, is_own, opens)
    opens &= evidence <= threshold

    held_out = {  # a kind's only fact was seen when its questions were tried
        "local": by_fact or num_local > 1,
        "universal": by_fact or len(facts) - num_local > 1,
        "unknown universal": True,
    }

    def share(name: str, opened: bool) -> float | None:
        if not held_out[name]:
            return None
        hits = [o == opened for o, n in zip(opens.tolist(), names, strict=True) if n == name]
        return sum(hits) / len(hits) if hits else None

    figures = GateFigures(
        by_fact,
        purity,
        opens_for_local=share("local", True),
        closes_for_universal=share("universal", False),
        closes_for_unknown=share("unknown universal", False),
    )
    groups = [fact.features for fact in facts] if by_fact else _join_kinds(facts)
    spaces, means = _build(groups)
    is_local = torch.tensor([fact.is_local for fact in facts] if by_fact else [True, False])
    floor = torch.tensor(UNKNOWN)
    if not by_fact and purity >= PURE:  # kinds say nothing of what is of neither
        similarities = torch.cat([t.nearest[:, 0] for t in trials if t.name == "local"])
        floor = similarities.quantile(RAREST).float()
    foreign = _count_tokens(facts).list_above(threshold)
    return Gate(spaces, means, is_local, coefficients, floor, foreign, figures)


def _join_kinds(facts: Sequence[FactFeatures]) -> list[Features]:
    """Return the local questions as one group, and the universal ones as another."""
    kinds = [[fact.features for fact in facts if fact.is_local is kind] for kind in (True, False)]
    return [tuple(torch.cat(parts) for parts in zip(*kind, strict=True)) for kind in kinds]


def _count_tokens(facts: Sequence[FactFeatures]) -> TokenCounts:
    return TokenCounts([fact.join_tokens(range(len(fact))) for fact in facts])


def _build(groups: Sequence[Features]) -> tuple[tuple[Space, ...], Features]:
    """Return the space of each feature, and the groups' means in it."""
    spaces, means = [], []
    for members in zip(*groups, strict=True):
        space = Space.fit(members)
        spaces.append(space)
        projected = [space.project(group).mean(0) for group in members]
        means.append(torch.nn.functional.normalize(torch.stack(projected), dim=-1).float())
    return tuple(spaces), tuple(means)


def _measure_purity(facts: Sequence[FactFeatures]) -> float:
    """Return the share of the facts nearest to each fact that are of its own kind."""
    _, means = _build([fact.features for fact in facts])
    is_local = torch.tensor([fact.is_local for fact in facts])
    smaller = min(int(is_local.sum()), int((~is_local).sum()))
    count = min(NUM_NEIGHBOURS, max(smaller - 1, 1), len(facts) - 1)
    found = []
    for start in range(0, len(facts), FACTS_AT_ONCE):
        rows = [mean[start : start + FACTS_AT_ONCE] @ mean.T for mean in means]
        similarities = torch.stack(rows).mean(0)
        similarities.diagonal(start).fill_(-float("inf"))  # to itself
        found.append(similarities.topk(count, dim=1).indices)
    nearest = torch.cat(found)
    return (is_local[nearest] == is_local[:, None]).double().mean().item()


def _try_facts(facts: Sequence[FactFeatures]) -> Iterator[Trial]:
    """Yield how held-out wordings look, and what they are.

    That is "local" or "universal" with their fact among the groups, and without it "unknown local"
    or "unknown universal"; so is a fact's only wording, which cannot be held out.
    """
    is_local = torch.tensor([fact.is_local for fact in facts])
    kinds = {True: "local", False: "universal"}
    has_others = {kind: int((is_local == kind).sum()) > 1 for kind in kinds}
    for fold in range(NUM_FOLDS):
        places = [range(len(fact)) for fact in facts]
        kept = [[p for p in all_ if p % NUM_FOLDS != fold or len(all_) == 1] for all_ in places]
        held = [
            [p for p in all_ if p not in own or len(all_) == 1]
            for all_, own in zip(places, kept, strict=True)
        ]
        spaces, means = _build([f.part(k) for f, k in zip(facts, kept, strict=True)])
        counts = TokenCounts([f.join_tokens(k) for f, k in zip(facts, kept, strict=True)])
        for start in range(0, len(facts), FACTS_AT_ONCE):
            span = range(start, min(start + FACTS_AT_ONCE, len(facts)))
            parts = zip(*(facts[index].part(held[index]) for index in span), strict=True)
            compared = compare(spaces, means, tuple(map(torch.cat, parts)))
            rows = compared.split([len(held[index]) for index in span])
            for index, similarities in zip(span, rows, strict=True):
                if len(similarities) == 0:
                    continue
                kind, asked = facts[index].is_local, [facts[index].tokens[p] for p in held[index]]
                if len(facts[index]) > 1:
                    evidence = [counts.find_evidence(tokens) for tokens in asked]
                    yield Trial(find_nearest(similarities, is_local), evidence, kinds[kind])
                if has_others[kind]:  # else nothing would be nearest to a question of that kind
                    similarities[:, index] = UNKNOWN
                    evidence = [counts.find_evidence(tokens, index) for tokens in asked]
                    nearest = find_nearest(similarities, is_local)
                    yield Trial(nearest, evidence, f"unknown {kinds[kind]}")


def _try_kinds(facts: Sequence[FactFeatures]) -> Iterator[Trial]:
    """Yield how held-out facts' questions look beside either kind, and their kind."""
    is_local = torch.tensor([True, False])
    folds = _deal([fact.is_local for fact in facts])
    for fold in range(max(folds) + 1):
        kept = [fact for fact, own in zip(facts, folds, strict=True) if own != fold]
        if len({fact.is_local for fact in kept}) < 2:
            kept = list(facts)  # a kind with a single fact has none to hold out
        spaces, means = _build(_join_kinds(kept))
        counts = _count_tokens(kept)
        for kind, name in ((True, "local"), (False, "universal")):
            held = [
                f for f, own in zip(facts, folds, strict=True) if (own, f.is_local) == (fold, kind)
            ]
            for start in range(0, len(held), FACTS_AT_ONCE):
                some = held[start : start + FACTS_AT_ONCE]
                parts = zip(*(fact.features for fact in some), strict=True)
                similarities = compare(spaces, means, tuple(map(torch.cat, parts)))
                evidence = [counts.find_evidence(t) for fact in some for t in fact.tokens]
                yield Trial(find_nearest(similarities, is_local), evidence, name)


def _deal(kinds: Sequence[bool]) -> list[int]:
    """Return the fold of each fact, each kind dealt out in a seeded order of its own."""
    folds = [0] * len(kinds)
    for kind in (True, False):
        places = [place for place, own in enumerate(kinds) if own is kind]
        random.Random(derive_seed("gate", "folds", str(kind))).shuffle(places)
        for number, place in enumerate(places):
            folds[place] = number % NUM_FOLDS
    return folds


def _regress(inputs: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
    """Return a logistic regression's coefficients (3,), both outcomes counting the same."""
    x = np.column_stack([inputs.numpy(), np.ones(len(inputs))])
    y = is_own.numpy().astype(float)
    weights = np.where(y == 1, 0.5 / max(y.sum(), 1), 0.5 / max((1 - y).sum(), 1))

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ coefficients
        value = (weights * (np.logaddexp(0, logits) - y * logits)).sum()
        slope = x.T @ (weights * (1 / (1 + np.exp(-logits)) - y))
        return value + PENALTY * (coefficients @ coefficients), slope + 2 * PENALTY * coefficients

    found = minimize(loss, np.zeros(3), jac=True, method="BFGS")
    return torch.from_numpy(found.x).float()
