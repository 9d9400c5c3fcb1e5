"""A mixer: in every layer and for every token, how much of each adapter.

FedALT (Bian et al. 2025, https://arxiv.org/abs/2503.11880): for the input x of a layer,

    (p_G, p_L) = softmax(M x),    y = W0 x + p_G s_G B_G A_G x + p_L s_L B_L A_L x,

with M of two rows, without a bias, the one thing that learns. There the mixer learns beside the
individual adapter in all rounds, and its partner is the average of the other clients; here it is
fitted to a finished run, both adapters frozen, and its partner is the global one. It begins with
zeros, which is one half of each adapter, and takes as many passes over the client's training
records of both kinds as all local phases of the run together over theirs, at the run's learning
rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch

from fedlora_app.config.combination import MIXER
from fedlora_app.config.schema import GLOBAL, LOCAL, TrainingConfig
from fedlora_app.data.client_files import tokenize_client_files
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.combiner import WHOLE_PAIR, Weights
from fedlora_app.evaluation.fitted import (
    TRAIN_FILES,
    FitError,
    FittedCombiner,
    FittingTask,
    require_shape,
)
from fedlora_app.evaluation.fitted_files import Tensors
from fedlora_app.foundation.progress import step_lines
from fedlora_app.model.adapters import AdaptedModel, activate
from fedlora_app.model.fused import MIXED, Mixer, find_mixed_layers, fused_answering
from fedlora_app.training.batches import count_steps, split_step, step_batches
from fedlora_app.training.layout import pad
from fedlora_app.training.losses import compute_losses
from fedlora_app.training.optimizer import ADAM_BETAS
from fedlora_app.training.phase import (
    Progress,
    TrainingError,
    set_checkpointing,
)
from fedlora_app.training.schedule import schedule_factor
from fedlora_app.training.within_memory import retry_with_less_memory


@dataclass(frozen=True)
class TokenMixer(FittedCombiner):
    """Weighs by layer and token, and no question as a whole."""

    NAME = MIXER
    FORMAT = 1
    ADAPTERS = (GLOBAL, LOCAL)
    FILES = TRAIN_FILES
    SETTINGS = ("training", "federated")

    matrices: Tensors
    """M (2, in), fp32, by the layer's name."""
    system_prompt: str = ""

    @classmethod
    def fit(cls, task: FittingTask) -> Self:
        """Train one on all of a client's training records."""
        found = tokenize_client_files(
            task.config, task.client, task.files, task.tokenizer, task.root
        )
        examples = [*found.local.examples, *found.universal.examples]
        training, num_rounds = task.config.training, task.config.federated.num_rounds
        what = f"{task.client.id}, {MIXER}"
        matrices = train_mixer(task.model, examples, training, num_rounds, task.seed(MIXER), what)
        return cls(matrices, task.client.system_prompt)

    def find_weights(self, model: AdaptedModel, prompts: Sequence[list[int]]) -> list[Weights]:
        """Return the whole pair's for each prompt."""
        return [WHOLE_PAIR] * len(prompts)

    def find_mixer(self, model: AdaptedModel) -> Mixer:
        """Return what each layer mixes by, on the model's device."""
        layers = find_mixed_layers(model)
        return {layer: self.matrices[name].to(model.device) for name, layer in layers.items()}

    def dump(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the matrices by layer."""
        return self.matrices, {}

    @classmethod
    def restore(cls, tensors: Tensors, content: Mapping[str, Any], system_prompt: str) -> Self:
        """Return what was dumped."""
        return cls(
            {name: require_shape(tensors, name, len(MIXED), None) for name in tensors},
            system_prompt,
        )


def train_mixer(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    num_phases: int,
    seed: int,
    what: str = MIXER,
) -> Tensors:
    """Return the matrices (2, in) of each layer after training, fp32 on the CPU.

    Where memory runs out it begins once more with smaller batches, as a phase of a run does.

    Args:
        num_phases: how many times as many steps as a local phase of these examples has.
        what: begins the lines that say how far it is.

    Raises:
        FitError: the loss is not finite, or memory does not suffice for smaller batches either.
    """
    # Padded rows, which every base model takes.
    training = training.model_copy(update={"packing": False})
    num_steps = count_steps(len(examples), training.local_epochs, training)
    num_steps = num_phases * min(num_steps, training.max_steps or num_steps)

    def train(settings: TrainingConfig) -> Tensors:
        return _train_from_zeros(model, examples, settings, num_steps, seed, step_lines(what))

    try:
        matrices, _ = retry_with_less_memory(training, train, lambda: None, what)
    except TrainingError as error:
        raise FitError(f"{error} Or use a larger card, or another --combine.") from None
    return matrices


def _train_from_zeros(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    num_steps: int,
    seed: int,
    progress: Progress,
) -> Tensors:
    activate(model, MIXED)
    layers = find_mixed_layers(model)
    matrices = {
        name: torch.nn.Parameter(torch.zeros(len(MIXED), layer.in_features, device=model.device))
        for name, layer in layers.items()
    }
    parameters = list(matrices.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=0.0
    )
    saves_memory = training.gradient_checkpointing
    if saves_memory == "auto":
        saves_memory = model.device.type == "cuda"
    set_checkpointing(model, saves_memory)
    model.train(saves_memory)  # without it there is no checkpointing
    torch.manual_seed(seed)
    mixer = {layer: matrices[name] for name, layer in layers.items()}
    try:
        with torch.enable_grad(), fused_answering(model, mixer):
            batches = islice(step_batches(examples, training, seed), num_steps)
            for step, batch in enumerate(batches):
                for group in optimizer.param_groups:
                    factor = schedule_factor(step / num_steps, training)
                    group["lr"] = training.learning_rate * factor
                loss = _accumulate_gradients(model, batch, training)
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress(step + 1, num_steps, loss)
    finally:
        model.eval()
        set_checkpointing(model, False)
    return {name: matrix.detach().cpu() for name, matrix in matrices.items()}


def _accumulate_gradients(
    model: AdaptedModel, batch: Sequence[Example], training: TrainingConfig
) -> float:
    """Add up the gradients of one step, every answer token alike; return the mean loss."""
    num_tokens = sum(example.num_answer_tokens for example in batch)
    total = 0.0
    for micro_batch in split_step(batch, training):
        losses, _ = compute_losses(model, micro_batch, None, pad)
        loss = losses.sum() / num_tokens
        if not math.isfinite(loss.item()):
            raise FitError(
                f"The mixer's loss became {loss.item()}. Lower training.learning_rate (it is "
                f"{training.learning_rate:g})."
            )
        loss.backward()
        total += loss.item()
    return total
