"""Constant weights of the two adapters, searched for without gradients.

FDLoRA's fusion (Qi et al. 2024, https://arxiv.org/abs/2406.07925) by LoraHub's objective (Huang et
al. 2023, https://arxiv.org/abs/2307.13269): on a few records Q of the client,

    minimise over (w_G, w_L) in [-1.5, 1.5]^2:  loss(Q; w_G, w_L) + PENALTY * (|w_G| + |w_L|) / 2.

There the factors are weighed, A = sum w A and B = sum w B, whose product has cross terms and takes
equal ranks. Here the products are, w_G s_G B_G A_G + w_L s_L B_L A_L, so that (1, 1) is the pair as
it was trained. The search is Nelder and Mead's (1965, https://doi.org/10.1093/comjnl/7.4.308),
from the pair, global alone and local alone: none of the three is better on Q than what it returns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Self

import numpy as np
import torch
from scipy.optimize import minimize

from fedlora_app.config.combination import SEARCH
from fedlora_app.config.schema import GLOBAL, LOCAL, ClientConfig
from fedlora_app.data.client_files import ClientFiles, build_question_sets
from fedlora_app.data.questions import UNIVERSAL
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import Example, encode_example
from fedlora_app.evaluation.combiner import Weights, weighted_pair
from fedlora_app.evaluation.fitted import (
    TRAIN_FILES,
    VALIDATION_FILES,
    FitError,
    FittedCombiner,
    FittingTask,
    require_shape,
)
from fedlora_app.evaluation.fitted_files import Tensors
from fedlora_app.evaluation.scoring import score_examples
from fedlora_app.foundation.progress import step_lines
from fedlora_app.model.adapters import AdaptedModel
from fedlora_app.model.fused import fused_answering

NUM_RECORDS = 32
"""Of a client's own questions, and as many universal ones."""
BOUND = 1.5
PENALTY = 0.05
MAX_TRIALS = 60
START = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
"""(w_G, w_L) of the pair, of global alone and of local alone."""


@dataclass(frozen=True)
class SearchedWeights(FittedCombiner):
    """Weighs every question alike."""

    NAME = SEARCH
    FORMAT = 1
    ADAPTERS = (GLOBAL, LOCAL)
    FILES = (*TRAIN_FILES, *VALIDATION_FILES)

    weights: Weights
    system_prompt: str = ""

    @classmethod
    def fit(cls, task: FittingTask) -> Self:
        """Search on records drawn by the experiment's seed."""
        records = draw_records(task.client, task.files, task.seed(SEARCH))
        limit = task.config.training.max_seq_length
        encoded = (encode_example(task.tokenizer, task.client.system_prompt, r) for r in records)
        examples = [
            Example(example.input_ids[:limit], example.answer_start)
            for example in encoded
            if example.answer_start < limit
        ]
        if not examples:
            raise FitError(
                f"The weights of {task.client.id}'s adapters cannot be searched for: no record is "
                f"shorter than training.max_seq_length = {limit} tokens."
            )
        batch_size = task.config.evaluation.batch_size
        trials, report = count(1), step_lines(f"{task.client.id}, {SEARCH}")

        def loss(weights: Weights) -> float:
            found = compute_loss(task.model, examples, weights, batch_size)
            report(next(trials), MAX_TRIALS, found)
            return found

        with fused_answering(task.model):
            return cls(search_weights(loss), task.client.system_prompt)

    def find_weights(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[Weights]:
        """Return the same weights for each prompt."""
        return [self.weights] * len(prompts)

    def dump(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the two weights."""
        tensor = torch.tensor(self.weights, dtype=torch.float64)
        return {"weights": tensor}, self.weights._asdict()

    @classmethod
    def restore(cls, tensors: Tensors, content: Mapping[str, Any], system_prompt: str) -> Self:
        """Return what was dumped."""
        weights = require_shape(tensors, "weights", 2)
        return cls(Weights(*weights.tolist()), system_prompt)


def search_weights(loss: Callable[[Weights], float]) -> Weights:
    """Return the weights of the smallest loss with its penalty, as far as the trials go."""

    def objective(values: np.ndarray) -> float:
        return loss(Weights(*values.tolist())) + PENALTY * np.abs(values).mean()

    found = minimize(
        objective,
        START[0],
        method="Nelder-Mead",
        bounds=[(-BOUND, BOUND)] * 2,
        options={
            "initial_simplex": START,
            "maxfev": MAX_TRIALS,
            "xatol": 1e-3,
            "fatol": 1e-4,
        },
    )
    return Weights(*found.x.tolist())


def compute_loss(
    model: AdaptedModel, examples: Sequence[Example], weights: Weights, batch_size: int
) -> float:
    """Return the mean loss of all answer tokens under these weights, in nats."""
    with weighted_pair(model, weights):
        log_probs = score_examples(model, examples, batch_size)
    return -float(np.mean([value for values in log_probs for value in values]))


def draw_records(client: ClientConfig, files: ClientFiles, seed: int) -> list[Record]:
    """Return a client's own records and as many universal ones, with the client's answers.

    Of the validation files, and of the training files where there is none of a kind.
    """
    asked: dict[bool, list[Record]] = {True: [], False: []}
    for name, questions in build_question_sets(client, files, validation=True).items():
        records = [Record(q.text, q.answer) for q in questions if q.answer is not None]
        asked[name != UNIVERSAL] += records
    kinds = (asked[True] or files.local.records, asked[False] or files.universal.records)
    return [
        record
        for records in kinds
        for record in random.Random(seed).sample(records, min(NUM_RECORDS, len(records)))
    ]
