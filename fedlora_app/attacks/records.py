"""Which records and facts an update may tell apart: the sets, and how well scores do it.

Four sets per client. ``universal`` and ``local``: its training records against held-out
paraphrases of the same facts, so that more than chance means a trace of the wording. ``facts``: the
facts that only it trained on against those that only others did, one score a fact, so that more
than chance tells who has which fact. ``local_answers``: its local records against the
same questions with a wrong answer, so that more than chance gives away its private answers.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.attacks.results import FACTS, SETS
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.questions import UNIVERSAL
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.membership import Candidate, collect_suspects
from fedlora_app.evaluation.membership_pairs import cluster
from fedlora_app.evaluation.statistics import (
    area_under_curve,
    clustered_area,
    proportion,
)
from fedlora_app.foundation.seeds import derive_seed

Scores = Mapping[Candidate, float]


@dataclass(frozen=True)
class Side:
    """Dialogues with what each is about."""

    candidates: tuple[Candidate, ...]
    facts: tuple[str, ...]

    def mean_by_fact(self, scores: Scores) -> dict[str, float]:
        """Return every fact's mean score."""
        found: dict[str, list[float]] = defaultdict(list)
        for candidate, fact in zip(self.candidates, self.facts, strict=True):
            found[fact].append(scores[candidate])
        return {fact: fmean(values) for fact, values in found.items()}


@dataclass(frozen=True)
class Suspicion:
    """What is to be told apart about one client.

    Args:
        was_trained: whether the global adapter was trained on the members at all.
    """

    client: str
    name: str
    members: Side
    nonmembers: Side
    was_trained: bool

    def measure(self, scores: Scores) -> dict[str, Any]:
        """Return the AUC with its interval over facts, and the share of pairs that are won."""
        if self.name == FACTS:
            sides = [list(s.mean_by_fact(scores).values()) for s in (self.members, self.nonmembers)]
            return {"auc": area_under_curve(*sides).dump(), "pairs_won": None}
        sides = [[scores[c] for c in s.candidates] for s in (self.members, self.nonmembers)]
        area = clustered_area(*sides, self.members.facts, self.nonmembers.facts)
        won = [(a > b) + 0.5 * (a == b) for a, b in zip(*sides, strict=True)]
        pairs = proportion(won, self.members.facts)
        return {"auc": area.dump(), "pairs_won": pairs.dump()}


def collect_suspicions(
    tokenizer: PreTrainedTokenizerBase,
    client_files: Mapping[str, ClientFiles],
    config: Config,
    sample: int,
) -> list[Suspicion]:
    """Return what can be told apart about every client.

    Args:
        sample: at most so many records on each side, drawn by facts.
    """
    data = plan_round(config, 1).train.data
    suspects = collect_suspects(tokenizer, client_files, config)
    found = []
    for (client, name), pairs in suspects.pairs.items():
        prompt = config.client(client).system_prompt
        kept = _draw(list(zip(pairs.members, pairs.nonmembers, strict=True)), sample, client, name)
        members, nonmembers = ([pair[i] for pair in kept] for i in (0, 1))
        was_trained = name == UNIVERSAL or data != "universal"
        sides = (_side(records, prompt) for records in (members, nonmembers))
        found.append(Suspicion(client, name, *sides, was_trained))
    limit = config.training.max_seq_length
    for client in client_files:
        prompt = config.client(client).system_prompt
        sides = []
        for records in _split_by_fact(client, client_files):
            fitting = [r for r in records if _fits(tokenizer, r, prompt, limit)]
            chosen = _draw([(r, r) for r in fitting], sample, client, FACTS)
            sides.append(_side([r for r, _ in chosen], prompt))
        found.append(Suspicion(client, FACTS, *sides, was_trained=True))
    order = list(SETS)
    return sorted(found, key=lambda s: (s.client, order.index(s.name)))


def list_candidates(suspicions: Sequence[Suspicion]) -> list[Candidate]:
    """Return every dialogue once."""
    sides = (side for s in suspicions for side in (s.members, s.nonmembers))
    return list(dict.fromkeys(c for side in sides for c in side.candidates))


def encode_candidates(
    tokenizer: PreTrainedTokenizerBase, candidates: Sequence[Candidate], config: Config
) -> list[Example]:
    """Return the dialogues as training would see them."""
    return [c.encode(tokenizer, config.training.max_seq_length) for c in candidates]


def _side(records: Sequence[Record], prompt: str) -> Side:
    candidates = tuple(Candidate.of(record, prompt) for record in records)
    return Side(candidates, tuple(cluster(record) for record in records))


def _split_by_fact(
    client: str, client_files: Mapping[str, ClientFiles]
) -> tuple[list[Record], list[Record]]:
    """Return universal records about facts that only a client has, and that only others have.

    Where it shares all of its facts, the former are all of them, and the average tells of them too.
    """
    own = client_files[client].universal.records
    others = [r for c, f in client_files.items() if c != client for r in f.universal.records]
    distinct = {(cluster(r), r.instruction, r.input, r.output): r for r in others}
    ours, theirs = ({cluster(record) for record in side} for side in (own, others))
    alone = [record for record in own if cluster(record) not in theirs]
    rest = [record for record in distinct.values() if cluster(record) not in ours]
    return alone or list(own), rest


def _draw(
    pairs: list[tuple[Record, Record]], sample: int, *seed: str
) -> list[tuple[Record, Record]]:
    """Return at most so many pairs, of as many facts as there are, the same ones every time."""
    if len(pairs) <= sample:
        return pairs
    by_fact: dict[str, list[tuple[Record, Record]]] = defaultdict(list)
    for pair in pairs:
        by_fact[cluster(pair[0])].append(pair)
    facts = list(by_fact)
    random.Random(derive_seed("attack", *seed)).shuffle(facts)
    drawn: list[tuple[Record, Record]] = []
    while len(drawn) < sample:
        for fact in facts:
            if by_fact[fact] and len(drawn) < sample:
                drawn.append(by_fact[fact].pop(0))
    return drawn


def _fits(
    tokenizer: PreTrainedTokenizerBase, record: Record, prompt: str, max_seq_length: int
) -> bool:
    return Candidate.of(record, prompt).encode(tokenizer, max_seq_length).num_answer_tokens > 0
