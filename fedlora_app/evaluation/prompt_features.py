"""What the frozen base model makes of a question, as two vectors.

The mean of the prompt's states two thirds up the layers, where a question's topic is clearest,
and the last layer's state of the last token, from which the answer begins. No adapter is
active, so features are the same in every round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from fedlora_app.model.adapters import AdaptedModel, base_only
from fedlora_app.model.base import ModelError, decoder_layers, find_decoder

BATCH_SIZE = 32
MAX_BATCH_TOKENS = 16_384  # padding included
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
    model: AdaptedModel, prompts: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both features of each prompt, (B, D) each, fp64 on the CPU."""
    base = model.get_base_model()
    layers, decoder = _find_layers(base), find_decoder(base)
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    middle: dict[int, torch.Tensor] = {}
    last: dict[int, torch.Tensor] = {}
    handle = layers[find_middle_layer(len(layers)) - 1].register_forward_hook(keep)
    try:
        with base_only(model):
            for indices in _batches(order, [len(prompt) for prompt in prompts]):
                longest = len(prompts[indices[-1]])
                rows = [prompts[i] + [0] * (longest - len(prompts[i])) for i in indices]
                input_ids = torch.tensor(rows, device=model.device)  # (B, T), padded on the right
                final = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
                (between,) = states
                states.clear()
                for row, index in enumerate(indices):
                    length = len(prompts[index])
                    middle[index] = between[row, :length].double().mean(0).cpu()
                    last[index] = final[row, length - 1].double().cpu()
    finally:
        handle.remove()
    places = range(len(prompts))
    return torch.stack([middle[i] for i in places]), torch.stack([last[i] for i in places])


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


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of prompts, shorter ones first; padded, a batch has so many tokens at most."""
    batch: list[int] = []
    for index in order:
        is_full = (len(batch) + 1) * lengths[index] > MAX_BATCH_TOKENS
        if batch and (is_full or len(batch) == BATCH_SIZE):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
