"""How much an update looks as if it was trained on a record: three scores, higher for likelier.

- ``loss_drop``: how much likelier the update makes the answer, per token. Yeom et al. 2018
  (https://arxiv.org/abs/1709.01604), calibrated by the model that the client started from
  (Watson et al. 2022, https://arxiv.org/abs/2111.08440), which the server knows.
- ``alignment``: -<gradient of the record's loss, update> / |gradient|, over what the update
  changes, at the adapter that the client started from: of one plain gradient step the record's own
  part.
- ``projection``: how much of the record's inputs lies in the input subspace of the update of A.
  A gradient of A is a sum of inputs of the batch, so that its row space is theirs. AdamW divides
  every number by its own size, after which that holds in part only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch

from fedlora_app.attacks.results import ALIGNMENT, PROJECTION
from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.scoring import score_examples
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import (
    AdaptedModel,
    activate,
    learning_part,
    lora_layers,
    named_parameters,
    only_adapters,
    set_state,
)
from fedlora_app.training.losses import answer_log_likelihoods

SMALLEST = 1e-12

Progress = Callable[[int], None]


def mean_log_probs(
    model: AdaptedModel, state: AdapterState, examples: Sequence[Example], batch_size: int
) -> list[float]:
    """Return the mean log-probability of each example's answer tokens under a global adapter."""
    set_state(model, GLOBAL, state)
    with only_adapters(model, [GLOBAL]):
        return [fmean(values) for values in score_examples(model, examples, batch_size)]


def compare_with_gradients(
    model: AdaptedModel,
    start: AdapterState,
    updates: Mapping[str, AdapterState],
    examples: Sequence[Example],
    progress: Progress = lambda done: None,
) -> dict[str, dict[str, list[float]]]:
    """Return every update's alignment and projection for every example, by score and sender.

    An update that leaves A alone has no projection.

    One forward and backward pass an example, however many updates there are.

    Args:
        start: the global adapter that the clients started from.
        updates: what each changes in it, in the adapter's shapes.
    """
    set_state(model, GLOBAL, start)
    activate(model, [GLOBAL], [GLOBAL])
    model.eval()
    parameters = named_parameters(model, GLOBAL)
    moved = {
        name: {k: change.to(model.device) for k, change in learning_part(model, update).items()}
        for name, update in updates.items()
    }
    travelled = {name: [k for k in update if update[k].any()] for name, update in moved.items()}
    subspaces = {name: input_subspaces(update) for name, update in moved.items()}
    found: dict[str, dict[str, list[float]]] = {ALIGNMENT: {name: [] for name in updates}}
    found[PROJECTION] = {name: [] for name, bases in subspaces.items() if bases}
    try:
        for done, example in enumerate(examples, 1):
            with _measured_inputs(model, subspaces) as shares, torch.enable_grad():
                (-answer_log_likelihoods(model, [example])[0].mean()).backward()
            gradients = {k: p.grad.float() for k, p in parameters.items() if p.grad is not None}
            for name, changed in travelled.items():
                those = [k for k in changed if k in gradients]
                norm = math.sqrt(sum(gradients[k].square().sum().item() for k in those))
                inner = sum((gradients[k] * moved[name][k]).sum().item() for k in those)
                found[ALIGNMENT][name].append(-inner / max(norm, SMALLEST))
            for name, values in found[PROJECTION].items():
                values.append(fmean(shares[name]))
            model.zero_grad(set_to_none=True)
            progress(done)
    finally:
        model.zero_grad(set_to_none=True)
        activate(model, [GLOBAL])
    return found


def input_subspaces(update: AdapterState) -> dict[str, torch.Tensor]:
    """Return an orthonormal basis (in, r) of each module's rows of A that an update changes."""
    bases = {}
    for key, change in update.items():
        if ".lora_A." in key and change.any():
            _, values, rows = torch.linalg.svd(change.float(), full_matrices=False)
            bases[key.partition(".lora_A.")[0]] = rows[values > SMALLEST * values[0]].T
    return bases


@contextmanager
def _measured_inputs(
    model: AdaptedModel, subspaces: Mapping[str, Mapping[str, torch.Tensor]]
) -> Iterator[dict[str, list[float]]]:
    """Yield what share of each module's inputs lies in every sender's subspace, once computed."""
    shares: dict[str, list[float]] = {name: [] for name in subspaces}
    handles = []

    def watch(module_name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().float().flatten(0, -2)  # (T, in)
            size = x.square().sum(-1).clamp_min(SMALLEST)
            for name, bases in subspaces.items():
                if module_name in bases:
                    part = (x @ bases[module_name]).square().sum(-1) / size
                    shares[name].append(part.mean().item())

        return note

    adapted = set(lora_layers(model, GLOBAL))
    for module_name, module in model.named_modules():
        if module in adapted:
            handles.append(module.register_forward_pre_hook(watch(module_name)))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
