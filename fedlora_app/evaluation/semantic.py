"""What a generated answer means: how near a sentence-embedding model finds it to each candidate.

Off unless asked for. Where right answers are free text, exact match is 0 whatever was learnt and
ROUGE-L counts words; this compares meanings instead (Reimers and Gurevych 2019,
https://aclanthology.org/D19-1410). Its errors are the embedding model's, many of which barely tell
one number or name from another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedlora_app.config.schema import ModelConfig
from fedlora_app.model.base import choose_device
from fedlora_app.model.pretrained import ModelError, find_file, from_pretrained

BATCH_SIZE = 64
POOLING_FILE = "1_Pooling/config.json"
"""Where sentence-transformers says how a text's tokens become one vector."""
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True)
class Embedder:
    """A sentence-embedding model and the texts that it has embedded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: str
    """"mean" of the last hidden states, or the "first" one."""
    _known: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, name: str, root: Path) -> Embedder:
        """Return the embedding model of a hub id, or of a folder relative to ``root``.

        Raises:
            ModelError: it is not there, or pools in a way that is not known here.
        """
        config = ModelConfig(name=name, quantization="none")
        pooling = _read_pooling(config, root)
        kwargs = {"use_safetensors": True, "dtype": torch.float32}
        model = from_pretrained(AutoModel, config, root, **kwargs).to(choose_device()).eval()
        return cls(model, from_pretrained(AutoTokenizer, config, root), pooling)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None]) -> None:
        """Embed the texts that are new, as unit vectors (D,) in fp32."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), BATCH_SIZE):
            batch = new[start : start + BATCH_SIZE]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            hidden = self.model(**inputs).last_hidden_state  # (B, T, D)
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            if self.pooling == "first":
                mask = mask * (mask.cumsum(1) == 1)  # wherever the padding stands
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
            vectors = torch.nn.functional.normalize(pooled, dim=-1).cpu()
            self._known.update(zip(batch, vectors, strict=True))
            progress(start + len(batch), len(new))

    def compare(self, text: str, candidates: Sequence[str]) -> tuple[float, ...]:
        """Return the cosine similarities, in [-1, 1], of a text and candidates, all embedded."""
        return tuple((self._known[text] @ self._known[other]).item() for other in candidates)


def _read_pooling(config: ModelConfig, root: Path) -> str:
    """Return how the model pools: as it says itself, or by the mean where it says nothing."""
    path = find_file(config, root, POOLING_FILE)
    if path is None:
        return "mean"
    modes = json.loads(path.read_text(encoding="utf-8"))
    chosen = [mode for mode, is_on in modes.items() if mode.startswith("pooling_mode_") and is_on]
    if len(chosen) == 1 and chosen[0] in POOLING:
        return POOLING[chosen[0]]
    known = ", ".join(POOLING)
    raise ModelError(
        f"{config.name} pools by {', '.join(chosen) or 'nothing'}. Expected exactly one of {known}."
    )
