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
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from fedlora_app.config.schema import ModelConfig
from fedlora_app.model.base import choose_device
from fedlora_app.model.pretrained import ModelError, from_pretrained, local_folder

BATCH_SIZE = 64
MAX_TOKENS = 256  # of a text; answers are short
MODULES_FILE = "modules.json"
"""Where sentence-transformers says what a model consists of, and in which folder each part lies."""
MODULES = ("Transformer", "Pooling", "Normalize")
"""What may be in it. Others, a dense layer for instance, would change what texts are near."""
POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
PROBE = "The office opens at nine."


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
            ModelError: it is not there, is damaged, or is no model that can be used here.
        """
        if not name.strip():
            raise ModelError("--semantic names no model. Expected a hub id or a folder.")
        config = ModelConfig(name=name, quantization="none")
        try:
            model, info = from_pretrained(
                AutoModel,
                config,
                root,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = from_pretrained(AutoTokenizer, config, root)
        except ModelError as error:
            text = str(error).replace("base model", "model")
            text = text.replace("set model.name to a local folder", "name a local folder")
            raise ModelError(f"--semantic: {text}") from error
        missing = [key for key in info["missing_keys"] if "pooler" not in key]  # it goes unused
        if missing:
            raise ModelError(f"{name} lacks the weights {', '.join(sorted(missing)[:3])}.")
        embedder = cls(model.to(choose_device()).eval(), tokenizer, _read_pooling(config, root))
        try:
            embedder.embed([PROBE])
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{name} embeds no text ({error}). Expected an encoder with its tokenizer."
            ) from error
        return embedder

    @torch.inference_mode()
    def embed(
        self,
        texts: Sequence[str],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Embed the texts that are new, as unit vectors (D,) in fp32."""
        new = sorted({text for text in texts if text and text not in self._known}, key=len)
        for start in range(0, len(new), BATCH_SIZE):
            batch = new[start : start + BATCH_SIZE]
            inputs = self.tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=min(MAX_TOKENS, self.tokenizer.model_max_length),
                return_tensors="pt",
            )
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
        """Return the cosine similarities, in [-1, 1], of a text and candidates, all embedded.

        An empty text is like none of them.
        """
        if not text:
            return (-1.0,) * len(candidates)
        return tuple((self._known[text] @ self._known[other]).item() for other in candidates)


def _read_pooling(config: ModelConfig, root: Path) -> str:
    """Return how the model pools, as it says itself."""
    modules = _read_json(config, root, MODULES_FILE)
    if not isinstance(modules, list) or not all(
        isinstance(module, dict) and {"type", "path"} <= module.keys() for module in modules
    ):
        raise ModelError(f"{config.name}: {MODULES_FILE} is not a list of modules.")
    kinds = {str(module["type"]).rpartition(".")[2]: module["path"] for module in modules}
    others = [kind for kind in kinds if kind not in MODULES]
    if others or "Pooling" not in kinds:
        raise ModelError(
            f"{config.name} consists of {', '.join(kinds) or 'nothing'}. Expected no other parts "
            f"than {', '.join(MODULES)}."
        )
    if kinds.get("Transformer", ""):
        raise ModelError(
            f"{config.name} has its transformer in {kinds['Transformer']}. Expected it beside "
            f"{MODULES_FILE}."
        )
    modes = _read_json(config, root, f"{kinds['Pooling']}/config.json")
    modes = modes if isinstance(modes, dict) else {}
    chosen = [mode for mode, is_on in modes.items() if mode.startswith("pooling_mode_") and is_on]
    if len(chosen) == 1 and modes[chosen[0]] is True and chosen[0] in POOLING:
        return POOLING[chosen[0]]
    raise ModelError(
        f"{config.name} pools by {', '.join(chosen) or 'nothing'}. Expected exactly one of "
        f"{', '.join(POOLING)}."
    )


def _read_json(config: ModelConfig, root: Path, name: str) -> Any:
    """Return the content of one of the model's files, downloaded where it is not here."""
    folder = local_folder(config, root)
    try:
        path = folder / name if folder else Path(cached_file(config.name, name))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{config.name}: {name} cannot be read ({error}). Expected a sentence-embedding model "
            "as sentence-transformers saves it."
        ) from None
