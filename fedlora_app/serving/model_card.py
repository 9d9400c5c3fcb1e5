"""The model card of an export: what it is, how to load it, and where every part of it comes from.

The same run gives the same text anywhere: no time of the export and no path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fedlora_app.config.schema import LOCAL, AdapterConfig
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.names import ACCURACY, ASKED_SETS, EXACT_MATCH, Measure
from fedlora_app.foundation.percent import PARENTHESES, format_n, format_percent
from fedlora_app.runs.reading import SavedRun

CARD_FILE = "README.md"
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
        """What ``B A`` is multiplied by: alpha / rank, and lambda for a local adapter."""
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
    """Of the adapter; None: full weights."""
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


def describe_export(export: Export) -> str:
    """Return the text of the model card."""
    blocks = [
        _front_matter(export),
        f"# {export.client}, from the run {export.run.name}",
        _summary(export),
        *(f"**Note:** {note}" for note in export.notes),
        _prompt(export),
        "## Loading it",
        _merged_usage(export) if export.is_merged else _adapter_usage(export),
        *_figures(export),
        "## Where it comes from",
        "\n".join(_table(("", ""), _provenance(export))),
    ]
    return "\n\n".join(blocks) + "\n"


def portable_name(name: str) -> str:
    """Return the base model's name without this machine's folders."""
    return Path(name).name if Path(name).is_absolute() else name


def base_revision(run: SavedRun) -> str | None:
    """Return the hub's commit of the run's base model, or the revision that was asked for."""
    base = run.manifest["base_model"]
    return base.get("commit") or base["revision"]


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


def _front_matter(export: Export) -> str:
    data = ModelCardData(
        base_model=portable_name(export.run.manifest["base_model"]["name"]),
        base_model_relation="finetune" if export.is_merged else "adapter",
        base_model_revision=base_revision(export.run),
        library_name="transformers" if export.is_merged else "peft",
        pipeline_tag="text-generation",
        tags=["lora", "federated-learning"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(export: Export) -> str:
    names = " and ".join(source.role for source in export.sources)
    what = f"{names} LoRA adapter" + ("s" if len(export.sources) > 1 else "")
    how = "merged into the base model" if export.is_merged else "as one adapter"
    if len(export.sources) == 1 and not export.is_merged:
        how = "as a plain adapter"
    return (
        f"What the client {export.client} answers with after round {export.server_round} of the "
        f"federated run {export.run.name} (mode {export.run.config.federated.mode}): its {what}, "
        f"{how}.\n\n{_privacy(export)}"
    )


def _privacy(export: Export) -> str:
    if export.is_private:
        return (
            f"**Private.** It holds what {export.client}'s local adapter learnt from that client's "
            "private data. Whoever has it can ask for that: keep it as you keep the data."
        )
    config = export.run.config
    if config.federated.mode == "dual" and config.training.schedule == "phased":
        return "There is no local adapter in it, only the global one that all clients share."
    return (
        "**Private.** There is no local adapter in it, but in this run the global one was trained "
        "on all clients' private data too: keep it as you keep the data."
    )


def _prompt(export: Export) -> str:
    prompt = export.run.config.client(export.client).system_prompt
    if not prompt:
        return "It was trained without a system prompt; use none."
    longest = max(map(len, re.findall("`+", prompt)), default=0)
    fence = "`" * max(3, longest + 1)
    return (
        f"It was trained with this system prompt, and expects it:\n\n{fence}text\n{prompt}\n{fence}"
    )


def _adapter_usage(export: Export) -> str:
    name = portable_name(export.run.manifest["base_model"]["name"])
    revision = base_revision(export.run)
    pinned = f', revision="{revision}"' if revision else ""
    blocks = [
        "With PEFT:",
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}"{pinned})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```""",
    ]
    if export.max_lora_rank is not None:
        pinned = f" --revision {revision}" if revision else ""
        blocks += [
            f"With vLLM, which needs `--max-lora-rank {export.max_lora_rank}` for its rank of "
            f"{export.rank}, and computes in the base model's dtype:",
            f"""```bash
vllm serve {name}{pinned} --enable-lora --max-lora-rank {export.max_lora_rank} \\
  --lora-modules {export.client}=path/to/this/folder
```""",
        ]
    return "\n\n".join(blocks)


def _merged_usage(export: Export) -> str:
    return f"""With Transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

With vLLM:

```bash
vllm serve path/to/this/folder --served-model-name {export.client}
```"""


def _figures(export: Export) -> Iterator[str]:
    """Yield the client's own figures, if exactly these adapters were evaluated."""
    evaluation = export.run.find_evaluation(export.server_round) or {}
    wanted = (export.client, export.who.label, export.who.scale)
    rows = [
        row
        for row in evaluation.get("swap_table", [])
        if (row["client"], row["adapters"], row["scale"]) == wanted
        and row["question_set"] in ASKED_SETS
        and row["n"]
    ]
    if not rows:
        return
    yield "## Figures"
    yield (
        "On test questions under the system prompt above, with 95 % intervals: how often "
        "the right answer was ranked first, and how often the greedy answer was exactly it. They "
        "were measured with the run's own adapters and base model, not with this folder."
    )
    measures = (ACCURACY, EXACT_MATCH)
    cells = [
        (
            row["question_set"],
            *(_interval(row, measure) for measure in measures),
            format_n(row["n"], row.get("facts")),
        )
        for row in rows
    ]
    yield "\n".join(_table(("questions", *(m.label for m in measures), "n/facts"), cells))


def _interval(row: dict[str, Any], measure: Measure) -> str:
    prefix = "" if measure is ACCURACY else f"{measure.name}_"
    ends = (row[f"{prefix}{end}"] for end in ("low", "high"))
    return format_percent(row[measure.name], *ends, unit=" %", interval=PARENTHESES)


def _provenance(export: Export) -> Iterator[tuple[str, str]]:
    run, manifest = export.run, export.run.manifest
    base = manifest["base_model"]
    yield "run", f"{run.name}, mode {manifest['mode']}, seed {manifest['seed']}"
    yield "round, client", f"{export.server_round}, {export.client}"
    for source in export.sources:
        scale = f", scale (lambda) {source.scale:g}" if source.role == LOCAL else ""
        config = source.config
        layers = f", from decoder layer {config.first_layer}" if config.first_layer else ""
        yield (
            f"{source.role} adapter",
            f"rank {config.rank}, alpha {config.alpha:g}{layers}{scale}, sha256 `{source.sha256}`",
        )
    if export.rank is not None:
        yield "this adapter", f"rank {export.rank}, alpha {export.rank}, {export.dtype}"
    else:
        yield "these weights", export.dtype
    yield "base model", portable_name(base["name"])
    for key in ("revision", "commit", "fingerprint"):
        if base.get(key):
            yield f"base model's {key}", f"`{base[key]}`"
    yield "code", f"commit `{manifest['git_commit']}`" if manifest["git_commit"] else "unknown"
    versions = {"python": manifest["python"], **manifest["versions"]}
    yield "trained with", ", ".join(f"{name} {version}" for name, version in versions.items())
    for name, sha256 in export.files.items():
        yield f"sha256 of {name}", f"`{sha256}`"


def _table(headings: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield f"| {' | '.join(row)} |"
