"""From a decoder's last hidden states to logits, as the model itself makes them.

Most models apply a linear layer and nothing else. Cohere and Granite scale what it gives, Gemma 2
bends it by a tanh; a loss or a score without that is another model's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fedlora_app.model.base import ModelError, find_decoder

Head = Callable[[torch.Tensor], torch.Tensor]
"""From states (N, D) to logits (N, V)."""

NUM_PROBES = 4
LARGE = 100  # so that a bound on logits shows
TOLERANCE = 1e-3  # of logits, relative; the same product in the same dtype differs by nothing

_is_plain: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def find_head(base: PreTrainedModel) -> Head:
    """Return what makes logits of a model's last hidden states.

    It is the model's own output layer where that is all there is, and else the model's forward
    pass, whose decoder hands on the given states.
    """
    if base not in _is_plain:
        _is_plain[base] = _try_out(base)
    return base.get_output_embeddings() if _is_plain[base] else _ForwardHead(base)


@dataclass(frozen=True)
class _ForwardHead:
    """A model's forward pass without its decoder."""

    base: PreTrainedModel

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        outputs = _Outputs(states[None])
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        with ExitStack() as stack:
            for decoder in {find_decoder(self.base), self.base.base_model} - {self.base}:
                stack.enter_context(_replaced_forward(decoder, outputs))
            logits = self.base(input_ids=ids, use_cache=False).logits[0]
        if not outputs.are_used:
            raise ModelError(
                f"How the base model, {type(self.base).__name__}, makes logits of its last states "
                "is not known, so no loss can be computed. Use another base model."
            )
        return logits


@contextmanager
def _replaced_forward(module: torch.nn.Module, outputs: _Outputs) -> Iterator[None]:
    """Have a module return what is given in the block; one that was replaced before is put back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *_, **__: outputs
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class _Outputs:
    """What a decoder returns: its last hidden states (1, N, D), and nothing of all else."""

    def __init__(self, states: torch.Tensor) -> None:
        self._states = states
        self.are_used = False

    @property
    def last_hidden_state(self) -> torch.Tensor:
        self.are_used = True
        return self._states

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.no_grad()
def _try_out(base: PreTrainedModel) -> bool:
    """Return whether the output layer alone gives the model's logits, without a random number."""
    head = base.get_output_embeddings()
    places = torch.arange(
        NUM_PROBES * head.in_features, device=head.weight.device, dtype=torch.float32
    )
    states = LARGE * places.view(NUM_PROBES, -1).sin().to(base.dtype)
    plain, own = head(states).float(), _ForwardHead(base)(states).float()
    return bool((own - plain).norm() <= TOLERANCE * plain.norm())
