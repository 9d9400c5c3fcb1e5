"""A saved round's questions, put to choices of its adapters, and the scores that they give.

Questions are collected by the adapters that are to answer them, so each choice of adapters is
set up once, and a question that several clients share is scored once. Scores are kept in a
file as they come, so that a stopped evaluation resumes where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.combination import SCALE, Combination
from fedlora_app.config.loading import parse_config
from fedlora_app.config.participation import leave_out
from fedlora_app.config.schema import GLOBAL, LOCAL, OWN_GLOBAL, ModelConfig
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.data.client_files import ClientFiles, load_all_files
from fedlora_app.data.questions import Question
from fedlora_app.evaluation.answering import Answering, SavedAdapters
from fedlora_app.evaluation.combiner import GLOBAL_ALONE
from fedlora_app.evaluation.gate_files import FORMAT as GATE_FORMAT
from fedlora_app.evaluation.saved_model import FITTED, SavedModel
from fedlora_app.evaluation.score_store import ScoreStore
from fedlora_app.evaluation.scores import Score, score_answer
from fedlora_app.evaluation.scoring import Answered, Prompt, ask_nothing, score_prompts
from fedlora_app.evaluation.semantic import Embedder
from fedlora_app.model.base import compute_dtype, describe_device, uses_4bit
from fedlora_app.runs.manifest import find_kept
from fedlora_app.runs.reading import SavedRun

CHUNK = 256  # prompts between two writes of the scores that a stopped evaluation keeps

Report = Callable[[str, int, int], None]
"""Called with who answers, how many prompts are done, and how many there are in all."""


@dataclass(frozen=True)
class Cell:
    """One question set of one client, and who answers it under which system prompt."""

    client: str
    question_set: str
    answering: Answering
    system_prompt: str
    questions: tuple[Question, ...]
    prompt_kind: str = "own"


Answers = dict[Cell, list[Answered]]


@dataclass(frozen=True)
class SavedRound(SavedAdapters):
    """A complete round with its adapters and the clients' files, all of them checked."""

    hashes: dict[str, str]
    """sha256 of the global adapter and of each client's own ones, as in the manifest."""
    files: dict[str, ClientFiles]
    absent: tuple[str, ...] = ()
    """Clients that have trained in none of the rounds, and are not asked."""


def open_round(
    run: SavedRun,
    root: Path,
    server_round: int | None = None,
    combine: Combination | None = None,
) -> SavedRound:
    """Check a round's adapters and all clients' files before anything large is loaded.

    Clients that have never had an adapter are left out; their answers to conflict questions stay
    among the wrong ones.

    Args:
        combine: how both adapters answer together; None: as the run's configuration says.

    Raises:
        RunDirectoryError, DataError: naming what is missing or was changed.
        ConfigError: a combination has no effect, or clients' own settings are not here.
    """
    chosen = run.final_round if server_round is None else server_round
    run, absent = _leave_out_absent(run, chosen)
    run.config.require_clients()
    config, trained = run.config, run.plan(chosen).trained
    hashes = {}
    if GLOBAL in trained:
        hashes[GLOBAL] = run.adapter_sha256(chosen)
    if LOCAL in trained:
        hashes |= {f"{LOCAL}:{c}": run.adapter_sha256(chosen, c) for c in config.client_ids}
    if GLOBAL in trained and config.federated.rule in PERSONAL:
        hashes |= {
            f"{OWN_GLOBAL}:{c}": run.adapter_sha256(chosen, c, OWN_GLOBAL)
            for c in config.client_ids
        }
    files = load_all_files(config, root)
    return SavedRound(run, chosen, root, hashes, files, absent, combine=combine)


def _leave_out_absent(run: SavedRun, server_round: int) -> tuple[SavedRun, tuple[str, ...]]:
    """Return a run without the clients that have never had a local adapter, and who they are."""
    config = run.config
    if LOCAL not in run.plan(server_round).trained:
        return run, ()
    present = find_kept(run.manifest, LOCAL, server_round)
    absent = tuple(client for client in config.client_ids if client not in present)
    if not absent or not present:
        return run, ()
    raw = config.dump()
    leave_out(raw, absent)
    names = ", ".join(absent)
    source = f"Without {names}, the configuration of {run.path}"
    return replace(run, config=parse_config(raw, source=source)), absent


def describe_precision(config: ModelConfig) -> str:
    """Return what scores were computed on: the device and the numbers' precision."""
    bits = "4-bit, " if uses_4bit(config) else ""
    return f"{bits}{compute_dtype(config)}, {describe_device()}"


@dataclass
class Evaluator:
    """Scores cells with a round's adapters; the base model is loaded at the first need."""

    saved: SavedRound
    store: ScoreStore
    report: Report
    embedder: Embedder | None = None
    """Compares generated answers with the candidates in meaning."""
    base_store: ScoreStore | None = None
    """The base model's own scores, where several runs share them."""
    model: SavedModel = field(init=False)

    def __post_init__(self) -> None:
        """Name the adapters that are to answer; nothing is loaded yet."""
        saved = self.saved
        self.model = SavedModel(saved.run, saved.server_round, saved.root, combine=saved.combine)

    def evaluate(self, cells: Sequence[Cell]) -> dict[Cell, list[Score]]:
        """Score every question of every cell, with PMI against an empty question."""
        asked: dict[Answering, dict[Prompt, None]] = defaultdict(dict)
        for cell in cells:
            asked[cell.answering].update(dict.fromkeys(_ask(cell)))
            for who in self._behind_gate(cell.answering).values():
                asked[who].update(dict.fromkeys(_ask_nothing(cell)))
        total = sum(map(len, asked.values()))
        done = 0
        for answering, prompts in asked.items():
            self._answer(answering, list(prompts), done, total)
            done += len(prompts)
        answers = {cell: self._collect(cell) for cell in cells}
        if self.embedder is not None:
            answers = self._compare_meanings(self.embedder, answers)
        return {
            cell: [score_answer(q, a) for q, a in zip(cell.questions, answered, strict=True)]
            for cell, answered in answers.items()
        }

    def _compare_meanings(self, embedder: Embedder, answers: Answers) -> Answers:
        texts = [a.generated for answered in answers.values() for a in answered]
        texts += [text for cell in answers for q in cell.questions for text in q.candidates]
        embedder.embed(texts, partial(self.report, "meanings"))
        return {
            cell: [
                replace(a, similarities=embedder.compare(a.generated, q.candidates))
                for q, a in zip(cell.questions, answered, strict=True)
            ]
            for cell, answered in answers.items()
        }

    def _answer(self, answering: Answering, prompts: list[Prompt], done: int, total: int) -> None:
        who = self._identify(answering)
        store = self._store(answering)
        missing = [prompt for prompt in prompts if store.get(who, prompt) is None]
        done += len(prompts) - len(missing)
        if not missing:
            return
        self.report(answering.label, done, total)
        loaded, _ = self.model.load()
        settings = self.saved.run.config.evaluation
        missing.sort(key=lambda prompt: len(prompt.question) + sum(map(len, prompt.candidates)))
        if left := self._find_left_to_global(answering, missing, loaded.tokenizer):
            alone = Answering(with_global=True, global_of=answering.global_of)
            self._answer(alone, list(left), done, total)
            shared = [self.store.get(self._identify(alone), prompt) for prompt in left]
            answers = [
                replace(answer, openness=openness)
                for answer, openness in zip(shared, left.values(), strict=True)
            ]
            store.add(who, list(left), answers)
            missing = [prompt for prompt in missing if prompt not in left]
            done += len(left)
        with self.model.answering(answering) as (model, combiner):
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]

                def report(count: int, before: int = done + start) -> None:
                    self.report(answering.label, before + count, total)

                answers = score_prompts(
                    model,
                    loaded.tokenizer,
                    chunk,
                    batch_size=settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                    combiner=combiner,
                    progress=report,
                )
                store.add(who, chunk, answers)

    def _find_left_to_global(
        self, answering: Answering, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> dict[Prompt, float | None]:
        """Return the prompts that the global adapter answers alone, with the gate's openness."""
        with self.model.answering(answering) as (model, combiner):
            if combiner is None:
                return {}
            ids = [combiner.encode(tokenizer, prompt.question) for prompt in prompts]
            weights = combiner.find_weights(model, ids)
            openness = combiner.find_openness(model, ids)
        found = zip(prompts, weights, openness, strict=True)
        return {prompt: value for prompt, weight, value in found if weight == GLOBAL_ALONE}

    def _behind_gate(self, answering: Answering) -> dict[bool, Answering]:
        return answering.behind_gate(self.saved.run.config.adapters)

    def _store(self, answering: Answering) -> ScoreStore:
        shares = self.base_store is not None and not answering.adapters
        return self.base_store if shares else self.store

    def _collect(self, cell: Cell) -> list[Answered]:
        who = self._identify(cell.answering)
        # A candidate's prior is of the adapters that answered the question, not of those that the
        # gate would have answer none.
        priors: dict[bool, dict[str, float]] = {True: {}, False: {}}
        for is_open, behind in self._behind_gate(cell.answering).items():
            for prompt in _ask_nothing(cell):
                found = self._store(behind).get(self._identify(behind), prompt)
                values = found.log_likelihoods
                priors[is_open].update(zip(prompt.candidates, values, strict=True))
        collected = []
        for question, prompt in zip(cell.questions, _ask(cell), strict=True):
            answered = self._store(cell.answering).get(who, prompt)
            order = [prompt.candidates.index(text) for text in question.candidates]
            sorted_back = Answered(
                tuple(answered.log_likelihoods[i] for i in order),
                answered.generated,
                tuple(priors[answered.is_own][text] for text in question.candidates),
                answered.openness,
            )
            collected.append(sorted_back)
        return collected

    def _identify(self, answering: Answering) -> str:
        """Return a key that changes with any adapter's bytes, the scale and the combination."""
        hashes = self.saved.hashes
        parts = []
        if answering.with_global:
            own = hashes.get(f"{OWN_GLOBAL}:{answering.global_of}")
            parts = [own or hashes[GLOBAL]]
            if own is None and answering.global_of is not None:
                rank = self.saved.run.config.adapters_of(answering.global_of).global_.rank
                parts.append(f"its first {rank} ranks")
        if answering.local is not None:
            parts += [hashes[f"{LOCAL}:{answering.local}"], f"{answering.scale:g}"]
        parts += [answering.combination(self.saved.run.config.adapters)] if parts else []
        return f"{answering.label} {'+'.join(parts)}"


def open_store(saved: SavedRound, path: Path) -> ScoreStore:
    """Return the scores that a stopped evaluation of this run left, or none."""
    settings: list[Any] = [saved.combination, GATE_FORMAT]
    if saved.combination in FITTED:
        settings.append(FITTED[saved.combination].FORMAT)
    if saved.combination != SCALE:  # it is fitted to training and validation records
        settings += [f.hashes for f in saved.files.values()]
    return ScoreStore(path, _identify_context(saved, settings))


def open_base_store(saved: SavedRound, path: Path) -> ScoreStore:
    """Return what the base model has answered to these or other runs."""
    return ScoreStore(path, _identify_context(saved, []))


def _identify_context(saved: SavedRound, settings: list[Any]) -> str:
    """Return a key of ``settings`` and of what every score depends on."""
    config = saved.run.config
    settings = [*settings, config.model.model_dump(), saved.run.manifest["base_model"]]
    settings += [config.evaluation.max_new_tokens, config.evaluation.batch_size]
    settings += [describe_precision(config.model), saved.run.date]
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ask(cell: Cell) -> list[Prompt]:
    """Return the prompts of a cell, in an order of candidates that clients have in common."""
    return [Prompt(cell.system_prompt, q.text, tuple(sorted(q.candidates))) for q in cell.questions]


def _ask_nothing(cell: Cell) -> Iterator[Prompt]:
    return ask_nothing(cell.system_prompt, (t for q in cell.questions for t in q.candidates))
