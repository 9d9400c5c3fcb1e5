"""A saved round and who answers: choices of its adapters, and the scores that they give.

Questions are collected by the adapters that are to answer them, so each choice of adapters is
set up once, and a question that several clients share is scored once. Scores are kept in a
file as they come, so that a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_app.adapters import (
    GLOBAL,
    LOCAL,
    AdaptedModel,
    AdapterState,
    activate,
    attach_adapters,
    base_only,
    load_adapter,
    scaled_local,
    set_state,
)
from fedlora_app.client_data import ClientFiles, load_all_files
from fedlora_app.config import ModelConfig
from fedlora_app.evaluation.metrics import Score, score_answer
from fedlora_app.evaluation.questions import Question
from fedlora_app.evaluation.scoring import CANDIDATES_PER_ROW, Answered, Prompt, score_prompts
from fedlora_app.gate import Gate, fit_gate
from fedlora_app.model import (
    LoadedModel,
    ModelError,
    compute_dtype,
    describe_device,
    load_base_model,
    uses_4bit,
)
from fedlora_app.rounds import plan_round
from fedlora_app.saved_run import SavedRun

NUM_FOREIGN = 3  # other clients' local adapters tried per client, of however many there are
CHUNK = 256  # prompts between two writes of the scores that a stopped evaluation keeps

Report = Callable[[str, int, int], None]
"""Called with who answers, how many prompts are done, and how many there are in all."""


@dataclass(frozen=True)
class Answering:
    """Which adapters answer: the global one or not, and whose local one, at which scale."""

    with_global: bool = False
    local: str | None = None
    scale: float = 1.0

    @property
    def label(self) -> str:
        """``base``, ``global``, ``local:<id>`` or ``global+local:<id>``."""
        parts = [GLOBAL] if self.with_global else []
        parts += [f"{LOCAL}:{self.local}"] if self.local else []
        return "+".join(parts) or "base"


@dataclass(frozen=True)
class Cell:
    """One question set of one client, and who answers it under which system prompt."""

    client: str
    question_set: str
    answering: Answering
    system_prompt: str
    questions: tuple[Question, ...]
    prompt_kind: str = "own"


@dataclass(frozen=True)
class SavedRound:
    """A complete round with its adapters and the clients' files, all of them checked."""

    run: SavedRun
    server_round: int
    root: Path
    hashes: dict[str, str]
    """sha256 of the global adapter and of each client's local one, as in the manifest."""
    files: dict[str, ClientFiles]

    @property
    def active(self) -> tuple[str, ...]:
        """What a client answers with in this mode."""
        return plan_round(self.run.config, self.run.config.federated.num_rounds).evaluated

    @property
    def clients(self) -> list[str]:
        """The clients, in order."""
        return list(self.files)

    def own(self, client: str, scale: float = 1.0) -> Answering:
        """Return what that client answers with."""
        return Answering(GLOBAL in self.active, client if LOCAL in self.active else None, scale)

    def foreign(self, client: str, scale: float = 1.0) -> list[Answering]:
        """Return the client's adapters with other clients' local ones in the place of its own."""
        if LOCAL not in self.active:
            return []
        others = self.clients
        position = others.index(client)
        ring = (others[position + 1 :] + others[:position])[:NUM_FOREIGN]
        return [Answering(GLOBAL in self.active, other, scale) for other in ring]

    def swaps(self, client: str) -> list[Answering]:
        """Return every choice of adapters that the swap table tries on a client's questions."""
        choices = [Answering()]
        if GLOBAL in self.active:
            choices.append(Answering(with_global=True))
        if LOCAL in self.active:
            choices.append(Answering(local=client))
        return list(dict.fromkeys([*choices, self.own(client), *self.foreign(client)]))


def open_round(run: SavedRun, root: Path, server_round: int | None = None) -> SavedRound:
    """Check a round's adapters and all clients' files before anything large is loaded.

    Raises:
        RunDirectoryError, DataError: naming what is missing or was changed.
    """
    chosen = run.last_round if server_round is None else server_round
    config = run.config
    active = plan_round(config, config.federated.num_rounds).evaluated
    hashes = {}
    if GLOBAL in active:
        hashes[GLOBAL] = run.adapter_sha256(chosen)
    if LOCAL in active:
        hashes |= {f"{LOCAL}:{c}": run.adapter_sha256(chosen, c) for c in config.client_ids}
    return SavedRound(run, chosen, root, hashes, load_all_files(config, root))


def describe_precision(config: ModelConfig) -> str:
    """Return what scores were computed on: the device and the numbers' precision."""
    bits = "4-bit, " if uses_4bit(config) else ""
    return f"{bits}{compute_dtype(config)}, {describe_device()}"


class ScoreStore:
    """Scores by adapters and prompt, kept in a file so that a stopped evaluation goes on.

    Args:
        path: JSON Lines beside the run; a last line that a stop has cut is dropped.
        context: what scores depend on beside adapters and prompt; others are ignored.
    """

    def __init__(self, path: Path, context: str) -> None:
        self._path = path
        self._context = context
        self._scores: dict[tuple[str, ...], Answered] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)

    def get(self, who: str, prompt: Prompt) -> Answered | None:
        """Return a prompt's score under the adapters ``who``."""
        return self._scores.get(_store_key(who, prompt))

    def add(self, who: str, prompts: Sequence[Prompt], answers: Sequence[Answered]) -> None:
        """Keep scores, in memory and in the file."""
        with self._path.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(prompts, answers, strict=True):
                key = _store_key(who, prompt)
                self._scores[key] = answer
                row = [self._context, *key, answer.log_likelihoods, answer.generated]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """Delete the file: the evaluation is complete."""
        self._path.unlink(missing_ok=True)

    def _read(self, line: str) -> None:
        try:
            context, who, prompt, values, generated = json.loads(line)
        except ValueError:
            return
        if context == self._context:
            self._scores[(who, prompt)] = Answered(tuple(values), generated)


@dataclass
class Evaluator:
    """Scores cells with a round's adapters; the base model is loaded at the first need."""

    saved: SavedRound
    store: ScoreStore
    report: Report
    _states: dict[str, AdapterState] = field(default_factory=dict)
    _gates: dict[str, Gate] = field(default_factory=dict)

    def evaluate(self, cells: Sequence[Cell]) -> dict[Cell, list[Score]]:
        """Score every question of every cell, with PMI against an empty question."""
        asked: dict[Answering, dict[Prompt, None]] = defaultdict(dict)
        for cell in cells:
            prompts = [*_ask(cell), *_ask_nothing(cell)]
            asked[cell.answering].update(dict.fromkeys(prompts))
        total = sum(map(len, asked.values()))
        done = 0
        for answering, prompts in asked.items():
            self._answer(answering, list(prompts), done, total)
            done += len(prompts)
        return {cell: self._collect(cell) for cell in cells}

    def load(self) -> tuple[LoadedModel, AdaptedModel]:
        """Return the base model, and with its adapters' modules on it."""
        config = self.saved.run.config
        loaded = load_base_model(config.model, self.saved.root)
        recorded = self.saved.run.manifest["base_model"].get("fingerprint", loaded.fingerprint)
        if loaded.fingerprint != recorded:
            raise ModelError(
                f"The base model {config.model.name} is not the one that the run was trained on: "
                f"its fingerprint is {loaded.fingerprint[:12]}, in manifest.json {recorded[:12]}. "
                "Restore the weight files, or set model.revision."
            )
        if loaded.adapted is None or loaded.adapted[0] != config.adapters:
            loaded.adapted = (config.adapters, attach_adapters(loaded.model, config.adapters))
        return loaded, loaded.adapted[1]

    def set_adapters(self, model: AdaptedModel, answering: Answering) -> None:
        """Fill and activate the adapters that are to answer."""
        if answering.with_global:
            set_state(model, GLOBAL, self._state(model, None))
        if answering.local is not None:
            set_state(model, LOCAL, self._state(model, answering.local))
        names = (GLOBAL,) * answering.with_global + (LOCAL,) * (answering.local is not None)
        if names:
            activate(model, names)

    def _answer(self, answering: Answering, prompts: list[Prompt], done: int, total: int) -> None:
        who = self._identify(answering)
        missing = [prompt for prompt in prompts if self.store.get(who, prompt) is None]
        done += len(prompts) - len(missing)
        if not missing:
            return
        self.report(answering.label, done, total)
        loaded, model = self.load()
        self.set_adapters(model, answering)
        gate = self._gate(loaded, model, answering)
        settings = self.saved.run.config.evaluation
        missing.sort(key=lambda prompt: len(prompt.question) + sum(map(len, prompt.candidates)))
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            answered_before = done + start

            def report(count: int, before: int = answered_before) -> None:
                self.report(answering.label, before + count, total)

            with ExitStack() as stack:
                if answering.label == "base":
                    stack.enter_context(base_only(model))
                if answering.local is not None:
                    stack.enter_context(scaled_local(model, answering.scale))
                answers = score_prompts(
                    model,
                    loaded.tokenizer,
                    chunk,
                    batch_size=settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                    gate=gate,
                    progress=report,
                )
            self.store.add(who, chunk, answers)

    def _collect(self, cell: Cell) -> list[Score]:
        who = self._identify(cell.answering)
        unconditional: dict[str, float] = {}
        for prompt in _ask_nothing(cell):
            values = self.store.get(who, prompt).log_likelihoods
            unconditional.update(zip(prompt.candidates, values, strict=True))
        scores = []
        for question, prompt in zip(cell.questions, _ask(cell), strict=True):
            answered = self.store.get(who, prompt)
            order = [prompt.candidates.index(text) for text in question.candidates]
            sorted_back = Answered(
                tuple(answered.log_likelihoods[i] for i in order),
                answered.generated,
            )
            scores.append(score_answer(question, sorted_back, unconditional))
        return scores

    def _identify(self, answering: Answering) -> str:
        """Return a key that changes with any adapter's bytes and with the scale."""
        hashes = self.saved.hashes
        parts = [hashes[GLOBAL]] if answering.with_global else []
        if answering.local is not None:
            parts += [hashes[f"{LOCAL}:{answering.local}"], f"{answering.scale:g}"]
        return f"{answering.label} {'+'.join(parts)}"

    def _gate(self, loaded: LoadedModel, model: AdaptedModel, answering: Answering) -> Gate | None:
        """Return the gate of the local adapter's owner, fitted to its own prompts once."""
        config, owner = self.saved.run.config, answering.local
        if config.adapters.gate == "none" or owner is None or not answering.with_global:
            return None
        if owner not in self._gates:
            files, prompt = self.saved.files[owner], config.client(owner).system_prompt
            records = (files.local.records, files.universal.records)
            self._gates[owner] = fit_gate(model, loaded.tokenizer, prompt, *records)
        return self._gates[owner]

    def _state(self, model: AdaptedModel, client: str | None) -> AdapterState:
        """Return an adapter of the round, read once."""
        key = client or ""
        if key not in self._states:
            if client is not None:  # one local adapter at a time; there may be many clients
                self._states = {k: v for k, v in self._states.items() if k == ""}
            folder = self.saved.run.adapter_folder(self.saved.server_round, client)
            name = self.saved.run.config.model.name
            role = GLOBAL if client is None else LOCAL
            self._states[key] = load_adapter(folder, model, role, name)
        return self._states[key]


def open_store(saved: SavedRound, path: Path) -> ScoreStore:
    """Return the scores that a stopped evaluation of this run left, or none."""
    config = saved.run.config
    settings = [config.model.model_dump(), config.evaluation.max_new_tokens, config.adapters.gate]
    settings += [saved.run.manifest["base_model"], describe_precision(config.model)]
    if config.adapters.gate != "none":  # a gate is fitted to the training prompts
        settings += [(f.universal.sha256, f.local.sha256) for f in saved.files.values()]
    text = json.dumps(settings, sort_keys=True)
    return ScoreStore(path, hashlib.sha256(text.encode()).hexdigest()[:16])


def _ask(cell: Cell) -> list[Prompt]:
    """Return the prompts of a cell, in an order of candidates that clients have in common."""
    return [Prompt(cell.system_prompt, q.text, tuple(sorted(q.candidates))) for q in cell.questions]


def _ask_nothing(cell: Cell) -> Iterator[Prompt]:
    """Yield the candidates under an empty question, whose likelihoods PMI divides by."""
    texts = sorted({text for question in cell.questions for text in question.candidates})
    for start in range(0, len(texts), CANDIDATES_PER_ROW):
        group = tuple(texts[start : start + CANDIDATES_PER_ROW])
        yield Prompt(cell.system_prompt, "", group, generates=False)


def _store_key(who: str, prompt: Prompt) -> tuple[str, str]:
    parts = [prompt.system_prompt, prompt.question, prompt.candidates, prompt.generates]
    content = json.dumps(parts)
    return who, hashlib.sha256(content.encode()).hexdigest()
