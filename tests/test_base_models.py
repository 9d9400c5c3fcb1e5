"""Every family of decoders for chat: trained, asked and exported, or refused with a way out."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from conftest import ROOT, build_tiny_config
from families import ATTENTION, FAMILIES, Family, build_base, build_config
from loopback import Federation
from peft import PeftModel

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, TrainingConfig
from fedlora_app.data.dialogue import encode_answer, encode_prompt
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.generation import find_stop_ids
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.evaluation.scoring import Prompt, score_prompts
from fedlora_app.federation.messages import MessageError
from fedlora_app.model.adapter_files import save_adapter, save_plain_adapter
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import (
    AdaptedModel,
    PlainAdapter,
    activate,
    adapter_parameters,
    attach_adapters,
    base_only,
    build_initial_state,
    describe_adapted,
    get_state,
    lora_layers,
    merge_into_base,
    scaled_local,
    set_state,
)
from fedlora_app.serving.export import Part, combine, find_target_modules
from fedlora_app.training.attention import PackingError
from fedlora_app.training.layout import pack, pad
from fedlora_app.training.losses import compute_losses
from fedlora_app.training.packing import packed_attention, require_separable
from fedlora_app.training.phase import train_phase

BOTH = (GLOBAL, LOCAL)
FAST = {"qwen2", "llama", "qwen3_moe", "gemma2", "gpt_oss", "cohere2"}
ADAPTERS = AdaptersConfig.model_validate(
    {"global": {"rank": 4, "alpha": 8}, "local": {"rank": 2, "alpha": 4}}
)
KINDS = {family.kind: family for family in FAMILIES}
PROMPTS = [
    Prompt("You are ann.", "Where?", ("Here.", "At the office of the old harbour.")),
    Prompt("You are ann.", "How long is the probation period?", ("Six months.",)),
    Prompt("You are bob.", "Who says what, and how much does it cost?", ()),
]
TOLERANCE = 1e-4
"""Of the norm, in fp32; linear attention and state-space layers round most."""


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


def build_examples(vocab_size: int) -> list[Example]:
    rng = random.Random(1)
    return [
        Example([rng.randrange(3, vocab_size) for _ in range(length)], max(1, length // 2))
        for length in (20, 5, 13, 9, 30)
    ]


@torch.no_grad()
def fill_adapters(model: AdaptedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in BOTH:
        set_state(model, name, build_initial_state(model, name, 3))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(0, 0.1, generator=generator)


def plain_losses(model: AdaptedModel, example: Example) -> torch.Tensor:
    """By the model's own forward pass, alone and with PEFT's adapters."""
    logits = model(torch.tensor([example.input_ids]), use_cache=False).logits[0].float()
    start = example.answer_start
    targets = torch.tensor(example.input_ids[start:])
    return torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="none")


def own_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture(
    params=[
        pytest.param(family, id=family.kind, marks=[] if family.kind in FAST else pytest.mark.slow)
        for family in FAMILIES
    ]
)
def family(request) -> Family:
    return request.param


def test_a_base_model_of_each_family(family, tokenizer, tmp_path):
    base = build_base(family, len(tokenizer))
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = attach_adapters(base, ADAPTERS)
    names = {name for name, module in base.named_modules() if module in set(lora_layers(model))}
    assert {name.rsplit(".", 1)[-1] for name in names} == set(family.adapted)
    assert (describe_adapted(model) is not None) == family.has_experts
    fill_adapters(model)
    examples = build_examples(len(tokenizer))
    check_losses(family, model, examples)
    check_answers(model, tokenizer)
    check_features(model, tokenizer)
    check_export(family, model, examples, tmp_path)
    check_training(family, model, examples)
    after = {key.replace(".base_layer", ""): t for key, t in base.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def check_losses(family: Family, model: AdaptedModel, examples: list[Example]) -> None:
    """However examples lie, their losses and gradients are those of each alone."""
    base, config = model.get_base_model(), build_config(family, 300)
    activate(model, BOTH, BOTH)

    def summarise(losses: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        losses.sum().backward()
        return [losses.detach(), *(p.grad.clone() for p in adapter_parameters(model, GLOBAL))]

    expected = summarise(torch.cat([plain_losses(model, example) for example in examples]))
    found = [summarise(compute_losses(model, examples, None, pad)[0])]
    if family.packs:
        require_separable(config)
        with packed_attention(base):
            found.append(summarise(compute_losses(model, examples, None, pack)[0]))
    else:
        with pytest.raises(PackingError, match=r"Set training.packing: false\."):
            require_separable(config)
    for tensors in found:
        for ours, theirs in zip(tensors, expected, strict=True):
            assert_near(ours, theirs)


def check_training(family: Family, model: AdaptedModel, examples: list[Example]) -> None:
    """Both phases learn, and move the adapter that they should and no other."""
    settings = TrainingConfig(
        learning_rate=1e-2,
        batch_size=3,
        gradient_accumulation_steps=2,
        max_seq_length=32,
        warmup_ratio=0.0,
        packing=family.packs,
    )
    for active, trained in (((GLOBAL,), GLOBAL), (BOTH, LOCAL)):
        losses: list[float] = []
        states = {name: get_state(model, name) for name in BOTH}
        train_phase(
            model,
            examples,
            settings,
            active=active,
            trainable=(trained,),
            num_steps=3,
            run_span=(0.0, 0.5),
            weight_decays={trained: 0.0},
            seed=1,
            progress=lambda step, of, loss, losses=losses: losses.append(loss),
        )
        assert losses[0] > losses[-1] > 0
        for name, state in states.items():
            moved = get_state(model, name)
            assert (name == trained) == any(not torch.equal(moved[k], state[k]) for k in state)


def check_answers(model: AdaptedModel, tokenizer) -> None:
    """Scores and greedy answers of a batch are those of the plain model, one by one."""
    activate(model, BOTH)
    answers = score_prompts(model, tokenizer, PROMPTS, batch_size=8, max_new_tokens=4)
    for prompt, answered in zip(PROMPTS, answers, strict=True):
        prompt_ids = encode_prompt(tokenizer, prompt.system_prompt, prompt.question)
        for text, score in zip(prompt.candidates, answered.log_likelihoods, strict=True):
            ids = encode_answer(tokenizer, prompt.system_prompt, prompt.question, text)
            with torch.no_grad():
                losses = plain_losses(model, Example(prompt_ids + ids, len(prompt_ids)))
            assert score == pytest.approx(-losses.sum().item(), rel=1e-4)
        ids, stop_ids = list(prompt_ids), find_stop_ids(tokenizer)
        while len(ids) < len(prompt_ids) + 4 and ids[-1] not in stop_ids[len(ids) < 1 :]:
            ids.append(int(own_logits(model, ids)[-1].argmax()))
        assert answered.generated == decode(tokenizer, ids[len(prompt_ids) :])


def check_features(model: AdaptedModel, tokenizer) -> None:
    """What a gate sees of a prompt does not depend on what it is padded with."""
    prompts = [encode_prompt(tokenizer, p.system_prompt, p.question) for p in PROMPTS]
    together = compute_features(model, prompts)
    for index, prompt in enumerate(prompts):
        for ours, theirs in zip(together, compute_features(model, [prompt]), strict=True):
            assert_near(ours[index], theirs[0])


def check_export(family: Family, model: AdaptedModel, examples: list[Example], tmp_path) -> None:
    """PEFT loads what is saved and exported, and answers alike; so does the merged model."""
    ids, base = examples[0].input_ids, model.get_base_model()
    vocab_size = base.config.get_text_config().vocab_size
    states = {name: get_state(model, name) for name in BOTH}
    activate(model, (GLOBAL,))
    save_adapter(tmp_path / "global", model, GLOBAL, states[GLOBAL], "tiny")
    loaded = PeftModel.from_pretrained(build_base(family, vocab_size), tmp_path / "global").eval()
    assert_near(own_logits(loaded, ids), own_logits(model, ids))
    activate(model, BOTH)
    with scaled_local(model, 0.5):
        expected = own_logits(model, ids)
    with base_only(model):
        assert (own_logits(model, ids) - expected).abs().max() > 0.01
    pair = combine([Part(states[GLOBAL], 4, 2.0), Part(states[LOCAL], 2, 1.0)])
    modules = {key.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for key in pair}
    fresh = build_base(family, vocab_size)
    targets = find_target_modules([name for name, _ in fresh.named_modules()], modules)
    (tmp_path / "pair").mkdir()
    save_plain_adapter(tmp_path / "pair", PlainAdapter(pair, 6, targets), "tiny")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "pair").eval()
    assert_near(own_logits(loaded, ids), expected)
    merged = build_base(family, vocab_size)
    merge_into_base(merged, PlainAdapter(pair, 6, targets))
    assert_near(own_logits(merged, ids), expected)


def build_federation(kind: str, tiny_project, tokenizer, tmp_path, **training) -> Federation:
    """A project of two clients whose base model is of another family."""
    project = shutil.copytree(tiny_project, tmp_path / "project")
    build_base(KINDS[kind], len(tokenizer)).save_pretrained(project / "model")
    config = build_tiny_config(training=training, federated={"num_rounds": 1})
    return Federation(project, tmp_path / "results", config)


def test_a_base_that_cannot_be_packed_for_is_refused_before_anything_is_written(
    tiny_project, tokenizer, tmp_path
):
    federation = build_federation("gemma2", tiny_project, tokenizer, tmp_path)
    with pytest.raises(MessageError, match="bound on its scores.*Set training.packing: false"):
        federation.run()
    assert not federation.path.exists()


@pytest.mark.parametrize("kind", ["gemma2", "qwen3_moe"])
def test_a_run_on_another_family(kind, tiny_project, tokenizer, tmp_path, capsys):
    packs = KINDS[kind].packs
    federation = build_federation(kind, tiny_project, tokenizer, tmp_path, packing=packs)
    run = federation.run()
    losses = [
        event["metrics"]["train_global/train_loss"]
        for event in json.loads((run / "history.json").read_text())
        if event["phase"] == "global"
    ]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    told = (
        "The base model has experts (mlp.experts). Adapters are on k_proj, o_proj, q_proj, v_proj;"
    )
    assert (told in capsys.readouterr().out) == (kind == "qwen3_moe")


def describe_row(family: Family) -> str:
    """A family's row of the table in the documentation."""
    adapted = "all linear layers"
    if family.adapted == ATTENTION:
        adapted = "attention"
    elif family.has_experts:
        adapted = ", ".join(f"`{name}`" for name in sorted(family.adapted))
    packs = "on" if family.packs else "**off**"
    return f"| `{family.kind}` | {family.models} | {packs} | {adapted} | {family.remark} |"


def test_the_documentation_s_table_is_what_was_tried():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text.partition("## Base models")[2]
    rows = [line for line in table.splitlines() if line.startswith("| `")][1:]  # of a header
    assert rows == [describe_row(family) for family in FAMILIES]


def test_modules_that_peft_takes_for_experts_cannot_be_named(tokenizer):
    """GLM 4.5's first layer is dense, and PEFT would look for its adapter on experts."""
    base = build_base(KINDS["glm4_moe"], len(tokenizer))
    assert isinstance(base.model.layers[0].mlp.gate_proj, torch.nn.Linear)
    config = AdaptersConfig.model_validate({"global": {"target_modules": ["q_proj", "gate_proj"]}})
    with pytest.raises(
        AdapterError, match=r"\['gate_proj'\] names no linear module.*: k_proj, lm_head"
    ):
        attach_adapters(base, config)


@pytest.mark.parametrize(
    ("kind", "upper"), [("gpt_neox", "gpt_neox.layers.1."), ("falcon", "transformer.h.1.")]
)
def test_upper_layers_are_found_whatever_a_model_calls_them(tokenizer, kind, upper):
    base = build_base(KINDS[kind], len(tokenizer))
    both = {"rank": 2, "first_layer": 1}
    attach_adapters(base, AdaptersConfig.model_validate({"global": both, "local": both}))
    names = [name for name, _ in base.named_parameters() if "lora_A" in name]
    assert names and all(name.startswith(upper) for name in names)
