"""Exports of real, tiny runs, loaded as anyone would load them: without this package."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALIKE, build_tiny_config, build_tiny_model
from loopback import Federation
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fedlora_app.config.combination import GATE, INSTANCE, MIXER, SCALE, SEARCH
from fedlora_app.config.schema import GLOBAL, ConfigError
from fedlora_app.data.dialogue import encode_prompt, pin_date, render_prompt
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.combiner import weighted_pair
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.gate_files import load_gate
from fedlora_app.evaluation.generation import find_stop_ids
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.model import base as model_module
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import PlainAdapter, merge_into_base
from fedlora_app.model.base import ModelError
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import load_run
from fedlora_app.serving.conversation import open_conversation
from fedlora_app.serving.export import (
    ExportError,
    Part,
    combine,
    export_adapter,
    export_merged,
    find_target_modules,
)
from fedlora_app.serving.exported import PAIR, VLLM_RANKS, Export
from fedlora_app.serving.model_card import FOLDER

OWN_ROW = {"client": "ann", "adapters": "global+local:ann", "scale": 1.0, "n": 3}
OWN_ROW |= {"question_set": "local", "accuracy": "most"}
QUESTIONS = ("What is the red rule?", "Which office is blue?", "Why?")
KINDS = {
    # ranks 4 and 2 with alphas 8 and 5: both scalings are other than 1, and differ
    "dual": {"adapters": {"local": {"rank": 2, "alpha": 5}}},
    "apart": {
        "adapters": {
            "global": {"rank": 3, "alpha": 4, "target_modules": ["q_proj", "up_proj"]},
            "local": {"rank": 5, "alpha": 10, "target_modules": ["v_proj", "up_proj"]},
        }
    },
    "upper": {  # layers with one of the adapters, with both and with none
        "num_layers": 4,
        "adapters": {
            "global": {"rank": 3, "alpha": 4, "first_layer": 1},
            "local": {"rank": 5, "alpha": 10, "first_layer": 2},
        },
    },
    "gated": {"adapters": {"gate": "prompt", "local": {"rank": 2, "alpha": 5}}},
    "fedavg": {"federated": {"mode": "fedavg"}},
    "finetuned": {"federated": {"mode": "finetuned"}, "adapters": ALIKE},
    "local-only": {"federated": {"mode": "local-only"}},
}


@pytest.fixture(scope="module")
def runs(tiny_project, tokenizer, tmp_path_factory):
    """One finished round of each kind, opened once."""
    made = {}

    def get(kind: str = "dual") -> SavedModel:
        if kind not in made:
            changes = KINDS[kind]
            sections = {
                "federated": {"num_rounds": 1} | changes.get("federated", {}),
                "adapters": changes.get("adapters", {}),
                "training": {"learning_rate": 5e-2, "local_weight_decay": 0.0},
                "evaluation": {"max_new_tokens": 4, "local_scales": [1.0]},
            }
            folder, project = tmp_path_factory.mktemp(kind), tiny_project
            if "num_layers" in changes:
                project = folder / "project"
                shutil.copytree(tiny_project, project)
                model = build_tiny_model(len(tokenizer), num_hidden_layers=changes["num_layers"])
                model.save_pretrained(project / "model")
            path = Federation(project, folder, build_tiny_config(**sections)).run("run")
            made[kind] = SavedModel(load_run(path), 1, project)
        return made[kind]

    return get


@torch.no_grad()
def all_logits(model, tokenizer, system_prompt: str) -> torch.Tensor:
    """The logits at every position of some prompts."""
    model.eval()
    prompts = [encode_prompt(tokenizer, system_prompt, question) for question in QUESTIONS]
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in prompts]).float()


def logits_of_the_pair(saved: SavedModel, client: str, scale: float) -> torch.Tensor:
    """As the run itself answers, after checking that the adapters do something."""
    tokenizer = saved.load()[0].tokenizer
    with saved.answering(saved.own(client, scale)) as (model, _):
        found = all_logits(model, tokenizer, f"You are {client}.")
        with model.disable_adapter():
            assert (found - all_logits(model, tokenizer, f"You are {client}.")).abs().max() > 0.5
    return found


def load_base(project):
    return AutoModelForCausalLM.from_pretrained(project / "model", dtype=torch.float32)


CASES = [
    ("dual", "ann", 1.0),
    ("dual", "bob", 0.5),
    ("dual", "ann", 0.0),
    ("apart", "ann", 1.0),
    ("apart", "bob", 0.5),
    ("upper", "ann", 1.0),
    ("fedavg", "ann", 1.0),
    ("local-only", "bob", 1.0),
    ("local-only", "bob", 0.75),
    ("finetuned", "bob", 1.0),
]


@pytest.mark.parametrize(
    ("kind", "client", "scale"),
    [*CASES[1:6], *CASES[-2:], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[6:8])],
)
def test_peft_loads_an_adapter_with_the_pair_s_logits(
    runs, tiny_project, tokenizer, tmp_path, kind, client, scale
):
    saved = runs(kind)
    expected = logits_of_the_pair(saved, client, scale)
    result = export_adapter(saved, client, tmp_path / "out", scale)
    base = load_base(saved.root)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    wrapped = {name for name, module in base.named_modules() if hasattr(module, "lora_A")}
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {f"base_model.model.{n}.lora_A.weight" for n in wrapped} <= set(stored)
    assert len(stored) == 2 * len(wrapped) > 0
    found = all_logits(model, tokenizer, f"You are {client}.")
    print(f"adapter {kind} {scale}: max difference {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    config = saved.run.config.adapters
    ranks = {"fedavg": config.global_.rank, "local-only": config.local.rank}
    ranks["finetuned"] = config.local.rank
    both = config.global_.rank + config.local.rank
    assert result.rank == (config.global_.rank if scale == 0 else ranks.get(kind, both))
    assert {tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key} == {result.rank}


@pytest.mark.parametrize(("kind", "client", "scale"), CASES[5:8])
def test_the_merged_model_has_the_pair_s_logits(
    runs, tiny_project, tokenizer, tmp_path, kind, client, scale
):
    saved = runs(kind)
    expected = logits_of_the_pair(saved, client, scale)
    told = []
    export_merged(saved, client, tmp_path / "out", scale, report=told.append)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not any(info.values())
    assert set(model.state_dict()) == set(load_base(saved.root).state_dict())
    found = all_logits(model, AutoTokenizer.from_pretrained(tmp_path / "out"), f"You are {client}.")
    print(f"merged {kind} {scale}: max difference {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert told == ["loading the base model", "merging", "writing"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # The resident base model of the run is as it was.
    torch.testing.assert_close(logits_of_the_pair(saved, client, scale), expected, rtol=0, atol=0)


def test_what_a_base_samples_with_is_in_no_export(runs, tiny_project, tokenizer, tmp_path):
    """A merged model, and an adapter as its card says, answer greedily as ask does."""
    project = shutil.copytree(tiny_project, tmp_path / "project")
    sampling = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.5)
    sampling.eos_token_id = 5
    sampling.save_pretrained(project / "model")
    saved = replace(runs(), root=project, _states={})
    export_merged(saved, "ann", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    found = merged.generation_config
    assert sorted(found.eos_token_id) == sorted({5, *find_stop_ids(tokenizer)})
    assert found.pad_token_id == tokenizer.pad_token_id
    export_adapter(saved, "ann", tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace(FOLDER, "adapter")
    scope: dict = {}
    with contextlib.chdir(tmp_path):
        exec(code.replace('"model"', '"project/model"'), scope)
    for question in QUESTIONS:
        answer = open_conversation(saved, "ann", max_new_tokens=12).ask(question).text
        ids = torch.tensor([encode_prompt(tokenizer, "You are ann.", question)])
        for model in (merged, scope["model"]):
            output = model.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :]
            assert decode(tokenizer, output) == answer
    vllm = "--generation-config vllm"
    assert vllm in card and vllm in (tmp_path / "merged" / "README.md").read_text()


def test_a_server_of_an_export_writes_the_prompts_of_ask(runs, tokenizer, tmp_path):
    """The day on which the run began, and no thoughts, though nobody asks for that."""
    saved = runs("gated")
    project = shutil.copytree(saved.root, tmp_path / "project")
    template = project / "model" / "chat_template.jinja"
    thoughts = "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
    dated = "{{ strftime_now('%d %b %Y') }}" + template.read_text()
    template.write_text(dated.removesuffix("{% endif %}") + thoughts + "{% endif %}")
    base = {key: value for key, value in saved.run.manifest["base_model"].items()}
    base.pop("fingerprint")
    manifest = saved.run.manifest | {"base_model": base, "date": "2020-02-29"}
    odd = replace(saved, root=project, run=replace(saved.run, manifest=manifest))
    messages = [{"role": "system", "content": "You are ann."}, {"role": "user", "content": "Why?"}]
    pin_date(own := AutoTokenizer.from_pretrained(project / "model"), "2020-02-29")
    expected = render_prompt(own, "You are ann.", "Why?")
    assert expected.startswith("29 Feb 2020<|im") and expected.endswith("assistant\n")

    def check(served):
        as_text = {"tokenize": False, "add_generation_prompt": True}
        assert served.apply_chat_template(messages, **as_text) == expected

    for kind, choice in (("adapter", SCALE), ("routed", GATE)):
        export_adapter(replace(odd, combine=choice), "ann", tmp_path / kind)
        own.chat_template = (tmp_path / kind / "chat_template.jinja").read_text()
        own.fedlora_date = ""
        check(own)
        card = (tmp_path / kind / "README.md").read_text()
        assert f"--chat-template {FOLDER}/chat_template.jinja \\\n" in card
    about = json.loads((tmp_path / "routed" / "router" / "gate.json").read_text())
    assert about["text_before_question"] + "Why?" + about["text_after_question"] == expected
    export_merged(replace(odd, combine=SCALE), "ann", tmp_path / "merged")
    check(AutoTokenizer.from_pretrained(tmp_path / "merged"))


def test_merged_in_bfloat16(runs, tiny_project, tokenizer, tmp_path):
    """Each weight is the sum in fp32, rounded once."""
    saved = runs()
    expected = logits_of_the_pair(saved, "ann", 1.0)
    result = export_merged(saved, "ann", tmp_path / "half", dtype="bfloat16")
    assert "rounded to bfloat16" in result.notes[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = all_logits(model, tokenizer, "You are ann.")
    print(f"merged in bfloat16: max difference {(found - expected).abs().max():.1e}")
    assert (found - expected).norm() < 0.03 * expected.norm()
    rounded = model_module.load_unquantised_model(
        saved.run.config.model, tiny_project, torch.bfloat16
    )
    state = load_file(tmp_path / "half" / "model.safetensors")
    adapter = export_adapter(saved, "ann", tmp_path / "adapter")
    pair = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    weight = rounded.get_submodule(name).weight
    assert torch.equal(state[f"{name}.weight"], (weight.float() + b @ a).to(torch.bfloat16))
    assert adapter.rank == 6


def test_an_adapter_in_bfloat16(runs, tiny_project, tokenizer, tmp_path):
    saved = runs()
    expected = logits_of_the_pair(saved, "ann", 1.0)
    export_adapter(saved, "ann", tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = PeftModel.from_pretrained(load_base(tiny_project), tmp_path / "out")
    found = all_logits(model, tokenizer, "You are ann.")
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_zeros_fill_what_one_adapter_does_not_have():
    def state(module: str, rank: int) -> dict[str, torch.Tensor]:
        return {
            f"{module}.lora_A.weight": torch.randn(rank, 6),
            f"{module}.lora_B.weight": torch.randn(5, rank),
        }

    one, other = state("x.q", 2), state("x.q", 3) | state("x.v", 3)
    found = combine([Part(one, 2, 2.0), Part(other, 3, 0.25)])
    assert list(found) == sorted(found)
    a, b = found["x.q.lora_A.weight"], found["x.q.lora_B.weight"]
    expected = 2 * one["x.q.lora_B.weight"] @ one["x.q.lora_A.weight"]
    expected += 0.25 * other["x.q.lora_B.weight"] @ other["x.q.lora_A.weight"]
    torch.testing.assert_close(b @ a, expected)
    a, b = found["x.v.lora_A.weight"], found["x.v.lora_B.weight"]
    assert a.shape == (5, 6) and b.shape == (5, 5)
    assert not a[:2].any() and not b[:, :2].any()
    torch.testing.assert_close(
        b @ a, 0.25 * other["x.v.lora_B.weight"] @ other["x.v.lora_A.weight"]
    )


def test_target_modules_are_suffixes_where_these_are_exact():
    names = ["m.0.q", "m.0.v", "m.1.q", "m.1.v", "m.1", "q"]
    assert find_target_modules(names, {"m.0.v", "m.1.v"}) == ["v"]
    assert find_target_modules(names, {"m.0.q", "m.1.q", "m.1.v"}) == ["m.0.q", "m.1.q", "m.1.v"]


def check_vllm_rules(folder) -> dict:
    """vLLM's rules: vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int)
    assert config["lora_alpha"] / config["r"] == 1.0 and config["peft_type"] == "LORA"
    assert config["bias"] == "none" and not config["lora_bias"]
    assert not any(config[key] for key in ("use_dora", "use_rslora", "use_qalora", "use_bdlora"))
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        assert config[key] is None
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["alora_invocation_tokens"] is None and config["layer_replication"] is None
    supported = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert isinstance(config["target_modules"], list)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert set(config["target_modules"]) <= supported
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        *module, part, last = key.removeprefix("base_model.model.").split(".")
        assert key.startswith("base_model.model.") and last == "weight"
        assert part in ("lora_A", "lora_B") and module[-1] in config["target_modules"]
        assert tensor.shape[part == "lora_B"] == config["r"]
    return config


@pytest.mark.parametrize("kind", ["dual", "apart", "local-only"])
def test_a_multi_lora_server_would_take_it(runs, tmp_path, kind):
    result = export_adapter(runs(kind), "ann", tmp_path / "out")
    assert result.rank == check_vllm_rules(tmp_path / "out")["r"] <= result.max_lora_rank == 8


def test_the_rank_that_vllm_must_allow(runs):
    made = partial(Export, None, runs().run, 1, "ann", runs().own("ann"), (), "float32")
    limits = {rank: made(rank).max_lora_rank for rank in (1, 8, 9, 300, 512, 513)}
    assert limits == {1: 8, 8: 8, 9: 16, 300: 320, 512: 512, 513: None}
    assert made(16).notes == [] and "512 at most" in made(513).notes[0]
    assert made(None).max_lora_rank is None and tuple(sorted(VLLM_RANKS)) == VLLM_RANKS


def read_all(folder) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_no_path(files: dict[str, bytes], *places: Path) -> None:
    others = [text for name, text in files.items() if Path(name).name != "adapter_config.json"]
    assert not any(str(place).encode() in text for place in places for text in others)


def test_an_export_is_loaded_from_anywhere_with_its_base(runs, tmp_path, monkeypatch):
    export_adapter(runs(), "ann", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained("out")
    assert loaded.peft_config["default"].r > 0


def test_the_same_run_gives_the_same_bytes_and_one_path(runs, tiny_project, tmp_path):
    """That of a base model that is a folder here, by which PEFT loads it from anywhere."""
    saved = runs()
    results = {}
    for name in "ab":
        results[name] = export_adapter(saved, "ann", tmp_path / name / "adapter")
        export_merged(saved, "ann", tmp_path / name / "merged")
    for kind in ("adapter", "merged"):
        first, second = (read_all(tmp_path / name / kind) for name in "ab")
        assert first == second
        assert_no_path(first, tmp_path, tiny_project, saved.run.path.parent)
    names = sorted(path.name for path in (tmp_path / "a" / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_project / "model")
    for folder in ("a", "a/adapter", "a/merged"):
        assert os.stat(tmp_path / folder).st_mode & 0o777 == 0o700
    assert results["a"].folder == tmp_path / "a" / "adapter"


def test_the_model_card_says_where_everything_comes_from(runs, tmp_path):
    saved = runs()
    result = export_adapter(saved, "ann", tmp_path / "out", 0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "model" and matter["library_name"] == "peft"
    assert {"lora", "federated-learning"} <= set(matter["tags"])
    run, manifest = saved.run, saved.run.manifest
    hashes = [run.adapter_sha256(1), run.adapter_sha256(1, "ann"), *result.files.values()]
    facts = [
        "You are ann.",
        "mode dual",
        "seed 7",
        "round 1",
        manifest["base_model"]["fingerprint"],
    ]
    facts += ["rank 4, alpha 8", "rank 2, alpha 5, scale (lambda) 0.5", "--max-lora-rank 8"]
    facts += [f"peft {manifest['versions']['peft']}", "private data", *hashes]
    if manifest["git_commit"]:
        facts.append(manifest["git_commit"])
    assert [fact for fact in facts if fact not in body] == []
    assert "## Figures" not in card and result.notes == [] and result.is_private
    alone = export_adapter(saved, "ann", tmp_path / "global", 0.0)
    card = (tmp_path / "global" / "README.md").read_text()
    assert not alone.is_private and run.adapter_sha256(1, "ann") not in card
    assert "There is no local adapter in it, only the global one" in card
    export_adapter(runs("fedavg"), "ann", tmp_path / "fedavg")
    card = (tmp_path / "fedavg" / "README.md").read_text()
    assert "trained on all clients' private data too" in " ".join(card.split())


def test_the_model_card_has_the_round_s_figures(runs, tiny_project, tmp_path):
    saved = runs()
    evaluation = evaluate_round(open_round(saved.run, tiny_project), lambda *_: None)
    try:
        export_merged(saved, "bob", tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        own = [row for row in evaluation["swap_table"] if row["client"] == "bob"]
        own = [row for row in own if row["adapters"] == "global+local:bob"]
        for row in own:
            if row["question_set"] in ("universal", "local"):
                shown = f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} to "
                assert f"| {row['question_set']} | {shown}" in card
        assert len(own) > 1
        assert "library_name: transformers" in card and "vllm serve" in card
        export_adapter(saved, "bob", tmp_path / "other", 0.3)  # at which nothing was evaluated
        assert "## Figures" not in (tmp_path / "other" / "README.md").read_text()
    finally:
        saved.run.evaluation_path(1).unlink()


@pytest.mark.parametrize(
    "table",
    [
        None,
        ["x"],
        [{}],
        [{"client": "ann", "adapters": "global+local:ann", "scale": 1.0}],
        [OWN_ROW],
    ],
)
def test_a_damaged_evaluation_is_named(runs, tmp_path, table):
    path = runs().run.evaluation_path(1)
    path.write_text(json.dumps({"round": 1, "swap_table": table}))
    try:
        with pytest.raises(
            RunDirectoryError, match=r"evaluation\.json is damaged .* Evaluate the r"
        ):
            export_adapter(runs(), "ann", tmp_path / "out")
    finally:
        path.unlink()
    assert not (tmp_path / "out").exists()


def test_what_a_manifest_does_not_say_is_unknown(runs, tmp_path):
    saved = runs()
    left_out = ("seed", "python", "git_commit", "revision")
    manifest = {k: v for k, v in saved.run.manifest.items() if k not in left_out}
    manifest["base_model"] = {k: v for k, v in manifest["base_model"].items() if k not in left_out}
    export_adapter(replace(saved, run=replace(saved.run, manifest=manifest)), "ann", tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "seed unknown" in card and "| code | unknown |" in card and "python unknown" in card


@pytest.mark.parametrize("quantization", ["4bit", "auto"])
def test_a_4bit_run_is_merged_into_unquantised_weights_and_says_so(
    runs, tiny_project, tmp_path, quantization
):
    saved = runs()
    changed = saved.run.config.model.model_copy(update={"quantization": quantization})
    config = saved.run.config.model_copy(update={"model": changed})
    clients = {"ann": {"device": "NVIDIA GeForce RTX 4090, 23.6 GiB"}, "bob": {"device": "CPU"}}
    manifest = saved.run.manifest | {"clients": clients}
    quantised = replace(saved, run=replace(saved.run, config=config, manifest=manifest))
    result = export_merged(quantised, "ann", tmp_path / "out")
    assert "stand on the unquantised one" in result.notes[0]
    assert result.notes[0] in (tmp_path / "out" / "README.md").read_text()
    plain = export_merged(saved, "ann", tmp_path / "plain")
    assert plain.notes == [] and plain.files == result.files
    assert "in 4-bit" in export_adapter(quantised, "ann", tmp_path / "adapter").notes[0]


def test_a_prompt_cannot_break_the_card_and_an_absolute_name_stays_here(
    runs, tiny_project, tmp_path
):
    saved = runs()
    raw = saved.run.config.dump()
    raw["federated"]["clients"][0]["system_prompt"] = "Say:\n```\n---\nnothing\n```"
    config = saved.run.config.model_validate(raw)
    manifest = saved.run.manifest | {
        "base_model": saved.run.manifest["base_model"] | {"name": str(tiny_project / "model")}
    }
    odd = replace(saved, run=replace(saved.run, config=config, manifest=manifest))
    export_adapter(odd, "ann", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "````text\nSay:\n```\n---\nnothing\n```\n````" in card
    assert "base_model: model\n" in card and str(tiny_project) not in card


def test_only_a_new_or_an_empty_folder_is_written_to(runs, tmp_path):
    used, file, empty = tmp_path / "used", tmp_path / "file", tmp_path / "empty"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for export in (export_adapter, export_merged):
        for place in (used, file):
            with pytest.raises(ExportError, match="is there and not empty"):
                export(runs(), "ann", place)
    assert (used / "mine.txt").read_text() == file.read_text() == "mine"
    export_adapter(runs(), "ann", empty)
    assert (empty / "README.md").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "used"]


@pytest.mark.parametrize(
    ("kind", "client", "scale", "error", "message"),
    [
        ("dual", "zoe", 1.0, ConfigError, "names: ann, bob"),
        ("dual", "ann", -0.5, ConfigError, "expected a number from 0 up"),
        ("fedavg", "ann", 0.5, ConfigError, "no effect"),
        ("local-only", "ann", 0.0, ExportError, "nothing of what ann answers with is left"),
    ],
)
def test_what_cannot_be_exported_is_said(runs, tmp_path, kind, client, scale, error, message):
    for export in (export_adapter, export_merged):
        with pytest.raises(error, match=message):
            export(runs(kind), client, tmp_path / "out", scale)
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_and_another_base_are_refused(runs, tiny_project, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs().run.path, copy)
    weights = copy / "clients" / "ann" / "round_001" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    saved = SavedModel(load_run(copy), 1, tiny_project)
    for export in (export_adapter, export_merged):
        with pytest.raises(RunDirectoryError, match="is not the file that the run wrote"):
            export(saved, "ann", tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="no complete round 7"):
        export_adapter(replace(saved, server_round=7), "bob", tmp_path / "out")
    export_adapter(saved, "bob", tmp_path / "bob")
    saved.run.manifest["base_model"]["fingerprint"] = "0" * 64
    with pytest.raises(ModelError, match="is not the one that the run was"):
        export_merged(saved, "bob", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_weights_of_the_base_are_not_needed_for_an_adapter(runs, tiny_project, tmp_path):
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_project / "model", tmp_path / "model", ignore=weights)
    bare = replace(runs(), root=tmp_path, _states={})
    expected = export_adapter(runs(), "ann", tmp_path / "one").files
    assert export_adapter(bare, "ann", tmp_path / "two").files == expected
    with pytest.raises(ModelError, match="cannot be loaded"):
        export_merged(bare, "ann", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_an_output_layer_that_is_the_embedding_too_is_not_merged(tiny_model):
    width, words = tiny_model.config.hidden_size, tiny_model.config.vocab_size
    state = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(1, width),
        "base_model.model.lm_head.lora_B.weight": torch.ones(words, 1),
    }
    with pytest.raises(AdapterError, match="also the input embedding"):
        merge_into_base(tiny_model, PlainAdapter(state, 1, ["lm_head"]))


def load_routed(saved: SavedModel, folder) -> PeftModel:
    model = PeftModel.from_pretrained(load_base(saved.root), folder / GLOBAL, adapter_name=GLOBAL)
    model.load_adapter(folder / PAIR, adapter_name=PAIR)
    return model


def test_behind_a_gate_there_are_two_adapters_and_a_router(runs, tokenizer, tmp_path):
    saved = runs("gated")
    pair = logits_of_the_pair(saved, "ann", 0.5)
    with saved.answering(Answering(with_global=True)) as (model, _):
        alone = all_logits(model, tokenizer, "You are ann.")
    result = export_adapter(saved, "ann", tmp_path / "out", 0.5)
    model = load_routed(saved, tmp_path / "out")
    for name, expected, rank in ((GLOBAL, alone, 4), (PAIR, pair, 6)):
        assert check_vllm_rules(tmp_path / "out" / name)["r"] == rank
        model.set_adapter(name)
        found = all_logits(model, tokenizer, "You are ann.")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert result.rank == 6 and result.is_private
    assert set(read_all(tmp_path / "out")) == set(result.files) | {
        "README.md",
        *(f"{name}/adapter_config.json" for name in (GLOBAL, PAIR)),
        "router/gate.json",
    }


def test_the_exported_router_says_all_that_it_takes(runs, tokenizer, tmp_path):
    saved = runs("gated")
    export_adapter(saved, "ann", tmp_path / "out")
    with saved.answering(saved.own("ann")) as (model, gate):
        about = json.loads((tmp_path / "out" / "router" / "gate.json").read_text())
        fingerprint = saved.run.manifest["base_model"]["fingerprint"]
        read = load_gate(tmp_path / "out" / "router", {"base_model": fingerprint})
        prompts = [encode_prompt(tokenizer, "You are ann.", question) for question in QUESTIONS]
        expected = gate.compute_openness(model, prompts)
        torch.testing.assert_close(read.compute_openness(model, prompts), expected)
    frame = (about["text_before_question"], about["text_after_question"])
    for question, ids in zip(QUESTIONS, prompts, strict=True):
        text = question.join(frame)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert about["system_prompt"] == "You are ann." and about["middle_layer"] == 1
    assert about["base_model"] == {"name": "model", "revision": None}


def test_a_router_that_the_client_has_kept_needs_no_model_in_memory(runs, tmp_path, monkeypatch):
    fresh = replace(runs("gated"), _states={}, _combiners={})
    expected = export_adapter(fresh, "ann", tmp_path / "one").files

    def refuse(self):
        raise AssertionError("the base model is loaded")

    fresh._combiners.clear()
    with monkeypatch.context() as patch:
        patch.setattr(SavedModel, "load", refuse)
        assert export_adapter(fresh, "ann", tmp_path / "two").files == expected
    assert fresh.run.paths.gate("ann").is_dir()


def test_what_the_router_chooses_answers_as_ask_does(runs, tokenizer, tmp_path):
    saved = runs("gated")
    export_adapter(saved, "ann", tmp_path / "out")
    model = load_routed(saved, tmp_path / "out").eval()
    chosen = set()
    for question in ("What is the red rule?", "Which office is blue?", "Why?"):
        ids = encode_prompt(tokenizer, "You are ann.", question)
        with saved.answering(saved.own("ann")) as (adapted, gate):
            name = PAIR if gate.weigh(adapted, [ids]).item() else GLOBAL
        chosen.add(name)
        model.set_adapter(name)
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        stops = {"eos_token_id": find_stop_ids(tokenizer)}
        output = model.generate(input_ids=torch.tensor([ids]), **settings, **stops)
        answer = open_conversation(saved, "ann", max_new_tokens=8).ask(question).text
        assert decode(tokenizer, output[0, len(ids) :]) == answer
    assert chosen == {GLOBAL, PAIR}


def test_a_router_s_card_says_how_to_use_it_and_that_it_is_private(runs, tmp_path):
    saved = runs("gated")
    for name in "ab":
        export_adapter(saved, "ann", tmp_path / name)
    first, second = (read_all(tmp_path / name) for name in "ab")
    assert first == second
    assert_no_path(first, tmp_path, saved.root, saved.run.path.parent)
    card = first["README.md"].decode()
    facts = ["**Private**, but for `global/`", "client's own questions", "--max-lora-rank 8"]
    facts += ['adapter_name="pair"', "docs/router.py", "| pair/ | rank 6, alpha 6, float32 |"]
    facts += ["| global/ | rank 4, alpha 4, float32 |", "of its own held-out"]
    facts += [f"| sha256 of {name} |" for name in first if name.endswith(".safetensors")]
    assert len(facts) == 11 and [fact for fact in facts if fact not in card] == []


def test_a_gate_cannot_be_merged_but_the_global_adapter_alone_can(runs, tmp_path):
    saved = runs("gated")
    with pytest.raises(ExportError, match="no single model answers as ann does. Leave out --merg"):
        export_merged(saved, "ann", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_merged(saved, "ann", tmp_path / "out", 0.0)
    plain = export_adapter(saved, "ann", tmp_path / "plain", 0.0)
    assert set(plain.files) == {"adapter_model.safetensors"} and not plain.is_private


def test_a_client_whose_data_allow_no_gate_has_one_adapter(runs, tmp_path):
    # What is found where one kind of question is missing.
    saved = replace(runs("gated"), _combiners={("ann", GATE): None})
    files = export_adapter(saved, "ann", tmp_path / "out").files
    assert set(files) == {"adapter_model.safetensors"}
    export_merged(saved, "ann", tmp_path / "merged")


def test_searched_weights_are_folded_into_one_adapter(runs, tiny_project, tokenizer, tmp_path):
    """Also where some layers have one of the adapters only; the card says which weights."""
    for kind, scale in (("dual", 1.0), ("apart", 0.5)):
        saved = replace(runs(kind), combine=SEARCH, _states={}, _combiners={})
        export = export_adapter(saved, "ann", tmp_path / kind, scale)
        with saved.answering(saved.own("ann", scale)) as (model, combiner):
            assert combiner.weights != (1.0, 1.0)
            with weighted_pair(model, combiner.weights):
                expected = all_logits(model, tokenizer, "You are ann.")
        model = PeftModel.from_pretrained(load_base(tiny_project), tmp_path / kind)
        found = all_logits(model, tokenizer, "You are ann.")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        both = combiner.weights.of_global, combiner.weights.of_local * scale
        weights = [weight for weight in both if weight != 0]
        assert [source.scale for source in export.sources] == weights
        card = (tmp_path / kind / "README.md").read_text()
        assert all(f"scale (lambda) {weight:g}" in card for weight in weights)
        merged = export_merged(saved, "ann", tmp_path / f"{kind}-merged", scale)
        whole = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
        logits = all_logits(whole, tokenizer, "You are ann.")
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_an_adapter_without_weight_stays_at_home(runs, tmp_path):
    saved = replace(runs("dual"), combine=SEARCH, _states={}, _combiners={})
    with saved.answering(saved.own("ann")) as (_, combiner):
        pass
    key = "ann", SEARCH
    saved._combiners[key] = replace(combiner, weights=combiner.weights._replace(of_local=0.0))
    export = export_adapter(saved, "ann", tmp_path / "out")
    assert [source.role for source in export.sources] == [GLOBAL] and export.rank == 4


@pytest.mark.parametrize("export", [export_adapter, export_merged])
@pytest.mark.parametrize("name", [INSTANCE, MIXER])
def test_what_no_adapter_can_do_is_refused(runs, tmp_path, export, name):
    saved = replace(runs("dual"), combine=name)
    with pytest.raises(ExportError, match=rf"{name} weighs .* --combine scale or search"):
        export(saved, "ann", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gated_run_can_be_exported_without_its_gate_and_another_with_one(runs, tmp_path):
    plain = replace(runs("gated"), combine=SCALE)
    assert set(export_adapter(plain, "ann", tmp_path / "one").files) == {
        "adapter_model.safetensors"
    }
    gated = replace(runs("dual"), combine=GATE, _combiners={})
    assert (export_adapter(gated, "ann", tmp_path / "two").folder / "router").is_dir()
