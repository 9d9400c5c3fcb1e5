"""What enters the lowest layer that learns, kept for every example from its first pass on.

Below that layer nothing changes in a phase: there are the frozen base and, at most, an adapter that
does not learn. Examples lie so that none sees another, hence an example's states there are the same
whatever it lies beside. A step on examples that have been seen before runs the layers
above and the loss only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from fedlora_app.config.schema import TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import AdaptedModel, find_first_layer
from fedlora_app.model.base import decoder_layers
from fedlora_app.model.device import read_free_memory
from fedlora_app.training.batches import count_steps
from fedlora_app.training.layout import Batch, Layout, choose_layout, compute_hidden_states

USABLE_SHARE = 0.25
"""Of the free host memory; what a step itself takes is in the rest."""
TOLERANCE = 1e-3  # of hidden states, relative; the same kernels on the same shapes differ by less

_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = weakref.WeakKeyDictionary()


class KeptStates:
    """The states that enter decoder layer ``first_layer``, by example, in host memory."""

    def __init__(self, base: PreTrainedModel, first_layer: int) -> None:
        self._base = base
        self._below = decoder_layers(base)[:first_layer]
        # (T, D) by the example's id(), which stays its own because the example is held as well.
        self._states: dict[int, tuple[Example, torch.Tensor]] = {}

    def compute_hidden_states(self, batch: Batch, examples: Sequence[Example]) -> torch.Tensor:
        """Return the last hidden states (rows * width, D) of a batch of examples."""
        if all(id(example) in self._states for example in examples):
            states = batch.join([self._states[id(example)][1] for example in examples])
            if self._base.device.type == "cuda":
                states = states.pin_memory()
            states = states.to(self._base.device, non_blocking=True)
            forwards = [_pass_on] * (len(self._below) - 1) + [lambda *_, **__: states]
        else:
            forwards = [layer.forward for layer in self._below]
            forwards[-1] = partial(self._run_and_keep, forwards[-1], batch, examples)
        with _replaced(self._below, forwards):
            return compute_hidden_states(self._base, batch)

    def clear(self) -> None:
        """Let everything go."""
        self._states.clear()

    def _run_and_keep(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        examples: Sequence[Example],
        *args: Any,
        **settings: Any,
    ) -> Any:
        states = forward(*args, **settings)
        if isinstance(states, torch.Tensor):  # else it is of a kind that is not kept
            parts = batch.split(states.detach().flatten(0, 1))
            for example, part in zip(examples, parts, strict=True):
                self._states[id(example)] = example, part.to("cpu", copy=True)
        return states


@contextmanager
def keeping_states(
    model: AdaptedModel,
    examples: Sequence[Example],
    training: TrainingConfig,
    trainable: Sequence[str],
    num_steps: int,
) -> Iterator[KeptStates | None]:
    """Yield what keeps states while the block runs.

    None where it would not pay (every layer learns, or no example comes twice), would not be exact
    (dropout in the layers below, or a model whose layers hand on more than states), or would take
    too much of the machine's memory.
    """
    base = model.get_base_model()
    first_layer = find_first_layer(model, trainable)
    pays = first_layer > 0 and num_steps > count_steps(len(examples), 1, training)
    lay_out = choose_layout(training)
    if not (pays and _fits(base, examples) and _is_exact(base, first_layer, lay_out)):
        yield None
        return
    kept = KeptStates(base, first_layer)
    try:
        yield kept
    finally:
        kept.clear()  # whoever still holds it: no state of a client outlives its phase


def _fits(base: PreTrainedModel, examples: Sequence[Example]) -> bool:
    weight = base.get_input_embeddings().weight  # (V, D)
    num_tokens = sum(len(example.input_ids) for example in examples)
    needed = num_tokens * weight.shape[1] * weight.element_size()
    return needed <= USABLE_SHARE * read_free_memory(torch.device("cpu"))


def _is_exact(base: PreTrainedModel, first_layer: int, lay_out: Layout) -> bool:
    """Return whether a model computes the same from kept states, tried out once per model."""
    modules = [module for layer in decoder_layers(base)[:first_layer] for module in layer.modules()]
    if any(dropout_of(module) > 0 for module in modules):
        return False
    verdicts = _verdicts.setdefault(base, {})
    if first_layer not in verdicts:
        verdicts[first_layer] = _try_out(base, first_layer, lay_out)
    return verdicts[first_layer]


def dropout_of(module: torch.nn.Module) -> float:
    """Return the share of values that a module itself drops in training."""
    if isinstance(module, torch.nn.Dropout):
        return module.p
    return getattr(module, "attention_dropout", None) or 0.0  # which attention draws by itself


def _try_out(base: PreTrainedModel, first_layer: int, lay_out: Layout) -> bool:
    kept = KeptStates(base, first_layer)
    examples = [Example([1, 2, 0, 2], 1), Example([0, 1, 2], 1)]
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            batch = lay_out(examples, base.device)
            plain, again = (
                torch.cat(batch.split(kept.compute_hidden_states(batch, examples))).float()
                for _ in range(2)
            )
    finally:
        base.train(was_training)
    return bool((again - plain).norm() <= TOLERANCE * plain.norm())


def _pass_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _replaced(layers: Sequence[torch.nn.Module], forwards: Sequence[Any]) -> Iterator[None]:
    """Have layers run other forwards in the block; one that torch.compile made is put back."""
    with ExitStack() as stack:
        for layer, forward in zip(layers, forwards, strict=True):
            before = layer.__dict__.get("forward")
            if before is None:
                stack.callback(layer.__dict__.pop, "forward")
            else:
                stack.callback(layer.__dict__.__setitem__, "forward", before)
            layer.__dict__["forward"] = forward
        yield
