"""Which tokens of the vocabulary occur in what a client trained on, read off its update.

- ``input``: in the lowest decoder layer every token enters the attention's projections as a fixed
  vector, whatever stands around it, unless positions were added to it. A gradient of A there is a
  sum of such vectors, so those in its row space are the batch's tokens (the first step of DAGER,
  Petrov et al. 2024, https://arxiv.org/abs/2405.15586). With a rank below the number of distinct
  tokens, and after AdamW, no token lies in it exactly; the score is how much of its vector does.
- ``effect``: how much the update changes what these projections make of the token's vector.
- ``output``: how far the update writes in the direction that the head reads the token by, in the
  last decoder layer: answers are learnt by moving there.

Vectors have the vocabulary's mean taken off, which all tokens share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedlora_app.attacks.results import EFFECT, INPUT, OUTPUT
from fedlora_app.attacks.scores import SMALLEST, input_subspaces
from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.statistics import area_under_curve, proportion
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, base_only, lora_layers
from fedlora_app.model.base import decoder_layers, find_decoder
from fedlora_app.model.head import find_head

CHUNK = 2048


class _Enough(Exception):
    """All inputs of the lowest layer's first projections have been seen."""


@dataclass(frozen=True)
class Vocabulary:
    """What an attacker knows of every token from the base model alone.

    Args:
        inputs: (V, in), what enters the modules named in ``reading``, without the mean; None where
            the lowest decoder layer has no global adapter.
        reading: the lowest decoder layer's modules that have it and get that.
        directions: (V, D), what the head reads every token by, without the mean; None where the
            head is no plain linear layer.
        writing: the last decoder layer's modules that add to the hidden states.
    """

    inputs: torch.Tensor | None
    reading: tuple[str, ...]
    directions: torch.Tensor | None
    writing: tuple[str, ...]


@torch.inference_mode()
def know_vocabulary(model: AdaptedModel, size: int) -> Vocabulary:
    """Return every token's vectors.

    Args:
        size: of the tokenizer's vocabulary.
    """
    base = model.get_base_model()
    names = {module: name for name, module in model.named_modules()}
    layers = decoder_layers(base)
    adapted = set(lora_layers(model, GLOBAL))
    lowest = [module for module in layers[0].modules() if module in adapted]
    seen: list[torch.nn.Module] = []
    parts = []
    with base_only(model):
        for chunk in torch.arange(size, device=model.device).split(CHUNK) if lowest else ():
            seen, x = _capture_inputs(base, lowest, chunk)
            parts.append(x)
    inputs = _centre(torch.cat(parts)) if parts else None
    head = find_head(base)
    directions, writing = None, []
    if type(head) is torch.nn.Linear:
        directions = _centre(head.weight[:size].float())
        width = directions.shape[1]
        writing = [m for m in layers[-1].modules() if m in adapted and m.out_features == width]
    return Vocabulary(
        inputs,
        tuple(names[module] for module in seen),
        directions,
        tuple(names[module] for module in writing),
    )


def _centre(vectors: torch.Tensor) -> torch.Tensor:
    return vectors - vectors.mean(0)


def _capture_inputs(
    base: torch.nn.Module, modules: Sequence[torch.nn.Module], ids: torch.Tensor
) -> tuple[list[torch.nn.Module], torch.Tensor]:
    """Return the modules that get the lowest layer's first adapted input, and it: (N, in)."""
    seen: list[torch.nn.Module] = []
    first: list[torch.Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if first and inputs[0] is not first[0]:
            raise _Enough
        first[:] = [inputs[0]]
        seen.append(module)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        find_decoder(base)(input_ids=ids[:, None], use_cache=False)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen, first[0].flatten(0, -2).float()


def score_tokens(
    known: Vocabulary, before: AdapterState, update: AdapterState
) -> dict[str, np.ndarray]:
    """Return every attack's score per token, higher for a likelier one, (V,) each.

    An attack that needs a factor that did not travel, or a layer without the adapter, is left out.

    Args:
        before: the global adapter that the client started from.
        update: what it changes, in the adapter's shapes.
    """
    after = {key: before[key] + update[key] for key in before}
    subspaces = input_subspaces(update)
    found: dict[str, list[torch.Tensor]] = {INPUT: [], EFFECT: [], OUTPUT: []}
    for name in known.reading if known.inputs is not None else ():
        inputs = known.inputs
        sizes = inputs.norm(dim=1).clamp_min(SMALLEST)
        a, b = (f"{name}.lora_{factor}.weight" for factor in "AB")
        if name in subspaces:
            found[INPUT].append((inputs @ subspaces[name].to(inputs.device)).norm(dim=1) / sizes)
        new, old = (
            inputs @ state[a].to(inputs.device).T @ state[b].to(inputs.device).T
            for state in (after, before)
        )
        found[EFFECT].append((new - old).norm(dim=1) / sizes)
    for name in known.writing if known.directions is not None else ():
        change = update[f"{name}.lora_B.weight"].to(known.directions.device)
        if change.any():
            reach = known.directions.norm(dim=1).clamp_min(SMALLEST)
            found[OUTPUT].append((known.directions @ change).norm(dim=1) / reach)
    return {name: _combine(values) for name, values in found.items() if values}


def _combine(values: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the mean over modules of scores brought to one scale."""
    scaled = [(v - v.mean()) / v.std().clamp_min(SMALLEST) for v in values]
    return torch.stack(scaled).mean(0).cpu().numpy()


@dataclass(frozen=True)
class Batch:
    """The tokens of what a client trained on, beside those that it did not.

    Args:
        present: those that the server does not know anyway from template and system prompt.
        absent: tokens of the other clients' data and of all question sets that it did not train on.
        known: left out of everything.
    """

    present: frozenset[int]
    absent: frozenset[int]
    known: frozenset[int]


def find_batch(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    trained: Sequence[Example],
    others: Sequence[Example],
) -> Batch:
    """Return which tokens are to be found, and which not."""
    known = {*encode_prompt(tokenizer, system_prompt, ""), *tokenizer.all_special_ids}
    present = {token for example in trained for token in example.input_ids} - known
    absent = {token for example in others for token in example.input_ids} - known - present
    return Batch(frozenset(present), frozenset(absent), frozenset(known))


def measure_tokens(scores: Mapping[str, np.ndarray], batch: Batch) -> Iterator[dict[str, Any]]:
    """Yield how well each attack finds the batch's tokens.

    ``among``: ``vocabulary``, beside all other tokens, which how common a token is helps to tell
    from; ``domain``: beside the tokens of the same kind of text. ``precision`` is of as many
    guesses as there are tokens to be found, ``chance`` what guessing would have.
    """
    present = np.array(sorted(batch.present), dtype=int)
    for attack, values in scores.items():
        everything = np.setdiff1d(np.arange(len(values)), [*batch.present, *batch.known])
        domain = np.array(sorted(t for t in batch.absent if t < len(values)), dtype=int)
        for among, absent in (("vocabulary", everything), ("domain", domain)):
            ours, theirs = values[present], values[absent]
            row = {"attack": attack, "among": among, "n_present": len(ours)}
            row |= {"n_absent": len(theirs), "auc": area_under_curve(ours, theirs).dump()}
            if len(ours) and len(theirs):
                row["precision"] = proportion(_guess(ours, theirs)).dump()
                row["chance"] = len(ours) / (len(ours) + len(theirs))
            yield row


def _guess(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Return how right each of as many guesses as there are tokens is, the likeliest ones.

    Of those with the same score as the last guess, each is one with the same chance.
    """
    threshold = np.sort(np.concatenate([ours, theirs]))[-len(ours)]
    above = [1.0] * int((ours > threshold).sum()) + [0.0] * int((theirs > threshold).sum())
    tied = ((ours == threshold).sum(), (theirs == threshold).sum())
    return above + [float(tied[0] / sum(tied))] * (len(ours) - len(above))
