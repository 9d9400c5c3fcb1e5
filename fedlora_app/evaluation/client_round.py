"""A client's question sets under some of its adapters, as the metrics that it reports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.rounds import BASE, BOTH, Phase, RoundPlan, adapters_label
from fedlora_app.config.schema import ClientConfig, Config, EvaluationConfig
from fedlora_app.data.client_files import ClientFiles, build_question_sets
from fedlora_app.data.question_sample import sample_question_sets
from fedlora_app.data.questions import (
    CONFLICT,
    UNIVERSAL,
    UNIVERSAL_UNSEEN,
    Question,
    cluster_of,
)
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.final_round import validation_key
from fedlora_app.evaluation.gate import Gate
from fedlora_app.evaluation.gate_files import find_gate
from fedlora_app.evaluation.gold import GoldReader
from fedlora_app.evaluation.names import (
    ACCURACY,
    CHANCE,
    EXACT_MATCH,
    FACT_EACH,
    UNSEEN_EACH,
)
from fedlora_app.evaluation.room import count_halvings
from fedlora_app.evaluation.scores import Score, score_answer, summarise
from fedlora_app.evaluation.scoring import (
    Progress,
    Prompt,
    score_prompts,
    score_without_question,
)
from fedlora_app.foundation.progress import prompt_lines
from fedlora_app.model.adapters import AdaptedModel, only_adapters
from fedlora_app.model.base import LoadedModel
from fedlora_app.model.device import read_peak_memory, reset_peak_memory
from fedlora_app.training.phase import PhaseResult

VALIDATED = ("n", EXACT_MATCH.reported, ACCURACY.reported)
"""What is reported of a validation set."""

Metrics = dict[str, Any]
Priors = Mapping[bool, Mapping[str, float]]
"""A candidate's log-likelihood without a question where the local adapter answers, or not."""


@dataclass(frozen=True)
class ClientEvaluation:
    """A client's questions, put to the adapters that are set on the model."""

    config: Config
    client: ClientConfig
    files: ClientFiles
    loaded: LoadedModel
    model: AdaptedModel
    gate_folder: Path
    """Where the client keeps its gate."""

    def evaluate_round(self, plan: RoundPlan, server_round: int) -> Metrics:
        """Put the questions to whatever answers after this round, if that is due.

        Returns:
            What ``evaluate`` and ``validate`` do, the gate's figures, and what it took.
        """
        metrics: Metrics = {}
        is_final = server_round == self.config.federated.num_rounds
        interval = self.config.evaluation.interval
        is_due = interval > 0 and (is_final or server_round % interval == 0)
        own = Answering.own(plan.evaluated, self.client.id)
        answering = [own if server_round > 0 else Answering()] if is_due else []
        if is_due and is_final and set(plan.trained) == set(BOTH):
            answering.append(Answering(with_global=True))
        gate = self.find_gate(own) if is_due or is_final else None
        metrics |= gate.figures.metrics() if gate is not None and server_round > 0 else {}
        started, halvings = time.monotonic(), count_halvings(self.model)
        reset_peak_memory(self.model.device)
        for who in answering:
            metrics |= self.evaluate(
                who,
                gate if who == own else None,
                show_example=is_final and who == own,
                sample=0 if is_final else self.config.evaluation.sample,
                what=f"{self.client.id}, round {server_round}",
            )
        if is_due and server_round > 0 and self.config.federated.final == "best":
            metrics |= self.validate(own, gate)
        if (retries := count_halvings(self.model) - halvings) > 0:
            metrics["evaluation_memory_retries"] = retries
        metrics["evaluation_seconds"] = time.monotonic() - started
        metrics["peak_memory_bytes"] = read_peak_memory(self.model.device)
        return metrics

    def evaluate(
        self,
        who: Answering,
        gate: Gate | None = None,
        *,
        show_example: bool = False,
        sample: int = 0,
        what: str = "",
    ) -> Metrics:
        """Score every question set.

        Args:
            gate: decides for every question whether the local adapter answers.
            show_example: print one conflict question with its answer, in the client's own log.
            sample: at most so many questions of each set; 0: all of them.
            what: begins the lines that say how far the evaluation is.

        Returns:
            Means under ``<adapters>/<question set>/<metric>``, for the universal set also over
            the facts that the client never saw, and verdicts per record; of the base model, which
            comes first, also which records are about one fact.
        """
        metrics: Metrics = {}
        adapters = adapters_label(who.adapters)
        question_sets = sample_question_sets(
            build_question_sets(self.client, self.files),
            self.files.tests,
            sample,
            self.config.experiment.seed,
        )
        gold = GoldReader(
            self.loaded.tokenizer, self.client, self.files, self.config.evaluation.max_new_tokens
        )
        report = prompt_lines(
            f"{what or self.client.id}, evaluation [{adapters}]",
            total=sum(map(len, question_sets.values())),
        )
        num_done = 0
        priors = self._score_priors(who, list(chain.from_iterable(question_sets.values())))
        for name, questions in question_sets.items():

            def progress(count: int, before: int = num_done) -> None:
                report(before + count)

            scores = self._ask(questions, who, gate, priors, progress)
            num_done += len(questions)
            prefix = f"{adapters}/{name}"
            asked = list(zip(questions, scores, strict=True))
            metrics |= _prefixed(prefix, _summarise(asked, gold))
            if name == UNIVERSAL:
                unseen = [(question, score) for question, score in asked if question.is_unseen]
                metrics |= _prefixed(f"{adapters}/{UNIVERSAL_UNSEEN}", _summarise(unseen, gold))
            num_records = len(self.files.tests[name].records)
            metrics |= _prefixed(prefix, _verdicts(questions, scores, num_records))
            if name == CONFLICT and show_example:
                answer = scores[0].generated
                print(f'{self.client.id}: "{questions[0].text}" -> "{answer}"', flush=True)
        return metrics | (describe_records(self.client, self.files) if adapters == BASE else {})

    def validate(self, who: Answering, gate: Gate | None = None) -> Metrics:
        """Score the validation questions, all of them in every round, for ``final_round``."""
        metrics: Metrics = {}
        sets = build_question_sets(self.client, self.files, validation=True)
        for name, questions in sets.items():
            summary = summarise(self._ask(questions, who, gate))
            metrics |= {validation_key(name, f): summary[f] for f in VALIDATED if f in summary}
        return metrics

    def find_gate(self, who: Answering) -> Gate | None:
        """Return the gate before the local adapter, fitted once and kept in its folder."""
        if not who.has_gate(self.config.adapters):
            return None
        return find_gate(
            self.gate_folder, self.model, self.loaded, self.client, self.files, keep=True
        )

    def _ask(
        self,
        questions: Sequence[Question],
        who: Answering,
        gate: Gate | None,
        priors: Priors | None = None,
        progress: Progress | None = None,
    ) -> list[Score]:
        return evaluate_questions(
            self.model,
            self.loaded.tokenizer,
            questions,
            active=who.adapters,
            system_prompt=self.client.system_prompt,
            settings=self.config.evaluation,
            gate=gate,
            priors=priors,
            progress=progress,
        )

    def _score_priors(self, who: Answering, questions: Sequence[Question]) -> Priors:
        """Return what PMI divides by: of who answers where the gate opens, and where not."""
        behind_gate = who.behind_gate(self.config.adapters)
        candidates = [text for question in questions for text in question.candidates]
        by_adapters: dict[tuple[str, ...], dict[str, float]] = {}
        for adapters in {answering.adapters: None for answering in behind_gate.values()}:
            with only_adapters(self.model, adapters):
                by_adapters[adapters] = score_without_question(
                    self.model,
                    self.loaded.tokenizer,
                    self.client.system_prompt,
                    candidates,
                    batch_size=self.config.evaluation.batch_size,
                )
        return {is_open: by_adapters[each.adapters] for is_open, each in behind_gate.items()}


def describe_records(client: ClientConfig, files: ClientFiles) -> Metrics:
    """Return by set which records are about one fact, as numbers, and which the client never saw.

    Facts of the files that all clients share have a number that is the same for all, from 0;
    others are the client's own, and negative. So the server can count facts without their names.
    """
    shared: dict[str, int] = {}
    own: dict[str, int] = {}
    for name in (CONFLICT, UNIVERSAL):
        for record in files.tests[name].records if name in files.tests else ():
            shared.setdefault(cluster_of(record), len(shared))
    metrics: Metrics = {}
    for name, questions in build_question_sets(client, files).items():
        about = [cluster_of(record) for record in files.tests[name].records]
        for fact in about:
            if fact not in shared:
                own.setdefault(fact, -1 - len(own))
        numbers = own | shared
        metrics[f"{BASE}/{name}/{FACT_EACH}"] = [numbers[fact] for fact in about]
        if name == UNIVERSAL:
            unseen = {question.record for question in questions if question.is_unseen}
            flags = [int(record in unseen) for record in range(len(about))]
            metrics[f"{BASE}/{name}/{UNSEEN_EACH}"] = flags
    return metrics


def evaluate_questions(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    active: Sequence[str],
    system_prompt: str,
    settings: EvaluationConfig,
    gate: Gate | None = None,
    priors: Priors | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Score every question with the adapters ``active`` (none: the base model alone).

    Args:
        priors: log-likelihoods of all candidates without the question, for PMI.
    """
    prompts = [Prompt(system_prompt, q.text, q.candidates) for q in questions]
    with only_adapters(model, active):
        answers = score_prompts(
            model,
            tokenizer,
            prompts,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            combiner=gate,
            progress=progress,
        )
    if priors is not None:
        answers = [
            replace(
                answered,
                priors=tuple(priors[answered.is_own][text] for text in question.candidates),
            )
            for question, answered in zip(questions, answers, strict=True)
        ]
    return [score_answer(q, answered) for q, answered in zip(questions, answers, strict=True)]


def phase_metrics(phase: Phase, result: PhaseResult) -> Metrics:
    """Return a training phase's figures under ``train_<adapters>/<metric>``, but those withheld."""
    told = {name: value for name, value in vars(result).items() if value is not None}
    return _prefixed(f"train_{phase.name}", told)


def _summarise(asked: Sequence[tuple[Question, Score]], gold: GoldReader) -> Metrics:
    """Return the means, the number of facts, of answers whose words nobody can know, and chance."""
    if not asked:
        return {}
    means = summarise([score for _, score in asked])
    facts = {question.cluster for question, _ in asked}
    num_open = gold.count_open([question for question, _ in asked])
    chances = [question.chance for question, _ in asked if question.chance is not None]
    by_chance = {CHANCE: sum(chances) / len(chances)} if chances else {}
    return means | by_chance | {"n_facts": len(facts), "n_open": num_open}


def _verdicts(questions: Sequence[Question], scores: Sequence[Score], num_records: int) -> Metrics:
    """Return 1 or 0 per record of the file, -1 where it has no answer or rival for the client."""
    by_record = {question.record: s for question, s in zip(questions, scores, strict=True)}
    metrics: Metrics = {}
    for measure in (EXACT_MATCH, ACCURACY):
        passed = {record: score.outcome(measure) for record, score in by_record.items()}
        values = [passed.get(index) for index in range(num_records)]
        metrics[measure.reported_each] = [-1 if value is None else int(value) for value in values]
    return metrics


def _prefixed(prefix: str, values: Metrics) -> Metrics:
    return {f"{prefix}/{key}": value for key, value in values.items()}
