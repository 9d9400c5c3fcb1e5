"""Weights by instance: the more a question is like local training questions, the more of local.

FedDPA (Yang et al. 2024, https://arxiv.org/abs/2403.19211): for a question x and S training
questions x_s of the client,

    alpha(x) = FACTOR * mean over s of cos(h(x), h(x_s)),

where h is the last layer's state of the last token with the local adapter active, as in the
authors' public code; the local adapter then has the weight alpha and the global one 1 - alpha.
There S = 5 questions are drawn anew for every question. Here ``NUM_INSTANCES`` are drawn once, by
the experiment's seed, so that an answer does not depend on the draw.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch

from fedlora_app.config.combination import INSTANCE
from fedlora_app.config.schema import LOCAL
from fedlora_app.data.records import format_question
from fedlora_app.evaluation.combiner import Weights, encode_judged
from fedlora_app.evaluation.fitted import FittedCombiner, FittingTask, require_shape
from fedlora_app.evaluation.fitted_files import Tensors
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.model.adapters import AdaptedModel, alone_at_full_scale

NUM_INSTANCES = 32
FACTOR = 0.5
"""What the mean similarity is multiplied by, the public code's default."""
DIGITS = 2
"""Weights are rounded to so many: those that are alike go through the model together."""


@dataclass(frozen=True)
class InstanceWeights(FittedCombiner):
    """Weighs a question by its mean cosine to training questions, unit vectors (S, D) in fp32."""

    NAME = INSTANCE
    FORMAT = 1
    ADAPTERS = (LOCAL,)
    FILES = ("local_train",)

    instances: torch.Tensor
    system_prompt: str = ""
    _known: dict[tuple[int, ...], Weights] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, task: FittingTask) -> Self:
        """Draw training questions; few that there are, are all taken."""
        questions = list(dict.fromkeys(map(format_question, task.files.local.records)))
        count = min(NUM_INSTANCES, len(questions))
        drawn = random.Random(task.seed(INSTANCE)).sample(questions, count)
        prompt = task.client.system_prompt
        prompts = [encode_judged(task.tokenizer, prompt, question) for question in drawn]
        states = torch.nn.functional.normalize(see(task.model, prompts), dim=-1)
        return cls(states.float(), prompt)

    def find_weights(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[Weights]:
        """Return 1 - alpha and alpha of each prompt, rounded."""
        missing = [
            list(ids) for ids in dict.fromkeys(map(tuple, prompts)) if ids not in self._known
        ]
        if missing:
            for ids, share in zip(missing, self.weigh(see(model, missing)).tolist(), strict=True):
                of_local = round(share, DIGITS)
                self._known[tuple(ids)] = Weights(round(1 - of_local, DIGITS), of_local)
        return [self._known[tuple(ids)] for ids in prompts]

    def weigh(self, states: torch.Tensor) -> torch.Tensor:
        """Return alpha of states (B, D), (B,) in [0, 1]."""
        units = torch.nn.functional.normalize(states.double(), dim=-1)
        return (FACTOR * (units @ self.instances.double().T).mean(1)).clamp(0, 1)

    def dump(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the training questions' states."""
        return {"instances": self.instances}, {"factor": FACTOR}

    @classmethod
    def restore(cls, tensors: Tensors, content: Mapping[str, Any], system_prompt: str) -> Self:
        """Return what was dumped."""
        return cls(require_shape(tensors, "instances", None, None), system_prompt)


def see(model: AdaptedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Return the last state of each prompt (B, D), fp64, with the local adapter alone."""
    return compute_features(model, prompts, partial(alone_at_full_scale, name=LOCAL))[1]
