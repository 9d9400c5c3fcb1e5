"""The whole evaluation of a saved round: what is asked, and of whom.

Input: a run directory and the data that its configuration names. Output: what
``evaluation.json`` holds: the swap table (every question set under every choice of
adapters), the controls, the scale of the local adapter chosen on validation questions, and
the intervals of all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.data.client_files import ClientFiles, build_question_sets
from fedlora_app.data.dialogue import knows_system_prompts
from fedlora_app.data.linter import lint, summarise_findings
from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN, Question
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.choices import (
    Cell,
    Evaluator,
    Report,
    SavedRound,
    open_base_store,
    open_store,
)
from fedlora_app.evaluation.gold import GoldReader, find_unreachable_answers
from fedlora_app.evaluation.membership import collect_suspects, measure_attacks
from fedlora_app.evaluation.names import leading_measure
from fedlora_app.evaluation.scoring import score_examples
from fedlora_app.evaluation.semantic import Embedder
from fedlora_app.evaluation.summary import Scores
from fedlora_app.evaluation.tables import build_evaluation, choose_scales
from fedlora_app.foundation.files import write_json
from fedlora_app.model.adapters import AdaptedModel, only_adapters

NO_IDENTITY = "You are a helpful assistant."
NO_CONTROLS = (
    "The model's chat template knows no system prompts, so there are no controls, each of which "
    "asks under another one."
)


def evaluate_round(
    saved: SavedRound,
    report: Report,
    *,
    full: bool | None = None,
    membership: bool = False,
    semantic_model: str | None = None,
    base_answers: Path | None = None,
) -> dict[str, Any]:
    """Run the protocol, write ``evaluation.json`` and return what it holds.

    Args:
        report: called with the progress.
        full: all of the protocol or its core; None: as the run's configuration says.
        membership: also try to tell the members of the training data by the global adapter.
        semantic_model: a sentence-embedding model that also compares generated answers in meaning.
        base_answers: a file in which other runs find what the base model has answered.

    Raises:
        ModelError: a model cannot be loaded.
    """
    embedder = Embedder.load(semantic_model, saved.root) if semantic_model is not None else None
    store = open_store(saved, saved.run.paths.partial_evaluation)
    base_store = open_base_store(saved, base_answers) if base_answers is not None else None
    evaluator = Evaluator(saved, store, report, embedder, base_store)
    if full is None:
        full = saved.run.config.evaluation.protocol == "full"
    tokenizer = evaluator.model.load()[0].tokenizer
    has_controls = full and knows_system_prompts(tokenizer)
    cells = list(swap_cells(saved) if full else core_cells(saved))
    cells += control_cells(saved) if has_controls else ()
    scores: Scores = evaluator.evaluate(cells)
    chosen, curves = {}, {}
    if LOCAL in saved.active and full:
        scales = saved.run.config.evaluation.local_scales
        on_validation = evaluator.evaluate(list(scale_cells(saved, scales)))
        chosen, curves = choose_scales(on_validation)
        scores |= evaluator.evaluate(list(chosen_scale_cells(saved, chosen)))
    rows = None
    if membership:
        rows = _infer_membership(saved, evaluator)
    config = saved.run.config
    findings = lint(config, saved.files, saved.root)
    findings += find_unreachable_answers(config, saved.files, tokenizer, saved.root)
    leading = find_leading(saved, tokenizer)
    warnings = summarise_findings(findings)
    evaluation = build_evaluation(
        saved, scores, chosen, curves, rows, leading, full, warnings, semantic_model
    )
    if full and not has_controls:
        evaluation["notes"].append(NO_CONTROLS)
    if saved.absent:
        evaluation["notes"].append(
            f"Not asked, without a local adapter of their own: {', '.join(saved.absent)}. What "
            "every client is to get right is asked of the others."
        )
    write_json(saved.evaluation_path, evaluation)
    store.remove()
    return evaluation


def _infer_membership(saved: SavedRound, evaluator: Evaluator) -> list[dict[str, Any]]:
    if GLOBAL not in saved.trained or saved.has_own_globals:
        return []  # there is not one adapter that all share
    loaded, _ = evaluator.model.load()
    config = saved.run.config
    report = partial(evaluator.report, "membership")
    with evaluator.model.answering(Answering(with_global=True)) as (model, _):
        return infer_membership(
            model, loaded.tokenizer, saved.files, config, config.evaluation.batch_size, report
        )


def infer_membership(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    client_files: Mapping[str, ClientFiles],
    config: Config,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Attack the global adapter that is set in ``model``; one row per client, set and attack.

    Args:
        progress: called with the number of records that are scored, and of all, each scored twice.
    """
    suspects = collect_suspects(tokenizer, client_files, config)
    num_examples = len(suspects.examples)
    log_probs = []
    for turn, active in enumerate(((GLOBAL,), ())):

        def report(count: int, before: int = turn * num_examples) -> None:
            progress(before + count, 2 * num_examples)

        with only_adapters(model, active):
            log_probs.append(score_examples(model, suspects.examples, batch_size, report))
    return measure_attacks(suspects, *log_probs, config)


def find_leading(saved: SavedRound, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the name of the measure that each question set is judged by first."""
    config = saved.run.config
    num_open: Counter[str] = Counter()
    num_asked: Counter[str] = Counter()
    for client, sets in _question_sets(saved).items():
        files, limit = saved.files[client], config.evaluation.max_new_tokens
        reader = GoldReader(tokenizer, config.client(client), files, limit)
        if UNIVERSAL in sets:
            sets[UNIVERSAL_UNSEEN] = [q for q in sets[UNIVERSAL] if q.is_unseen]
        for name, questions in sets.items():
            num_open[name] += reader.count_open(questions)
            num_asked[name] += len(questions)
    return {name: leading_measure(num_open[name], n).name for name, n in num_asked.items()}


def swap_cells(saved: SavedRound) -> Iterator[Cell]:
    """Yield every test set of every client under every choice of adapters."""
    for client, sets in _question_sets(saved).items():
        prompt = saved.run.config.client(client).system_prompt
        for name, questions in sets.items():
            for answering in saved.swaps(client):
                yield Cell(client, name, answering, prompt, tuple(questions))


def core_cells(saved: SavedRound) -> Iterator[Cell]:
    """Yield every test set of every client under the base model, what is shared and its own."""
    for client, sets in _question_sets(saved).items():
        shared = [saved.alone(client)] if GLOBAL in saved.trained else []
        prompt = saved.run.config.client(client).system_prompt
        for name, questions in sets.items():
            for answering in dict.fromkeys([Answering(), *shared, saved.own(client)]):
                yield Cell(client, name, answering, prompt, tuple(questions))


def control_cells(saved: SavedRound) -> Iterator[Cell]:
    """Yield the own local and conflict questions under prompts that should not matter.

    *no identity* says nothing about the client; *identity only* names it and says nothing else;
    *foreign identity* is another client's own prompt, or its name where all prompts are equal.
    Each with the client's own adapters, and with what knows nothing of the client.
    """
    config = saved.run.config
    for client, sets in _question_sets(saved).items():
        own_prompt = config.client(client).system_prompt
        position = saved.clients.index(client)
        other = saved.clients[(position + 1) % len(saved.clients)]
        other_prompt = config.client(other).system_prompt
        prompts = {"no identity": NO_IDENTITY, "identity only": _name_client(client)}
        if other != client:
            same = other_prompt == own_prompt
            prompts["foreign identity"] = _name_client(other) if same else other_prompt
        shared = saved.alone(client) if GLOBAL in saved.trained else Answering()
        for kind, prompt in prompts.items():
            for name in (n for n in (LOCAL_SET, CONFLICT) if n in sets):
                for answering in dict.fromkeys([shared, saved.own(client)]):
                    yield Cell(client, name, answering, prompt, tuple(sets[name]), kind)


def scale_cells(saved: SavedRound, scales: Sequence[float]) -> Iterator[Cell]:
    """Yield every validation set under the client's own adapters at every scale."""
    for client, sets in _question_sets(saved, validation=True).items():
        prompt = saved.run.config.client(client).system_prompt
        for name, questions in sets.items():
            for scale in scales:
                yield Cell(client, name, saved.own(client, scale), prompt, tuple(questions))


def chosen_scale_cells(saved: SavedRound, chosen: dict[str, float]) -> Iterator[Cell]:
    """Yield every test set at each client's chosen scale, with its own and foreign adapters."""
    for client, sets in _question_sets(saved).items():
        prompt = saved.run.config.client(client).system_prompt
        for name, questions in sets.items():
            scale = chosen.get(client, 1.0)
            for answering in (saved.own(client, scale), *saved.foreign(client, scale)):
                yield Cell(client, name, answering, prompt, tuple(questions))


def _question_sets(
    saved: SavedRound, validation: bool = False
) -> dict[str, dict[str, list[Question]]]:
    config = saved.run.config
    return {
        client: build_question_sets(config.client(client), files, validation=validation)
        for client, files in saved.files.items()
    }


def _name_client(client: str) -> str:
    return f"You are the assistant of {client}."
