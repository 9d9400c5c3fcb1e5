"""An export: what was written, what it was made of, and what to know before using it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedlora_app.config.schema import AdapterConfig
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.gate import GateFigures
from fedlora_app.runs.reading import SavedRun

PAIR = "pair"
"""The folder of both adapters as one, beside that of the global one alone."""
ROUTER = "router"
"""The folder of the gate that chooses between the two."""
TEMPLATE_FILE = "chat_template.jinja"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py)."""


@dataclass(frozen=True)
class Source:
    """One of the run's adapters, as it went into an export."""

    role: str
    client: str | None
    config: AdapterConfig
    scale: float
    sha256: str

    @property
    def factor(self) -> float:
        """What ``B A`` is multiplied by: alpha / rank, and its weight in the pair (lambda)."""
        return self.scale * self.config.alpha / self.config.rank


@dataclass(frozen=True)
class Export:
    """What was written and what it was made of."""

    folder: Path
    run: SavedRun
    server_round: int
    client: str
    who: Answering
    sources: tuple[Source, ...]
    dtype: str
    rank: int | None = None
    """Of the adapter, the largest of several; None: full weights."""
    gate: GateFigures | None = None
    """Of the router between global adapter and pair; None: one adapter, or full weights."""
    has_template: bool = False
    """Beside its adapters lies a chat template that is to be used in place of the base's."""
    files: dict[str, str] = field(default_factory=dict)
    """Sha256 of each file with weights."""

    @property
    def is_merged(self) -> bool:
        """Whether it is a whole model."""
        return self.rank is None

    @property
    def is_private(self) -> bool:
        """Whether a local adapter is in it."""
        return self.who.local is not None

    @property
    def max_lora_rank(self) -> int | None:
        """What vLLM's --max-lora-rank must be; None: no adapter, or too large a rank for it."""
        ranks = (rank for rank in VLLM_RANKS if self.rank is not None and rank >= self.rank)
        return next(ranks, None)

    @property
    def notes(self) -> list[str]:
        """What one should know before using it; the card says it too."""
        return list(_notes(self))


def portable_name(name: str) -> str:
    """Return the base model's name without this machine's folders."""
    return Path(name).name if Path(name).is_absolute() else name


def base_revision(run: SavedRun) -> str | None:
    """Return the hub's commit of the run's base model, or the revision that was asked for."""
    base = run.manifest["base_model"]
    return base.get("commit") or base.get("revision")


def _notes(export: Export) -> Iterator[str]:
    if export.rank is not None and export.max_lora_rank is None:
        yield (
            f"Its rank is {export.rank}, and vLLM takes {VLLM_RANKS[-1]} at most. Export merged "
            "weights for vLLM."
        )
    if _was_4bit(export.run) and export.is_merged:
        yield (
            "The adapters were trained and evaluated on the base model in 4-bit (NF4). These "
            "weights stand on the unquantised one, so answers can differ slightly from those "
            "that were evaluated."
        )
    elif _was_4bit(export.run):
        yield (
            "The adapters were trained and evaluated on the base model in 4-bit (NF4, double "
            "quantisation). On the unquantised one answers can differ slightly."
        )
    if export.is_merged and export.dtype != "float32":
        yield (
            f"Every weight was rounded to {export.dtype} after the adapters were added in fp32, "
            "which can change answers a little, too; an export in float32 is exact."
        )


def _was_4bit(run: SavedRun) -> bool:
    """Return whether clients trained on a quantised base, on whatever machines they were."""
    if run.config.model.quantization != "auto":
        return run.config.model.quantization == "4bit"
    devices = [facts.get("device", "CPU") for facts in run.manifest["clients"].values()]
    return any(not device.startswith("CPU") for device in devices)
