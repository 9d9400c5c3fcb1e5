"""All attacks on a run: what is tried, on which updates, and what ``attack.json`` holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora_app.attacks import extraction, tokens
from fedlora_app.attacks.exposure import measure_canaries
from fedlora_app.attacks.limits import find_limit
from fedlora_app.attacks.observed import AttackError, Observed, observe, observed_rounds
from fedlora_app.attacks.records import (
    Suspicion,
    collect_suspicions,
    encode_candidates,
    list_candidates,
)
from fedlora_app.attacks.results import (
    ALL_ROUNDS,
    ASSUMPTIONS,
    AVERAGE,
    BEFORE,
    FORMAT,
    LOSS_DROP,
    NOT_TRIED,
    UPDATE,
)
from fedlora_app.attacks.scores import compare_with_gradients, mean_log_probs
from fedlora_app.attacks.sources import (
    Scored,
    TokenScores,
    add_scores,
    add_tokens,
    by_source,
    mean_scores,
    mean_tokens,
)
from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import plan_round
from fedlora_app.data.canaries import load_canaries
from fedlora_app.data.client_files import tokenize_client_files
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import Example, encode_example
from fedlora_app.evaluation.choices import SavedRound
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.foundation.files import write_json
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.training.record_privacy import hides_records
from fedlora_app.training.selection import select_phase, take_part

Report = Callable[[str, int, int], None]
"""Called with what is tried, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        sample: records on each side of a set, at most.
        texts: texts that are drawn from each client's model.
    """

    rounds: tuple[int, ...] = ()
    sample: int = 100
    texts: int = 64


def attack_run(saved: SavedRound, report: Report, effort: Effort) -> dict[str, Any]:
    """Try all attacks, write ``attack.json`` and return what it holds.

    Args:
        saved: the run's final round with all clients' files.

    Raises:
        AttackError: a round has no updates that were kept.
        ModelError: the base model cannot be loaded.
    """
    rounds = _choose_rounds(saved, effort.rounds)
    model = SavedModel(saved.run, saved.server_round, saved.root)
    _, adapted = model.load()
    for files in saved.files.values():
        load_canaries(files)  # raises before anything long where they are not of the files
    attacks = _Attacks(saved, model, report, effort)
    for number in rounds:
        attacks.add(observe(saved.run, adapted, number), rounds)
    found = {
        "format": FORMAT,
        "run": saved.run.name,
        "rounds": rounds,
        "sample": effort.sample,
        "records": list(attacks.measure_records()),
        "tokens": list(attacks.measure_tokens()),
        "texts": attacks.texts,
        "canaries": attacks.canaries,
        "limit": find_limit(saved.run.config, _count_examples(saved)),
        "assumptions": list(ASSUMPTIONS),
        "not_tried": list(NOT_TRIED),
    }
    write_json(saved.run.paths.attack, found)
    return found


def _count_examples(saved: SavedRound) -> dict[str, tuple[int, int]]:
    """Return every client's universal and local examples, as it registered them."""
    return {
        client: (about["universal_examples"], about["local_examples"])
        for client, about in saved.run.manifest["clients"].items()
    }


def _choose_rounds(saved: SavedRound, wanted: tuple[int, ...]) -> list[int]:
    kept = list(observed_rounds(saved.run))
    if missing := sorted(set(wanted) - set(kept)):
        has = f"rounds {kept[0]} to {kept[-1]}" if kept else "no round"
        raise AttackError(
            f"{saved.run.path} has no updates of round {missing[0]}; it has those of {has}."
        )
    if not kept:
        raise AttackError(f"{saved.run.path} has no updates: no round is complete.")
    return sorted(set(wanted)) or kept


@dataclass
class _Attacks:
    """What has been scored so far, one round after the other."""

    saved: SavedRound
    saved_model: SavedModel
    report: Report
    effort: Effort
    texts: list[dict[str, Any]] = field(default_factory=list)
    canaries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loaded, self.model = self.saved_model.load()
        config, tokenizer = self.saved.run.config, self.loaded.tokenizer
        self._suspicions = collect_suspicions(
            tokenizer, self.saved.files, config, self.effort.sample
        )
        self._candidates = list_candidates(self._suspicions)
        self._examples = encode_candidates(tokenizer, self._candidates, config)
        self._vocabulary = tokens.know_vocabulary(self.model, len(tokenizer))
        self._scored: dict[int, Scored] = {}
        self._token_scores: dict[int, TokenScores] = {}

    def add(self, observed: Observed, rounds: list[int]) -> None:
        """Score everything by what the server saw in one round."""
        senders = {client: observed.moved(client) for client in observed.updates}
        senders[AVERAGE] = observed.mean_update
        number = observed.server_round
        self._scored[number] = self._score_records(observed, senders)
        self._token_scores[number] = {
            sender: tokens.score_tokens(self._vocabulary, observed.before, update)
            for sender, update in senders.items()
        }
        if number in (rounds[0], rounds[-1]):
            self.texts += self._extract(observed)
        if number == rounds[-1]:
            self.canaries += measure_canaries(self.saved, self.saved_model, observed, self.report)

    def measure_records(self) -> Iterator[dict[str, Any]]:
        """Yield a row per client, set, attack, source and rounds."""
        for suspicion in self._suspicions:
            for rounds, scored in self._with_all(self._scored, add_scores):
                for attack, by_sender in scored.items():
                    for source, scores in by_source(by_sender, suspicion.client, mean_scores):
                        yield {
                            **_describe(suspicion),
                            "attack": attack,
                            "source": source,
                            "rounds": rounds,
                            **suspicion.measure(scores),
                        }

    def measure_tokens(self) -> Iterator[dict[str, Any]]:
        """Yield a row per client, attack, source and rounds."""
        for client in self.saved.files:
            numbers = [n for n, found in self._token_scores.items() if client in found]
            for rounds, by_sender in self._with_all(self._token_scores, add_tokens):
                those = numbers if rounds == ALL_ROUNDS else [rounds]
                batch = self._find_batch(client, those)
                for source, scores in by_source(by_sender, client, mean_tokens):
                    for row in tokens.measure_tokens(scores, batch):
                        yield {"client": client, "source": source, "rounds": rounds, **row}

    def _with_all(self, by_round: Mapping[int, Any], add: Callable) -> Iterator[tuple[Any, Any]]:
        yield from by_round.items()
        if len(by_round) > 1:
            yield ALL_ROUNDS, add(list(by_round.values()))

    def _score_records(self, observed: Observed, senders: Mapping[str, AdapterState]) -> Scored:
        what = f"round {observed.server_round}, records"
        batch_size = self.saved.run.config.evaluation.batch_size
        states = observed.reached | {AVERAGE: observed.average}
        count, total = len(self._examples), (len(states) + 2) * len(self._examples)
        before = mean_log_probs(self.model, observed.before, self._examples, batch_size)
        drops = {}
        for turn, (sender, state) in enumerate(states.items(), 1):
            self.report(what, turn * count, total)
            after = mean_log_probs(self.model, state, self._examples, batch_size)
            drops[sender] = [new - old for new, old in zip(after, before, strict=True)]
        done = (len(states) + 1) * count
        by_gradient = compare_with_gradients(
            self.model,
            observed.before,
            senders,
            self._examples,
            lambda number: self.report(what, done + number, total),
        )
        lists = {LOSS_DROP: drops, **by_gradient}
        return {
            attack: {s: dict(zip(self._candidates, v, strict=True)) for s, v in found.items()}
            for attack, found in lists.items()
        }

    def _extract(self, observed: Observed) -> Iterator[dict[str, Any]]:
        config, tokenizer = self.saved.run.config, self.loaded.tokenizer
        limits = {
            "batch_size": config.evaluation.batch_size,
            "max_new_tokens": config.evaluation.max_new_tokens,
        }
        what, done = f"round {observed.server_round}, texts", 0
        said: dict[tuple[str, str], list[str]] = {}  # clients may have one system prompt
        for client, reached in observed.reached.items():
            secrets = extraction.collect_secrets(client, self.saved.files, self.effort.sample)
            states = {UPDATE: reached, AVERAGE: observed.average, BEFORE: observed.before}
            for source, state in states.items():
                self.report(what, done, len(states) * len(observed.reached))
                prompt = config.client(client).system_prompt
                who = (self.model, tokenizer, state, prompt)
                key = (client if source == UPDATE else source, prompt)
                if key not in said:
                    said[key] = extraction.elicit(*who, number=self.effort.texts, **limits)
                texts = said[key]
                rows = list(extraction.measure_texts(secrets, texts))
                for whose, records in secrets.items():
                    answers = extraction.ask(*who, records, **limits)
                    rows.append(extraction.measure_answers(whose, records, answers))
                about = {"client": client, "rounds": observed.server_round, "source": source}
                yield from (about | row | {"n_texts": len(texts)} for row in rows)
                done += 1

    def _find_batch(self, client: str, rounds: Iterable[int]) -> tokens.Batch:
        config, tokenizer = self.saved.run.config, self.loaded.tokenizer
        trained = [e for n in rounds for e in self._trained(client, n)]
        prompt = config.client(client).system_prompt
        return tokens.find_batch(tokenizer, prompt, trained, self._all_examples())

    def _trained(self, client: str, server_round: int) -> list[Example]:
        """Return what a client trained the global adapter on in a round."""
        config, root = self.saved.run.config, self.saved.root
        if client not in training_clients(config, server_round):
            return []
        phase = plan_round(config, server_round).train

        def load(owner: str):
            of_owner, files = config.client(owner), self.saved.files[owner]
            return tokenize_client_files(config, of_owner, files, self.loaded.tokenizer, root)

        selected = select_phase(config, client, phase, server_round, load)
        if hides_records(phase, config.privacy):
            return selected.examples  # steps draw of all of them
        return take_part(selected, config, client, phase, server_round)

    def _all_examples(self) -> list[Example]:
        """Return everything that anybody trains on or is asked, but conflicts."""
        config, tokenizer = self.saved.run.config, self.loaded.tokenizer
        return [
            encode_example(tokenizer, config.client(client).system_prompt, record)
            for client, files in self.saved.files.items()
            for file in (files.universal, files.local, *files.tests.values())
            for record in file.records
            if isinstance(record, Record)
        ]


def _describe(suspicion: Suspicion) -> dict[str, Any]:
    return {
        "client": suspicion.client,
        "set": suspicion.name,
        "was_trained": suspicion.was_trained,
        "n_members": len(suspicion.members.candidates),
        "n_nonmembers": len(suspicion.nonmembers.candidates),
    }
