"""A gate before the local adapter: how far a prompt looks like the client's own questions.

A linear discriminant on the frozen base's mean hidden state of the prompt, fitted to the
client's own training prompts, local against universal ones. It is not trained, and it is
refitted from the client's data where it is needed, so nothing of it is stored or sent. The
idea of weighing the local adapter by instance is that of FedDPA (Yang et al. 2024,
https://arxiv.org/abs/2403.19211, section 3.3), which weighs by cosine similarity instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.data.records import Record, format_question
from fedlora_app.data.tokens import encode_prompt
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapters import AdaptedModel, base_only, scaled_local

MAX_PROMPTS = 512  # of either kind; more change the discriminant little
BATCH_SIZE = 32
SHRINKAGE = 0.1  # of the covariance towards its mean variance (Ledoit and Wolf 2004)


@dataclass(frozen=True)
class Gate:
    """A logistic weight of a prompt's features (D,) in fp64."""

    direction: torch.Tensor
    threshold: torch.Tensor

    def weigh(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return the factor of each prompt, (B,) in [0, 1]: 1 where it looks local."""
        features = compute_features(model, prompts)
        return torch.sigmoid(features @ self.direction - self.threshold).float()


def fit_gate(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    local: Sequence[Record],
    universal: Sequence[Record],
) -> Gate:
    """Fit the gate to a client's training prompts, both kinds counting the same."""
    kinds = []
    for name, records in (("local", local), ("universal", universal)):
        questions = sorted({format_question(record) for record in records})
        rng = random.Random(derive_seed("gate", name))
        chosen = rng.sample(questions, min(MAX_PROMPTS, len(questions)))
        prompts = [encode_prompt(tokenizer, system_prompt, question) for question in chosen]
        kinds.append(compute_features(model, prompts))
    means = [features.mean(0) for features in kinds]
    centred = torch.cat([f - mean for f, mean in zip(kinds, means, strict=True)])
    covariance = centred.T @ centred / len(centred)  # (D, D)
    size = covariance.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    regularised = (1 - SHRINKAGE) * covariance + SHRINKAGE * size * eye
    direction = torch.linalg.solve(regularised, means[0] - means[1])
    return Gate(direction, direction @ (means[0] + means[1]) / 2)


def gated(
    model: AdaptedModel, gate: Gate | None, prompts: Sequence[list[int]]
) -> AbstractContextManager[None]:
    """Return a context in which each row's local adapter is weighed by its prompt."""
    if gate is None:
        return nullcontext()
    weights = gate.weigh(model, prompts).to(model.device)
    return scaled_local(model, weights[:, None, None])  # over (B, T, D)


@torch.inference_mode()
def compute_features(model: AdaptedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Return the base model's mean last hidden state of each prompt, (B, D) fp64 on the CPU."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    features: dict[int, torch.Tensor] = {}
    inner = model.get_base_model().base_model
    with base_only(model):
        for start in range(0, len(order), BATCH_SIZE):
            indices = order[start : start + BATCH_SIZE]
            longest = len(prompts[indices[-1]])
            rows = [prompts[i] + [0] * (longest - len(prompts[i])) for i in indices]
            input_ids = torch.tensor(rows, device=model.device)  # (B, T), padded on the right
            hidden = inner(input_ids=input_ids, use_cache=False).last_hidden_state
            for row, index in enumerate(indices):
                mean = hidden[row, : len(prompts[index])].double().mean(0)
                features[index] = mean.cpu()
    return torch.stack([features[index] for index in range(len(prompts))])
