"""Membership inference: does the shared adapter tell which records a client trained on?

The global adapter is what every client and the server get to see. An attacker who holds it
scores a record by its answer's token log-probabilities, higher for a likelier member; the AUC
of members against matched non-members says how well that works, and 0.5 is a coin.

- ``loss``: mean log-probability per answer token (Yeom et al. 2018,
  https://arxiv.org/abs/1709.01604);
- ``calibrated_loss``: the same minus the base model's (difficulty calibration, Watson et al.
  2022, https://arxiv.org/abs/2111.08440; Carlini et al. 2022, https://arxiv.org/abs/2112.03570);
- ``min_k``: mean of the lowest 20 % (Min-K% Prob, Shi et al. 2024,
  https://arxiv.org/abs/2310.16789);
- ``calibrated_min_k``: the same minus the base model's over its own lowest 20 %;
- ``base_loss``, a control and no attack: the mean under the base model, which has seen neither
  side. Where it is not at 0.5 the two sides differ before any training, and no other row of
  that set tells of training alone (Duan et al. 2024, https://arxiv.org/abs/2402.07841): the
  plain attacks inherit the difference and the calibrated ones may turn it round.

The AUC compares every member with every non-member, and how hard the facts are hides small
effects. ``pairs_won``, the share of pairs whose member scores higher than its own partner, is
free of that; a record counts as remembered only where both are looked at.

Three sets per client. ``universal``: its share of the universal records against held-out
paraphrases of the same facts, so that an AUC above 0.5 means that the adapter remembers the
wording and not only the fact. ``local``: the same with its local records, which the phased
schedule keeps out of the global adapter. ``local_answers``: its local records against the same
questions with a wrong answer; an AUC above 0.5 means that the adapter alone prefers the
client's private answers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.questions import LOCAL_ANSWERS, LOCAL_SET, UNIVERSAL
from fedlora_app.data.records import Record, format_question
from fedlora_app.data.tokens import Example, encode_example
from fedlora_app.evaluation.membership_pairs import (
    Pairs,
    build_answer_pairs,
    build_pairs,
    cluster,
    question_key,
)
from fedlora_app.evaluation.statistics import (
    area_under_curve,
    clustered_area,
    proportion,
)

MIN_K_SHARE = 0.2
FALSE_POSITIVE_RATES = (0.01, 0.1)
ATTACKS = {
    "calibrated_loss": "loss - base",
    "loss": "loss",
    "calibrated_min_k": "min-k - base",
    "min_k": "min-k",
    "base_loss": "base alone",
}


@dataclass(frozen=True)
class Candidate:
    """What an attacker holds: a dialogue that may have been trained on."""

    system_prompt: str
    question: str
    answer: str

    @classmethod
    def of(cls, record: Record, system_prompt: str) -> Candidate:
        """Return a record as a client with that system prompt would train on it."""
        return cls(system_prompt, format_question(record), record.output)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, max_seq_length: int | None = None
    ) -> Example:
        """Return it as training would see it."""
        record = Record(self.question, self.answer)
        example = encode_example(tokenizer, self.system_prompt, record)
        return replace(example, input_ids=example.input_ids[:max_seq_length])


def attack_scores(
    global_log_probs: Sequence[Sequence[float]], base_log_probs: Sequence[Sequence[float]]
) -> dict[str, list[float]]:
    """Return every attack's score per record, higher for a likelier member.

    Args:
        global_log_probs, base_log_probs: per record, one log-probability per answer token under
            the global adapter alone and under the base model.
    """
    loss, base_loss = ([fmean(r) for r in side] for side in (global_log_probs, base_log_probs))
    min_k, base_min_k = (
        [compute_min_k(r) for r in side] for side in (global_log_probs, base_log_probs)
    )
    return {
        "calibrated_loss": [a - b for a, b in zip(loss, base_loss, strict=True)],
        "loss": loss,
        "calibrated_min_k": [a - b for a, b in zip(min_k, base_min_k, strict=True)],
        "min_k": min_k,
        "base_loss": base_loss,
    }


def compute_min_k(log_probs: Sequence[float], share: float = MIN_K_SHARE) -> float:
    """Return the mean of the lowest ``share`` of the tokens, of one token at least."""
    count = max(1, math.floor(share * len(log_probs)))
    return fmean(sorted(log_probs)[:count])


def measure_membership(members: Sequence[float], nonmembers: Sequence[float]) -> dict[str, Any]:
    """Return how well a score tells members from non-members.

    The AUC has DeLong's interval, which takes all records for independent. A true-positive
    rate is None where its false-positive rate allows less than one false positive.
    """
    rates = {
        str(rate): true_positive_rate(members, nonmembers, rate) for rate in FALSE_POSITIVE_RATES
    }
    return {
        "auc": area_under_curve(members, nonmembers).dump(),
        "n_members": len(members),
        "n_nonmembers": len(nonmembers),
        "tpr_at_fpr": rates,
    }


def measure_pairs(
    members: Sequence[float],
    nonmembers: Sequence[float],
    member_facts: Sequence[Hashable],
    nonmember_facts: Sequence[Hashable],
) -> dict[str, Any]:
    """Return what the pairing and the facts behind the scores add, both lists in pair order.

    ``auc_by_fact`` is the AUC with an interval that lets records of one fact depend on each
    other (n counts facts); ``pairs_won`` is the share of members above their own partner, ties
    counting half.
    """
    won = [(a > b) + 0.5 * (a == b) for a, b in zip(members, nonmembers, strict=True)]
    area = clustered_area(members, nonmembers, member_facts, nonmember_facts)
    return {"auc_by_fact": area.dump(), "pairs_won": proportion(won, member_facts).dump()}


def true_positive_rate(
    members: Sequence[float], nonmembers: Sequence[float], false_positive_rate: float
) -> float | None:
    """Return the share of members above all but the allowed non-members; ties do not count."""
    allowed = math.floor(
        round(false_positive_rate * len(nonmembers), 9)
    )  # 0.01 * 2900 is 28.999...
    if not members or allowed < 1:
        return None
    threshold = sorted(nonmembers, reverse=True)[allowed]
    return sum(score > threshold for score in members) / len(members)


@dataclass(frozen=True)
class Suspects:
    """The records to tell apart: each client's pairs per set, and every dialogue once."""

    pairs: dict[tuple[str, str], Pairs]
    """By client and set."""
    candidates: list[Candidate]
    examples: list[Example]
    """The candidates as training would see them, whose answers' tokens are to be scored."""


def collect_suspects(
    tokenizer: PreTrainedTokenizerBase, client_files: Mapping[str, ClientFiles], config: Config
) -> Suspects:
    """Return the members and non-members of every client and set, without those too long."""
    sets = _build_sets(tokenizer, client_files, config)
    candidates = {
        Candidate.of(record, config.client(client_id).system_prompt): None
        for (client_id, _), pairs in sets.items()
        for record in [*pairs.members, *pairs.nonmembers]
    }
    limit = config.training.max_seq_length
    examples = [candidate.encode(tokenizer, limit) for candidate in candidates]
    return Suspects(sets, list(candidates), examples)


def measure_attacks(
    suspects: Suspects,
    global_log_probs: Sequence[Sequence[float]],
    base_log_probs: Sequence[Sequence[float]],
    config: Config,
) -> list[dict[str, Any]]:
    """Return one row per client, set and attack on the global adapter.

    A set without any pair keeps its rows, with None for what cannot be measured.

    Args:
        global_log_probs, base_log_probs: as for ``attack_scores``, of ``suspects.examples``.
    """
    scores = attack_scores(global_log_probs, base_log_probs)
    by_attack = {n: dict(zip(suspects.candidates, scores[n], strict=True)) for n in ATTACKS}
    return [
        {"client": client_id, "set": name, "attack": attack}
        | _measure_pairs(pairs, by_attack[attack], config.client(client_id).system_prompt)
        for (client_id, name), pairs in suspects.pairs.items()
        for attack in ATTACKS
    ]


def _build_sets(
    tokenizer: PreTrainedTokenizerBase, client_files: Mapping[str, ClientFiles], config: Config
) -> dict[tuple[str, str], Pairs]:
    """Return the pairs of every client and set, without what is too long to be trained on."""
    trained = frozenset(
        question_key(record)
        for files in client_files.values()
        for record in [*files.universal.records, *files.local.records]
    )

    def num_tokens(answer: str) -> int:
        return len(tokenizer(answer, add_special_tokens=False)["input_ids"])

    sets: dict[tuple[str, str], Pairs] = {}
    for client_id, files in sorted(client_files.items()):
        prompt = config.client(client_id).system_prompt

        def fitting(records: Iterable[Record], prompt: str = prompt) -> list[Record]:
            limit = config.training.max_seq_length
            return [r for r in records if _fits(tokenizer, Candidate.of(r, prompt), limit)]

        for name, train in ((UNIVERSAL, files.universal), (LOCAL_SET, files.local)):
            test = files.tests[name].records if name in files.tests else []
            sets[client_id, name] = build_pairs(
                fitting(train.records), fitting(test), num_tokens, trained
            )
        pairs = build_answer_pairs(client_id, client_files)
        kept = [
            (member, wrong)
            for member, wrong in zip(pairs.members, pairs.nonmembers, strict=True)
            if fitting([member])
        ]
        sets[client_id, LOCAL_ANSWERS] = replace(
            pairs, members=[m for m, _ in kept], nonmembers=[w for _, w in kept]
        )
    return sets


def _measure_pairs(
    pairs: Pairs, scores: Mapping[Candidate, float], system_prompt: str
) -> dict[str, Any]:
    sides = (pairs.members, pairs.nonmembers)
    values = [[scores[Candidate.of(r, system_prompt)] for r in side] for side in sides]
    facts = [[cluster(r) for r in side] for side in sides]
    measured = measure_membership(*values) | measure_pairs(*values, *facts)
    return measured | {"n_by_length": pairs.num_by_length, "n_dropped": pairs.num_dropped}


def _fits(tokenizer: PreTrainedTokenizerBase, candidate: Candidate, max_seq_length: int) -> bool:
    """Return whether training would keep any of the answer."""
    return candidate.encode(tokenizer, max_seq_length).num_answer_tokens > 0
