"""The input embedding in host memory, for cards that the whole model would not fit on.

A batch needs a few thousand of its rows, so that little is lost by fetching them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

SHARED_WEIGHTS = "the output layer has the same weights and needs them on the device"


class HostEmbedding(nn.Module):
    """Looks rows up on the CPU and hands them to the device of the layers.

    The weight is neither parameter nor buffer: nothing that moves or counts the model's tensors
    meets it, and the model's device stays that of its layers.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.weight = weight.detach().to("cpu")  # (V, D)
        self.device = device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (B, T, D) for the ids (B, T), which may be on any device."""
        rows = functional.embedding(input_ids.to("cpu"), self.weight)
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # the ids had to wait for the device; the rows need not
        return rows.to(self.device, non_blocking=True)

    def extra_repr(self) -> str:
        """Return the sizes, as ``nn.Embedding`` does."""
        return f"{len(self.weight)}, {self.weight.shape[1]}, to {self.device}"


def move_embedding_to_host(model: PreTrainedModel, device: torch.device) -> None:
    """Replace the input embedding of a model that is on ``device``.

    Raises:
        ValueError: the output layer shares its weights, or it does more than look rows up.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ValueError(SHARED_WEIGHTS)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise ValueError(f"its {type(embedding).__name__} does more than look rows up")
    model.set_input_embeddings(HostEmbedding(embedding.weight, device))
    del embedding
    if device.type == "cuda":
        torch.cuda.empty_cache()
