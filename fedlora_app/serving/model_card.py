"""The model card of an export: what it is, how to load it, and where every part of it comes from.

The same run gives the same text anywhere: no time of the export and no path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from huggingface_hub import ModelCardData

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.config.sharing import PERSONAL, STAY
from fedlora_app.evaluation.gate_files import ABOUT_FILE
from fedlora_app.evaluation.gate_report import describe_gate
from fedlora_app.evaluation.names import ACCURACY, ASKED_SETS, EXACT_MATCH, Measure
from fedlora_app.foundation.percent import PARENTHESES, format_n, format_percent
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.serving.exported import (
    PAIR,
    ROUTER,
    TEMPLATE_FILE,
    Export,
    base_revision,
    portable_name,
)

CARD_FILE = "README.md"
FOLDER = "path/to/this/folder"
TEMPLATE_NOTE = (
    f"\n\n`{TEMPLATE_FILE}` writes the prompts that it was trained with: without thoughts, and, "
    "where they name a day, with that on which the run began. The base model's own template does "
    f'not. Use it in place of that one: `tokenizer.chat_template = open("{FOLDER}/{TEMPLATE_FILE}")'
    ".read()`."
)
GREEDY = """--generation-config vllm \\
  --override-generation-config '{"temperature": 0}'"""
"""Of vLLM, which otherwise takes the base model's sampling settings, or samples without any."""


def describe_export(export: Export) -> str:
    """Return the text of the model card."""
    blocks = [
        _front_matter(export),
        f"# {export.client}, from the run {export.run.name}",
        _summary(export),
        *(f"**Note:** {note}" for note in export.notes),
        _prompt(export),
        "## Loading it",
        _usage(export),
        *_figures(export),
        "## Where it comes from",
        "\n".join(_table(("", ""), _provenance(export))),
    ]
    return "\n\n".join(blocks) + "\n"


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
    if export.gate is not None:
        how = (
            f"as two adapters, `{GLOBAL}/` alone and both as one in `{PAIR}/`, with `{ROUTER}/`, "
            "which chooses for every question which of the two answers"
        )
    return (
        f"What the client {export.client} answers with after round {export.server_round} of the "
        f"federated run {export.run.name} (mode {export.run.config.federated.mode}): its {what}, "
        f"{how}.\n\n{_privacy(export)}"
    )


def _own_factor(export: Export) -> str:
    rule = export.run.config.federated.rule
    return (
        f"By the aggregation rule {rule} the global adapter has a factor that {export.client} "
        "trained and never sends."
    )


def _privacy(export: Export) -> str:
    rule = export.run.config.federated.rule
    keeps_factor = rule in STAY
    if export.gate is not None:
        private = "**Private.**" if keeps_factor else f"**Private**, but for `{GLOBAL}/`."
        own = f" {_own_factor(export)}" if keeps_factor else ""
        return (
            f"{private}{own} `{PAIR}/` holds what {export.client}'s local "
            f"adapter learnt from that client's private data, and `{ROUTER}/` is made from that "
            "client's own questions. Whoever has them can ask for that: keep them as you keep the "
            "data."
        )
    if export.is_private:
        return (
            f"**Private.** It holds what {export.client}'s local adapter learnt from that client's "
            "private data. Whoever has it can ask for that: keep it as you keep the data."
        )
    if keeps_factor:
        return f"**Private.** {_own_factor(export)} Keep it as you keep the data."
    config = export.run.config
    trained = {"mode": config.federated.mode, "schedule": config.training.schedule}
    trained = export.run.manifest.get("adapted_from") or trained
    if trained.get("mode") == "dual" and trained.get("schedule") == "phased":
        whose = "that all clients share" if rule not in PERSONAL else "made of the others' updates"
        return f"There is no local adapter in it, only the global one {whose}."
    return (
        "**Private.** There is no local adapter in it, but in this run the global one was trained "
        "on all clients' private data too: keep it as you keep the data."
    )


def _prompt(export: Export) -> str:
    prompt = export.run.config.client(export.client).system_prompt
    template = TEMPLATE_NOTE if export.has_template else ""
    if not prompt:
        return f"It was trained without a system prompt; use none.{template}"
    longest = max(map(len, re.findall("`+", prompt)), default=0)
    fence = "`" * max(3, longest + 1)
    return (
        f"It was trained with this system prompt, and expects it:\n\n{fence}text\n{prompt}\n{fence}"
        f"{template}"
    )


def _usage(export: Export) -> str:
    if export.is_merged:
        return _merged_usage(export)
    return _adapter_usage(export) if export.gate is None else _routed_usage(export)


def _load_with_peft(export: Export, model: str) -> list[str]:
    """Return the part on PEFT: how the base model is loaded, and then ``model``."""
    name = portable_name(export.run.manifest["base_model"]["name"])
    revision = base_revision(export.run)
    pinned = f', revision="{revision}"' if revision else ""
    return [
        "With PEFT:",
        f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

base = AutoModelForCausalLM.from_pretrained("{name}"{pinned})
ends = base.generation_config.eos_token_id
base.generation_config = GenerationConfig(eos_token_id=ends)  # greedy, without penalties
{model}
```""",
    ]


def _vllm_base(export: Export) -> str:
    """Return the base model as vLLM's command names it."""
    revision = base_revision(export.run)
    name = portable_name(export.run.manifest["base_model"]["name"])
    return name + (f" --revision {revision}" if revision else "")


def _vllm_settings(export: Export) -> str:
    """Return what has vLLM write the prompts that were trained with, and answer greedily."""
    template = f" \\\n  --chat-template {FOLDER}/{TEMPLATE_FILE}" if export.has_template else ""
    return GREEDY + template


def _adapter_usage(export: Export) -> str:
    loading = f'model = PeftModel.from_pretrained(base, "{FOLDER}")'
    blocks = _load_with_peft(export, loading)
    if export.max_lora_rank is not None:
        blocks += [
            f"With vLLM, which needs `--max-lora-rank {export.max_lora_rank}` for its rank of "
            f"{export.rank}, and computes in the base model's dtype:",
            f"""```bash
vllm serve {_vllm_base(export)} {_vllm_settings(export)} \\
  --enable-lora --max-lora-rank {export.max_lora_rank} --lora-modules {export.client}={FOLDER}
```""",
        ]
    return "\n\n".join(blocks)


def _routed_usage(export: Export) -> str:
    loading = (
        f'model = PeftModel.from_pretrained(base, "{FOLDER}/{GLOBAL}", adapter_name="{GLOBAL}")\n'
        f'model.load_adapter("{FOLDER}/{PAIR}", adapter_name="{PAIR}")\n'
        f'model.set_adapter("{PAIR}")  # or "{GLOBAL}", as the router chooses'
    )
    blocks = [
        *_load_with_peft(export, loading),
        f"`{ROUTER}/{ABOUT_FILE}` says how the router makes features of a question with the base "
        "model, what it compares them with and how it decides: only the last question counts, "
        "under the system prompt above. `docs/router.py` of fedlora-app, a short script, does "
        "that, needs transformers and safetensors and nothing of fedlora-app, and passes requests "
        "on to an OpenAI-compatible server of both adapters.",
    ]
    if export.max_lora_rank is not None:
        name = portable_name(export.run.manifest["base_model"]["name"])
        blocks += [
            "With vLLM and that script before it:",
            f"""```bash
vllm serve {_vllm_base(export)} --port 8001 {_vllm_settings(export)} \\
  --enable-lora --max-loras 2 --max-lora-rank {export.max_lora_rank} \\
  --lora-modules {GLOBAL}={FOLDER}/{GLOBAL} {PAIR}={FOLDER}/{PAIR}
python router.py {FOLDER}/{ROUTER} --base {name} --upstream http://127.0.0.1:8001
```""",
        ]
    return "\n\n".join(blocks)


def _merged_usage(export: Export) -> str:
    return f"""With Transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{FOLDER}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")
```

With vLLM:

```bash
vllm serve {FOLDER} --served-model-name {export.client} {GREEDY}
```"""


def _figures(export: Export) -> Iterator[str]:
    """Yield the client's own figures, if exactly these adapters were evaluated.

    Raises:
        RunDirectoryError: the evaluation's file is damaged.
    """
    measures = (ACCURACY, EXACT_MATCH)
    try:
        cells = [
            (
                row["question_set"],
                *(_interval(row, measure) for measure in measures),
                format_n(row["n"], row.get("facts")),
            )
            for row in _find_rows(export)
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        path = export.run.evaluation_path(export.server_round, export.who.combine)
        raise RunDirectoryError(
            f"{path} is damaged ({type(error).__name__}: {error}). Evaluate the round again, or "
            "delete the file to have a model card without figures."
        ) from None
    if not cells:
        return
    yield "## Figures"
    yield (
        "On test questions under the system prompt above, with 95 % intervals: how often "
        "the right answer was ranked first, and how often the greedy answer was exactly it. They "
        "were measured with the run's own adapters and base model, not with this folder."
    )
    yield "\n".join(_table(("questions", *(m.label for m in measures), "n/facts"), cells))


def _find_rows(export: Export) -> Iterator[dict[str, Any]]:
    evaluation = export.run.find_evaluation(export.server_round, export.who.combine) or {}
    wanted = (export.client, export.who.label, export.who.scale)
    for row in evaluation.get("swap_table", []):
        is_own = (row["client"], row["adapters"], row["scale"]) == wanted
        if is_own and row["question_set"] in ASKED_SETS and row["n"]:
            yield row


def _interval(row: dict[str, Any], measure: Measure) -> str:
    prefix = "" if measure is ACCURACY else f"{measure.name}_"
    ends = (row[f"{prefix}{end}"] for end in ("low", "high"))
    return format_percent(row[measure.name], *ends, unit=" %", interval=PARENTHESES)


def _provenance(export: Export) -> Iterator[tuple[str, str]]:
    run, manifest = export.run, export.run.manifest
    base = manifest["base_model"]
    yield "run", f"{run.name}, mode {manifest['mode']}, seed {manifest.get('seed', 'unknown')}"
    yield "round, client", f"{export.server_round}, {export.client}"
    for source in export.sources:
        is_scaled = source.role == LOCAL or source.scale != 1
        scale = f", scale (lambda) {source.scale:g}" if is_scaled else ""
        config = source.config
        layers = f", from decoder layer {config.first_layer}" if config.first_layer else ""
        yield (
            f"{source.role} adapter",
            f"rank {config.rank}, alpha {config.alpha:g}{layers}{scale}, sha256 `{source.sha256}`",
        )
    if export.gate is not None:
        alone = export.sources[0].config.rank
        for name, rank in ((GLOBAL, alone), (PAIR, export.rank)):
            yield f"{name}/", f"rank {rank}, alpha {rank}, {export.dtype}"
        yield f"{ROUTER}/", describe_gate(asdict(export.gate))
    elif export.rank is not None:
        yield "this adapter", f"rank {export.rank}, alpha {export.rank}, {export.dtype}"
    else:
        yield "these weights", export.dtype
    yield "base model", portable_name(base["name"])
    for key in ("revision", "commit", "fingerprint"):
        if base.get(key):
            yield f"base model's {key}", f"`{base[key]}`"
    commit = manifest.get("git_commit")
    yield "code", f"commit `{commit}`" if commit else "unknown"
    versions = {"python": manifest.get("python", "unknown"), **manifest["versions"]}
    yield "trained with", ", ".join(f"{name} {version}" for name, version in versions.items())
    for name, sha256 in export.files.items():
        yield f"sha256 of {name}", f"`{sha256}`"


def _table(headings: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield f"| {' | '.join(row)} |"
