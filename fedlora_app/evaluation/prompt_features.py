"""What the frozen base model makes of a question, as two vectors.

The mean of the prompt's states two thirds up the layers, where a question's topic is clearest,
and the last layer's state of the last token, from which the answer begins. For a gate no adapter
is active, so that features are the same in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from fedlora_app.evaluation.memory import AnswerBatch
from fedlora_app.evaluation.room import GATE, Room, find_room
from fedlora_app.model.adapters import AdaptedModel, base_only
from fedlora_app.model.base import ModelError, decoder_layers, find_decoder

BATCH_SIZE = 32
MIDDLE = 2 / 3
"""How far up the decoder layers the first feature is taken."""
DESCRIPTION = {
    "middle": f"mean over the prompt's tokens of the output of decoder layer round({MIDDLE:.4f} L)",
    "last": "last_hidden_state (after the final norm) of the prompt's last token",
}
"""How each feature is made, for whoever has to make it elsewhere; L is the number of layers."""


def find_middle_layer(num_layers: int) -> int:
    """Return the decoder layer, counted from 1, whose output the first feature is taken from."""
    return max(round(MIDDLE * num_layers), 1)


@torch.inference_mode()
def compute_features(
    model: AdaptedModel,
    prompts: Sequence[list[int]],
    seen_by: Callable[[AdaptedModel], AbstractContextManager] = base_only,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both features of each prompt, (B, D) each, fp64 on the CPU.

    Args:
        seen_by: the context in which the model looks at them: by default as the base alone.
    """
    base = model.get_base_model()
    layers, decoder = _find_layers(base), find_decoder(base)
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    lengths = [len(prompt) for prompt in prompts]

    def read(indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        longest = lengths[indices[-1]]
        rows = [prompts[i] + [0] * (longest - lengths[i]) for i in indices]
        input_ids = torch.tensor(rows, device=model.device)  # (B, T), padded on the right
        states.clear()  # of a batch that did not fit
        final = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        (between,) = states
        states.clear()
        return [
            (
                between[row, : lengths[index]].double().mean(0).cpu(),
                final[row, lengths[index] - 1].double().cpu(),
            )
            for row, index in enumerate(indices)
        ]

    def count(indices: Sequence[int]) -> int:
        return len(indices) * lengths[indices[-1]]

    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handle = layers[find_middle_layer(len(layers)) - 1].register_forward_hook(keep)
    try:
        with seen_by(model):
            room = find_room(model, GATE, AnswerBatch(BATCH_SIZE, max(lengths), 0))
            for indices in _batches(order, lengths, room):
                found.update(zip(indices, room.run(indices, read, count), strict=True))
    finally:
        handle.remove()
    middle, last = zip(*(found[place] for place in range(len(prompts))), strict=True)
    return torch.stack(middle), torch.stack(last)


def _find_layers(base: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the decoder layers.

    Raises:
        ModelError: there is no list of as many modules as the model has layers.
    """
    if layers := decoder_layers(base):
        return layers
    raise ModelError(
        f"adapters.gate: the base model, {type(base).__name__}, has no list of its "
        f"{base.config.get_text_config().num_hidden_layers} decoder layers that a gate could be "
        "fitted to. Set it to none."
    )


def _batches(order: Sequence[int], lengths: Sequence[int], room: Room) -> Iterator[list[int]]:
    """Yield indices of prompts, shorter ones first."""
    batch: list[int] = []
    for index in order:
        is_full = len(batch) == BATCH_SIZE or not room.has_for(len(batch) + 1, lengths[index])
        if batch and is_full:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
