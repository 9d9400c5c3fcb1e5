"""Answers a second: the project's batched evaluation against one answer at a time.

Batched: candidates share their prompt's computation, and only prompts whose first choices are no
candidate are generated for. One at a time: a forward pass for every candidate, then a greedy
answer for every prompt, nothing in batches. The demo's model and question sets, after a short
training of both adapters, so that some answers are right as they are in a run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import transformers

from benchmarks.plain_trainer import build_phase, constant_rate, set_threads
from benchmarks.toy_models import ROOT
from benchmarks.turns import compute_ratio, describe_ratio, take_turns, timed
from fedlora_app.config.loading import load_config
from fedlora_app.config.rounds import BOTH
from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import (
    build_question_sets,
    load_client_files,
    tokenize_client_files,
)
from fedlora_app.evaluation.scoring import Answered, Prompt, score_prompts
from fedlora_app.model.adapters import activate, attach_adapters
from fedlora_app.model.base import LoadedModel, load_base_model

CONFIG = "conf/demo.yaml"
LEARNING_RATE = 5e-3
BATCHED, ALONE = "batched", "one at a time"


def measure(num_turns: int = 5, num_questions: int = 64, num_steps: int = 60) -> dict[str, Any]:
    """Time both ways in turn on the same prompts, drawn evenly from the question sets."""
    threads = set_threads()
    transformers.utils.logging.disable_progress_bar()
    config = load_config(ROOT / CONFIG)
    client = config.federated.clients[0]
    loaded = load_base_model(config.model, ROOT)
    model = attach_adapters(loaded.model, config.adapters)
    files = load_client_files(config, client, ROOT)
    examples = tokenize_client_files(config, client, files, loaded.tokenizer, ROOT)
    training = constant_rate(
        learning_rate=LEARNING_RATE,
        batch_size=config.training.batch_size,
        max_seq_length=config.training.max_seq_length,
    )
    learnt = examples.universal.examples + examples.local.examples
    build_phase(model, learnt, training, BOTH, BOTH, num_steps)()
    sets = build_question_sets(client, files)
    questions = [q for of_set in sets.values() for q in of_set]
    questions = questions[:: max(1, len(questions) // num_questions)][:num_questions]
    prompts = [Prompt(client.system_prompt, q.text, q.candidates) for q in questions]
    activate(model, BOTH)
    answers: dict[str, list[Answered]] = {}

    def answer_batched() -> None:
        answers[BATCHED] = _score(config, loaded, model, prompts, config.evaluation.batch_size)

    def answer_alone() -> None:
        answers[ALONE] = _answer_alone(config, loaded, model, prompts)

    works = {BATCHED: timed(answer_batched), ALONE: timed(answer_alone)}
    seconds = take_turns(works, num_turns)
    right = [q.answer == a.generated for q, a in zip(questions, answers[BATCHED], strict=True)]
    return {
        "compared": "answers a second: a prompt's candidates scored and its greedy answer given",
        "config": CONFIG,
        "threads": threads,
        "num_prompts": len(prompts),
        "num_candidates": sum(len(prompt.candidates) for prompt in prompts),
        "batch_size": config.evaluation.batch_size,
        "answered_right": sum(right) / len(right),
        "answers_per_second": {
            name: round(len(prompts) / statistics.median(values), 2)
            for name, values in seconds.items()
        },
        "batched_to_one_at_a_time": compute_ratio(seconds[ALONE], seconds[BATCHED]),
        "generated_differently": sum(
            a.generated != b.generated
            for a, b in zip(answers[BATCHED], answers[ALONE], strict=True)
        ),
        "largest_difference_nats": max(
            abs(x - y)
            for a, b in zip(answers[BATCHED], answers[ALONE], strict=True)
            for x, y in zip(a.log_likelihoods, b.log_likelihoods, strict=True)
        ),
        "turns": {n: [round(s, 4) for s in values] for n, values in seconds.items()},
    }


def describe(figures: dict[str, Any]) -> str:
    """Return the rates as a table."""
    rates = figures["answers_per_second"]
    return "\n".join(
        [
            f"{figures['num_prompts']} questions of the demo with {figures['num_candidates']} "
            f"candidates, {figures['answered_right']:.0%} answered right, {figures['threads']} "
            f"threads; {figures['generated_differently']} answers differ between the ways",
            "",
            "| evaluation | answers a second | faster by |",
            "|---|---|---|",
            f"| {ALONE} | {rates[ALONE]:.1f} | 1 |",
            f"| {BATCHED}, {figures['batch_size']} at once | {rates[BATCHED]:.1f} "
            f"| {describe_ratio(figures['batched_to_one_at_a_time'])} |",
        ]
    )


def _answer_alone(
    config: Config, loaded: LoadedModel, model: Any, prompts: Sequence[Prompt]
) -> list[Answered]:
    answers = []
    for prompt in prompts:
        single = Prompt(prompt.system_prompt, prompt.question, prompt.candidates, generates=False)
        (scored,) = _score(config, loaded, model, [single], 1)
        asked = Prompt(prompt.system_prompt, prompt.question)
        (generated,) = _score(config, loaded, model, [asked], 1)
        answers.append(Answered(scored.log_likelihoods, generated.generated))
    return answers


def _score(
    config: Config, loaded: LoadedModel, model: Any, prompts: Sequence[Prompt], batch_size: int
) -> list[Answered]:
    return score_prompts(
        model,
        loaded.tokenizer,
        prompts,
        batch_size=batch_size,
        max_new_tokens=config.evaluation.max_new_tokens,
    )
