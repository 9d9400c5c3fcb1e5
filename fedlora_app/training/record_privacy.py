"""DP-SGD on the global adapter: no record moves a step by more than its share, and noise hides it.

Abadi et al. 2016, https://arxiv.org/abs/1607.00133. Every step draws each example by itself with
the same chance (Poisson sampling, which the accountant assumes), bounds each drawn example's
gradient over the whole adapter (``clipping``), adds Gaussian noise to their sum, and divides by the
number of examples that it was to draw.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import (
    GLOBAL,
    LOCAL,
    ConfigError,
    PrivacyConfig,
    TrainingConfig,
)
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.secret_noise import gaussian, uniform
from fedlora_app.model.adapters import AdaptedModel, get_state, lora_layers
from fedlora_app.training.batches import examples_per_step, split_step
from fedlora_app.training.clipping import ClippedGradients, ClippingError, clipping_examples
from fedlora_app.training.kept_states import KeptStates, dropout_of
from fedlora_app.training.layout import choose_layout
from fedlora_app.training.losses import compute_example_losses

IMMATERIAL = {"gradient_checkpointing", "batch_size", "gradient_accumulation_steps"}
"""Settings that change roundings only, and that memory may change from one try to another."""

BACKWARDS = 2
"""Backward passes of a micro-batch: one measures its examples' gradients, one adds them up."""


@dataclass(frozen=True)
class RecordPrivacy:
    """How single records are hidden in a phase."""

    clip_norm: float
    """The largest L2 norm of an example's gradient."""
    noise_multiplier: float
    """Standard deviation of the noise over ``clip_norm``; 0: clipping alone, and nothing hidden."""
    key: bytes
    """The secret that samples and noise derive from; 32 bytes that no one else has."""


def sampling_rate(num_examples: int, training: TrainingConfig) -> float:
    """Return the chance with which a step draws each of a phase's examples."""
    return min(1.0, examples_per_step(training) / num_examples)


def hides_records(phase: Phase, privacy: PrivacyConfig) -> bool:
    """Return whether a phase is to hide single records: where the global adapter learns."""
    return privacy.unit == "record" and GLOBAL in phase.trainable


def protect_records(
    phase: Phase, privacy: PrivacyConfig, noise_multiplier: float | None, key: bytes
) -> RecordPrivacy:
    """Return how a phase hides single records, which ``hides_records`` says that it is to.

    Args:
        noise_multiplier: None where there is to be clipping alone.

    Raises:
        ConfigError: another adapter answers beside the global one.
    """
    assert privacy.clip_norm is not None, "a unit without a bound is refused before"
    if phase.active != (GLOBAL,):
        raise ConfigError(
            "training.schedule: joint trains both adapters at once, and privacy.unit record hides "
            "records in a phase of the global one alone. Use phased or mixed."
        )
    return RecordPrivacy(privacy.clip_norm, noise_multiplier or 0.0, key)


def record_settings(training: TrainingConfig) -> TrainingConfig:
    """Return a phase's settings without what hides an adapter's layers from ``clipping``."""
    return training.model_copy(update={"fused_adapters": False, "compile": False})


@contextmanager
def private_gradients(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    privacy: RecordPrivacy,
    *about: object,
) -> Iterator[PrivateGradients]:
    """Yield what makes the gradients of a phase of the global adapter alone.

    Args:
        examples: all of which steps are drawn.
        about: what else decides the phase's course, such as its seed and its number of steps.

    Raises:
        ClippingError: something learns, or draws random numbers, that lets no example be bounded.
    """
    _require_no_dropout(model)
    key = _derive_key(privacy, model, examples, training, about)
    with clipping_examples(model, privacy.clip_norm) as clipped:
        yield PrivateGradients(model, examples, training, privacy, key, clipped)


@dataclass(frozen=True)
class PrivateGradients:
    """The noisy gradients of one phase.

    Args:
        privacy: of which the key is not used.
        key: this phase's.
    """

    model: AdaptedModel
    examples: Sequence[Example]
    training: TrainingConfig
    privacy: RecordPrivacy
    key: bytes
    clipped: ClippedGradients

    def draw_batches(self) -> Iterator[list[Example]]:
        """Yield one step's examples after another, for ever, each drawn by itself; maybe none."""
        rate = sampling_rate(len(self.examples), self.training)
        for step in count():
            draws = uniform(self.key, "sample", step, n=len(self.examples)).tolist()
            yield [ex for ex, draw in zip(self.examples, draws, strict=True) if draw < rate]

    def accumulate(self, step: int, batch: Sequence[Example], kept: KeptStates | None) -> float:
        """Leave the noisy mean of a step's bounded gradients in ``grad``.

        Each is the gradient of an example's mean loss over its own answer. So one bound fits short
        and long answers, and no example's loss depends on how long the others are.

        Returns:
            The mean of the examples' losses, which is not noisy; 0 where there is no example.
        """
        lay_out = choose_layout(self.training)
        total = torch.zeros((), device=self.model.device)
        for micro_batch in split_step(batch, self.training):
            losses, spans = compute_example_losses(self.model, micro_batch, lay_out, kept)
            self.clipped.add(losses, spans)
            total += losses.detach().sum()
        self._add_noise(step)
        return total.item() / max(len(batch), 1)

    @torch.no_grad()
    def _add_noise(self, step: int) -> None:
        """Make of the sums in ``grad`` what the optimizer gets, also where nothing was drawn."""
        scale = self.privacy.noise_multiplier * self.privacy.clip_norm
        expected = sampling_rate(len(self.examples), self.training) * len(self.examples)
        for place, parameter in enumerate(self.clipped.parameters):
            total = torch.zeros_like(parameter, dtype=torch.float64)
            if parameter.grad is not None:
                total += parameter.grad
            if scale > 0:
                noise = gaussian(self.key, "noise", step, place, shape=tuple(parameter.shape))
                total += scale * noise.to(total.device)
            parameter.grad = (total / expected).to(parameter.dtype)


def _require_no_dropout(model: AdaptedModel) -> None:
    """Raise where a step draws other random numbers for an example with than without another."""
    drawing = [
        name
        for name, module in model.named_modules()
        if dropout_of(module) > 0 and not name.endswith(f".lora_dropout.{LOCAL}")
    ]
    if drawing:
        raise ClippingError(
            f"Dropout ({drawing[0]}) gives an example other random numbers where another one is "
            "added or left out, so that bounding each alone hides none. Set "
            "adapters.global.dropout to 0, or use a base model without dropout."
        )


def bind_to_base(key: bytes, fingerprint: str) -> bytes:
    """Return a secret key that is another one beside another base model."""
    return hmac.digest(key, f"base model {fingerprint}".encode(), "sha256")


def _derive_key(
    privacy: RecordPrivacy,
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    about: Sequence[object],
) -> bytes:
    """Return the key of one phase: of the secret one and of all that decides its gradients.

    The same phase once more, after a stop, has the same noise and tells nothing new. Were anything
    else different, the same noise would give it all away: the difference of two updates has none.
    So a server that sends another adapter for the same round or scales it otherwise, and data that
    have changed, get other noise. ``bind_to_base`` sees to another base model.
    """
    digest = hashlib.sha256()
    for name, tensor in get_state(model, GLOBAL).items():
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    scales = [layer.scaling[GLOBAL] for layer in lora_layers(model, GLOBAL)]
    digest.update(json.dumps(scales).encode())
    for example in examples:
        digest.update(json.dumps([example.input_ids.tolist(), example.answer_start]).encode())
    base = model.get_base_model()
    numerics = [str(base.dtype), model.device.type, getattr(base, "is_loaded_in_4bit", False)]
    settings = training.model_dump(exclude=IMMATERIAL) | {"per_step": examples_per_step(training)}
    bounds = [privacy.clip_norm, privacy.noise_multiplier]
    digest.update(json.dumps([settings, numerics, bounds, *map(str, about)]).encode())
    return hmac.digest(privacy.key, digest.digest(), "sha256")
