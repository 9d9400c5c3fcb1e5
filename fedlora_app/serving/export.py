"""What a client answers with, to take away: a plain LoRA adapter, two with a router, or a model.

Input: a run directory and a client. Output: a folder that PEFT, Transformers and multi-LoRA
servers such as vLLM load without this package. The pair ``s_G B_G A_G + lambda s_L B_L A_L`` is
one adapter of rank r_G + r_L: ``A = [A_G; A_L]``, ``B = [s_G B_G, lambda s_L B_L]``. Where a gate
decides whether the local adapter answers, that is a choice between two plain adapters, the
global one and the pair, and the gate that makes it is written beside them. Weights that were
searched for make one adapter, too; those that change with the question or the token make none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedlora_app.config.combination import GATE, SCALE, SEARCH
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.dialogue import find_prompt_frame, pin_date, write_served_template
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.combiner import WHOLE_PAIR, Weights
from fedlora_app.evaluation.gate import Gate
from fedlora_app.evaluation.gate_files import save_gate
from fedlora_app.evaluation.generation import find_ends, find_stop_ids
from fedlora_app.evaluation.prompt_features import find_middle_layer
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.search import SearchedWeights
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import hash_file, make_private_dir, replace_folder
from fedlora_app.model.adapter_files import save_plain_adapter
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, PlainAdapter, attach_adapters, merge_into_base
from fedlora_app.model.base import (
    DTYPES,
    build_empty_model,
    compute_fingerprint,
    load_model_config,
    load_tokenizer,
    load_unquantised_model,
)
from fedlora_app.model.pretrained import local_folder
from fedlora_app.serving.exported import (
    PAIR,
    ROUTER,
    TEMPLATE_FILE,
    Export,
    Source,
    base_revision,
    portable_name,
)
from fedlora_app.serving.model_card import CARD_FILE, describe_export

Dtype = Literal["float32", "bfloat16"]


class ExportError(UserError):
    """What is asked for cannot be exported, or not to that place."""


@dataclass(frozen=True)
class Part:
    """An adapter that is to become part of one: its weights, and the factor of what it adds."""

    state: AdapterState
    rank: int
    factor: float


def export_adapter(
    saved: SavedModel,
    client_id: str,
    output_dir: Path,
    scale: float = 1.0,
    dtype: Dtype = "float32",
) -> Export:
    """Write what a client answers with as one PEFT adapter, or as two and the gate between them.

    One adapter needs none of the base's weights. Behind a gate there are the folders ``global``,
    ``pair`` and ``router``. Where the base's chat template does not write by itself the prompts
    that were trained with, one that does lies beside them.

    Args:
        output_dir: must be empty or not there.
        scale: of the local adapter (lambda); folded in.

    Raises:
        ExportError: nothing is left of the pair, no adapter combines as it does, or the folder is
            in use.
        ConfigError: there is no such client, or the scale has no effect.
        ModelError: a gate or a search needs the base model, which is not there or not the run's.
    """
    who = _choose(saved, client_id, scale)
    folder = _require_unused(output_dir)
    gate, weights = _find_combiner(saved, who)
    sources = tuple(_list_sources(saved, who, weights))
    rank = sum(source.config.rank for source in sources)
    at, figures = saved.server_round, gate and gate.figures
    tokenizer = _load_tokenizer(saved)
    template = write_served_template(tokenizer)
    has_template = template != tokenizer.get_chat_template()
    export = Export(
        folder, saved.run, at, client_id, who, sources, dtype, rank, figures, has_template
    )
    with _private_folder(folder) as partial:
        if has_template:
            (partial / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        if gate is None:
            _write_adapter(partial, saved, sources, dtype)
        else:
            for name, parts in ((GLOBAL, sources[:1]), (PAIR, sources)):
                (partial / name).mkdir()
                _write_adapter(partial / name, saved, parts, dtype)
            (partial / ROUTER).mkdir()
            _write_router(partial / ROUTER, saved, client_id, gate, tokenizer)
        return _write_card(export, partial)


def export_merged(
    saved: SavedModel,
    client_id: str,
    output_dir: Path,
    scale: float = 1.0,
    dtype: Dtype | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Export:
    """Write a whole model that answers as a client does, made from the unquantised base.

    Its settings are greedy and its chat template writes the prompts that were trained with.

    Args:
        dtype: of the weights; None: the checkpoint's own, or bfloat16.
        report: is told what is done next; a model of 7 B takes minutes and 15 GB of memory.

    Raises:
        ExportError, ConfigError: as ``export_adapter``; a gate decides which adapters answer.
        ModelError: the base model is not there, or not the run's.
    """
    who = _choose(saved, client_id, scale)
    folder = _require_unused(output_dir)
    gate, weights = _find_combiner(saved, who)
    if gate is not None:
        raise ExportError(
            "A gate (adapters.gate: prompt, or --combine gate) decides for every question "
            f"whether the local adapter answers, so no single model answers as {client_id} does. "
            "Leave out --merged to get the global adapter, the pair and the router that chooses "
            "between them, or merge with --scale 0 the global adapter alone."
        )
    sources = tuple(_list_sources(saved, who, weights))
    adapter = _combine_saved(saved, sources)
    config = saved.run.config.model
    report("loading the base model")
    dtype = dtype or _checkpoint_dtype(saved)
    base = load_unquantised_model(config, saved.root, DTYPES[dtype])
    saved.check_base(compute_fingerprint(config, saved.root))
    report("merging")
    merge_into_base(base, adapter)
    report("writing")
    tokenizer = _load_tokenizer(saved)
    base.generation_config = GenerationConfig(  # as answers are made in ``generation``
        do_sample=False,
        eos_token_id=find_ends(base, find_stop_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.chat_template = write_served_template(tokenizer)
    with _private_folder(folder) as partial:
        base.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        export = Export(folder, saved.run, saved.server_round, client_id, who, sources, dtype)
        return _write_card(export, partial)


def combine(parts: Sequence[Part]) -> AdapterState:
    """Return the adapter of scaling 1 that adds what all parts add together.

    A module that a part does not have gets zeros from it, so that the rank is the same
    everywhere: not every server can do with several.
    """
    modules = sorted({_module(key) for part in parts for key in part.state})
    combined = {}
    for module in modules:
        a_key, b_key = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        known = next(part.state for part in parts if a_key in part.state)
        num_in, num_out = known[a_key].shape[1], known[b_key].shape[0]
        above, beside = [], []
        for part in parts:
            a, b = part.state.get(a_key), part.state.get(b_key)
            above.append(torch.zeros(part.rank, num_in) if a is None else a)  # (r, in)
            beside.append(torch.zeros(num_out, part.rank) if b is None else part.factor * b)
        combined[a_key], combined[b_key] = torch.cat(above, 0), torch.cat(beside, 1)
    return combined


def find_target_modules(names: Iterable[str], wanted: set[str]) -> list[str]:
    """Return the shortest names by which PEFT finds exactly the wanted modules, sorted.

    It takes a module whose name is one of them, or ends with a dot and one of them.
    """
    names = list(names)
    targets = set()
    for module in wanted:
        suffix = module.rsplit(".", 1)[-1]
        found = {name for name in names if name == suffix or name.endswith(f".{suffix}")}
        targets.add(suffix if found <= wanted else module)
    return sorted(targets)


def _choose(saved: SavedModel, client_id: str, scale: float) -> Answering:
    """Return the adapters to export, none of which has no effect."""
    who = saved.own(client_id, scale)
    if who.local is None or who.scale == 0:
        if not who.with_global:
            raise ExportError(f"With scale 0 nothing of what {client_id} answers with is left.")
        return saved.alone(client_id)  # a local adapter that is scaled away stays at home
    return who


def _find_combiner(saved: SavedModel, who: Answering) -> tuple[Gate | None, Weights]:
    """Return a gate, if one decides, and the constant weights of the two adapters.

    Raises:
        ExportError: the weights are not constant.
    """
    name = who.combination(saved.run.config.adapters)
    if name == SCALE:
        return None, WHOLE_PAIR
    if name not in (GATE, SEARCH):
        raise ExportError(
            f"{name} weighs the two adapters anew for every question or token, which no LoRA "
            "adapter and no model can do by itself. Export with --combine scale or search (one "
            "adapter), or gate (two and a router); ask and serve answer with all of them."
        )
    fingerprint = compute_fingerprint(saved.run.config.model, saved.root)
    saved.check_base(fingerprint)
    combiner = saved.find_combiner(who, fingerprint)
    if isinstance(combiner, SearchedWeights):
        return None, combiner.weights
    return combiner, WHOLE_PAIR


def _require_unused(output_dir: Path) -> Path:
    folder = output_dir.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{output_dir} is there and not empty. Name a new or an empty folder.")
    return folder


def _list_sources(saved: SavedModel, who: Answering, weights: Weights) -> Iterator[Source]:
    """Yield the adapters that have any effect; one that has none stays at home."""
    adapters = saved.run.config.adapters
    if who.with_global and weights.of_global != 0:
        sha256 = saved.global_sha256(who.global_of)
        config, scale = adapters.global_.joint, weights.of_global
        yield Source(GLOBAL, who.global_of, config, scale, sha256)
    if who.local is not None and weights.of_local != 0:
        sha256 = saved.run.adapter_sha256(saved.server_round, who.local)
        scale = weights.of_local * who.scale
        yield Source(LOCAL, who.local, adapters.local, scale, sha256)


def _read(saved: SavedModel, source: Source, model: AdaptedModel) -> AdapterState:
    if source.role == GLOBAL:
        return saved.read_global(source.client, model)
    return saved.read_state(source.client, model)


def _combine_saved(saved: SavedModel, sources: Sequence[Source]) -> PlainAdapter:
    """Return the round's adapters as one, checked against a base model without weights."""
    config = saved.run.config
    empty = build_empty_model(config.model, saved.root)
    names = [name for name, _ in empty.named_modules()]
    model = attach_adapters(empty, config.adapters)
    state = combine(
        [Part(_read(saved, source, model), source.config.rank, source.factor) for source in sources]
    )
    modules = {_module(key).removeprefix("base_model.model.") for key in state}
    rank = sum(source.config.rank for source in sources)
    return PlainAdapter(state, rank, find_target_modules(names, modules), base_revision(saved.run))


def _write_adapter(
    folder: Path, saved: SavedModel, sources: Sequence[Source], dtype: Dtype
) -> None:
    adapter = _combine_saved(saved, sources)
    state = {key: tensor.to(DTYPES[dtype]) for key, tensor in adapter.state.items()}
    save_plain_adapter(folder, replace(adapter, state=state), _loadable_name(saved))


def _load_tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(saved.run.config.model, saved.root)
    pin_date(tokenizer, saved.run.date)
    return tokenizer


def _write_router(
    folder: Path,
    saved: SavedModel,
    client_id: str,
    gate: Gate,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a gate with what it takes to ask it without this package and the client's data."""
    config = saved.run.config.model
    prompt = saved.run.config.client(client_id).system_prompt
    before, after = find_prompt_frame(tokenizer, prompt)
    num_layers = load_model_config(config, saved.root).get_text_config().num_hidden_layers
    save_gate(
        folder,
        gate,
        {"base_model": compute_fingerprint(config, saved.root)},
        base_model={"name": portable_name(config.name), "revision": base_revision(saved.run)},
        middle_layer=find_middle_layer(num_layers),
        system_prompt=prompt,
        text_before_question=before,
        text_after_question=after,
    )


def _loadable_name(saved: SavedModel) -> str:
    """Return the base model by a name under which PEFT finds it, whatever folder it is called in.

    The other files name no folder of this machine.
    """
    folder = local_folder(saved.run.config.model, saved.root)
    return str(folder.resolve()) if folder is not None else saved.run.config.model.name


def _module(key: str) -> str:
    return key.rsplit(".lora_", 1)[0]


def _checkpoint_dtype(saved: SavedModel) -> Dtype:
    found = load_model_config(saved.run.config.model, saved.root).get_text_config().dtype
    return "float32" if found in (torch.float32, "float32") else "bfloat16"


@contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder for the owner only, which takes its place when the block ends well."""
    make_private_dir(folder.parent)
    try:
        with replace_folder(folder) as partial:
            partial.chmod(0o700)
            yield partial
    except SafetensorError as error:
        raise ExportError(f"{folder} cannot be written: {error}.") from error


def _write_card(export: Export, partial: Path) -> Export:
    """Return the export with the hashes of its weights, after writing its model card."""
    weights = sorted(partial.rglob("*.safetensors"))
    files = {path.relative_to(partial).as_posix(): hash_file(path) for path in weights}
    export = replace(export, files=files)
    (partial / CARD_FILE).write_text(describe_export(export), encoding="utf-8")
    return export
