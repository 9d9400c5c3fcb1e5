"""Plans: the memory model against counted tensors, the verdict, the text and its errors.

The peak of ``train_phase`` on small models (hidden 64 to 256, 2 to 6 layers, 512 to 800 tokens,
fp32 and bf16) was predicted with errors from -1 % to +10 %; that of a step of Qwen2.5-7B's shape,
on tensors that have a size and no memory, +7 % with checkpointing and -1 % without. What 4-bit
weights add while they are multiplied, CUDA's context and the allocator's reserve are not measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ALIKE, DEMO_MODEL, ROOT, build_tiny_config, build_tiny_model
from families import QWEN_7B
from live_memory import LiveMemory
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, T5Config

from fedlora_app.config.loading import join_overrides, load_config
from fedlora_app.config.rounds import BOTH, Phase
from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import activate, adapter_parameters, attach_adapters
from fedlora_app.model.base import ModelError, build_empty_model
from fedlora_app.model.fused import fused_adapters
from fedlora_app.planning import host
from fedlora_app.planning.advice import apply_change, find_changes
from fedlora_app.planning.gpus import (
    CARDS,
    EFFICIENCY,
    Passes,
    Work,
    compute_flops,
    compute_seconds,
    parse_memory,
)
from fedlora_app.planning.plan import build_plan
from fedlora_app.planning.sizes import measure_sizes
from fedlora_app.planning.text import describe_plan, format_size
from fedlora_app.training import packing
from fedlora_app.training.activations import MicroBatch, Numerics, PlanError, read_shape
from fedlora_app.training.attention import ATTENTION
from fedlora_app.training.layout import compute_hidden_states, pack
from fedlora_app.training.losses import token_losses
from fedlora_app.training.phase import train_phase
from fedlora_app.training.phase_memory import adapter_sizes, predict_phase, predict_step_bytes
from fedlora_app.training.record_privacy import RecordPrivacy, record_settings

GLOBAL_PHASE = Phase((GLOBAL,), (GLOBAL,), "universal")
LOCAL_PHASE = Phase(BOTH, (LOCAL,), "local")
JOINT_PHASE = Phase(BOTH, BOTH, "mixed")


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> Path:
    """A folder with the configuration of Qwen2.5-7B, a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("seven_b")
    Qwen2Config(**QWEN_7B, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seven_b_sizes():
    with torch.device("meta"):
        return measure_sizes(Qwen2ForCausalLM(Qwen2Config(**QWEN_7B)), AdaptersConfig())


def plan_for(folder: Path, name: str, memory: str = "", overrides: str = ""):
    """Plan a configuration of conf/ without its data, so for records of full length."""
    config = load_config(ROOT / "conf" / name, f"model.name={folder} {overrides}")
    return build_plan(config, folder, memory)


def item_bytes(phase, name: str) -> int:
    return next(item.num_bytes for item in phase.items if item.name == name)


def step_bytes(phase) -> int:
    """What comes and goes with a phase."""
    return phase.torch_bytes - phase.resident_bytes


# Counts


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_are_those_of_the_real_model(tokenizer, is_tied):
    changes = {"tie_word_embeddings": is_tied}
    with torch.device("meta"):
        empty = build_tiny_model(len(tokenizer), **changes)
    config = AdaptersConfig.model_validate(
        {"global": {"rank": 4}, "local": {"rank": 2, "target_modules": ["q_proj", "down_proj"]}}
    )
    sizes = measure_sizes(empty, config)
    real = build_tiny_model(len(tokenizer), **changes)
    assert sizes.total == real.num_parameters() and sizes.is_tied is is_tied
    assert sizes.linear == sum(
        module.weight.numel()
        for name, module in real.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    model = attach_adapters(real, config)
    for name, count in adapter_sizes(sizes, config).items():
        assert count == sum(p.numel() for p in adapter_parameters(model, name))


def test_the_7b_shape_has_the_known_sizes(seven_b_sizes):
    phases = [
        predict_phase(
            *(read_shape(Qwen2Config(**QWEN_7B)), seven_b_sizes, AdaptersConfig()),
            *(TrainingConfig(), Numerics(is_4bit=True, dtype_bytes=2), phase),
            *(MicroBatch(1024, 512), True),
        )
        for phase in (JOINT_PHASE, LOCAL_PHASE)
    ]
    joint = phases[0]
    assert adapter_sizes(seven_b_sizes, AdaptersConfig()) == {GLOBAL: 40370176, LOCAL: 40370176}
    assert item_bytes(joint, "base, linear layers") == pytest.approx(3.37e9, rel=0.01)
    ends = item_bytes(joint, "input embedding") + item_bytes(joint, "output head")
    assert ends == pytest.approx(2.18e9, rel=0.01)
    learnt = sum(item_bytes(joint, n) for n in ("adapters", "gradients", "optimizer state"))
    assert learnt == pytest.approx(1.29e9, rel=0.01)
    assert joint.total_bytes == pytest.approx(8.5e9, rel=0.03)
    assert phases[1].torch_bytes < joint.torch_bytes  # one adapter learns at a time
    model_config, adapters = Qwen2Config(**QWEN_7B), AdaptersConfig()
    needed = predict_step_bytes(
        *(model_config, adapters, TrainingConfig(), Numerics(is_4bit=False, dtype_bytes=2)),
        *(JOINT_PHASE, MicroBatch(1024, 1), {}),
    )
    assert needed / 1024 == pytest.approx(6.1e6, rel=0.15)  # all layers' activations, per token
    assert item_bytes(joint, "activations") / 1024 == pytest.approx(0.2e6, rel=0.01)


# The memory model against what a step holds


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example([token % 64 for token in range(n)], max(1, n // 2)) for n in lengths]


SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
DEEP = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}


STEPS = [
    (SMALL, [128] * 8, False, GLOBAL_PHASE, torch.bfloat16, (0, 0)),
    (SMALL, [128] * 8, True, LOCAL_PHASE, torch.float32, (0, 0)),
    (WIDE, [256, 120] * 4, False, LOCAL_PHASE, torch.float32, (0, 0)),
    (WIDE, [256, 120] * 4, True, GLOBAL_PHASE, torch.bfloat16, (0, 0)),
    (DEEP, [200, 60, 33] * 3, False, JOINT_PHASE, torch.bfloat16, (0, 0)),
    (DEEP, [200, 60, 33] * 3, True, GLOBAL_PHASE, torch.float32, (0, 0)),
    (DEEP, [200, 60, 33] * 3, False, LOCAL_PHASE, torch.float32, (0, 3)),
    (DEEP, [200, 60, 33] * 3, False, JOINT_PHASE, torch.bfloat16, (4, 1)),
    (DEEP, [200, 60, 33] * 3, True, LOCAL_PHASE, torch.float32, (5, 3)),
]
HIDDEN = RecordPrivacy(clip_norm=1.0, noise_multiplier=1.0, key=bytes(32))


@pytest.mark.parametrize(
    ("shape", "lengths", "checkpointing", "phase", "dtype", "first_layers", "privacy"),
    [(*step, None) for step in STEPS] + [(*s, HIDDEN) for s in STEPS if s[3] is GLOBAL_PHASE],
)
def test_the_peak_of_a_real_step(
    shape, lengths, checkpointing, phase, dtype, first_layers, privacy
):
    model = build_tiny_model(64, **shape, max_position_embeddings=1024).to(dtype)
    adapters = AdaptersConfig.model_validate(
        {n: {"rank": 8, "first_layer": k} for n, k in zip(BOTH, first_layers, strict=True)}
    )
    sizes = measure_sizes(model, adapters)
    adapted = attach_adapters(model, adapters)
    for name in BOTH:
        for parameter in adapter_parameters(adapted, name):
            parameter.data = parameter.data.float()
    training = TrainingConfig(
        batch_size=len(lengths) // 2,
        gradient_accumulation_steps=2,
        max_seq_length=max(lengths),
        gradient_checkpointing=checkpointing,
    )
    examples = examples_of(lengths)
    with LiveMemory() as memory:
        train_phase(
            adapted,
            examples,
            training,
            active=phase.active,
            trainable=phase.trainable,
            num_steps=1,
            run_span=(0.0, 1.0),
            weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
            seed=1,
            privacy=privacy,
        )
    settings = training if privacy is None else record_settings(training)
    room = min(training.batch_size * training.max_seq_length, sum(lengths))
    batch = MicroBatch(room, room // 2)
    predicted = predict_phase(
        *(read_shape(model.config), sizes, adapters, settings),
        *(Numerics(is_4bit=False, dtype_bytes=dtype.itemsize), phase, batch, checkpointing),
        hides_records=privacy is not None,
    )
    close = 0.16 if dtype is torch.float32 else 0.12  # without its fp32 copies it is 0.13 and more
    assert step_bytes(predicted) == pytest.approx(memory.peak, rel=close if privacy else 0.15)


def test_holding_the_adapter_near_the_received_one_takes_a_copy_of_it():
    adapted = attach_adapters(build_tiny_model(64, **SMALL), AdaptersConfig())
    peaks = []
    for mu in (0.0, 0.1):
        with LiveMemory() as memory:
            train_phase(
                adapted,
                examples_of([64] * 4),
                TrainingConfig(proximal_mu=mu, batch_size=4, gradient_accumulation_steps=1),
                active=(GLOBAL,),
                trainable=(GLOBAL,),
                num_steps=2,
                run_span=(0.0, 1.0),
                weight_decays={GLOBAL: 0.0},
                seed=1,
            )
        peaks.append(memory.peak)
    copy = 4 * sum(parameter.numel() for parameter in adapter_parameters(adapted, GLOBAL))
    assert peaks[1] - peaks[0] == pytest.approx(copy, rel=0.05)


@pytest.fixture
def fake_7b() -> Iterator[tuple[Qwen2ForCausalLM, object, FakeTensorMode]]:
    """The 7B shape with both adapters, in tensors that have a size and no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        base = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B, dtype="bfloat16"))
    adapted = attach_adapters(base, AdaptersConfig())
    with mode:
        for module in adapted.modules():
            for key, value in list(module._parameters.items()):
                if value is not None:
                    is_lora = module in adapter_modules(adapted)
                    dtype = torch.float32 if is_lora else torch.bfloat16
                    module._parameters[key] = torch.nn.Parameter(
                        torch.zeros(value.shape, dtype=dtype), requires_grad=False
                    )
            for key, value in list(module._buffers.items()):
                module._buffers[key] = torch.zeros(value.shape, dtype=value.dtype)
    packing._trusted[base] = {ATTENTION}
    yield base, adapted, mode


def adapter_modules(adapted) -> set[torch.nn.Module]:
    return {module for name, module in adapted.named_modules() if ".lora_" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "checkpointing"), [([1024] * 4, True), ([700, 500, 300, 100], False)]
)
def test_the_peak_of_a_step_of_7b(fake_7b, seven_b_sizes, lengths, checkpointing):
    base, adapted, mode = fake_7b
    examples = examples_of(lengths)
    batch = pack(examples, torch.device("cpu"))
    activate(adapted, BOTH, (LOCAL,))
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    runs = (mode, packing.packed_attention(base), fused_adapters(adapted, BOTH))
    with runs[0], runs[1], runs[2], LiveMemory() as memory:
        hidden = compute_hidden_states(base, batch).index_select(0, batch.predicting)
        token_losses(base.lm_head, hidden, batch.targets).sum().backward()
    answers = sum(example.num_answer_tokens for example in examples)
    predicted = predict_phase(
        *(read_shape(base.config), seven_b_sizes, AdaptersConfig(), TrainingConfig()),
        *(Numerics(is_4bit=False, dtype_bytes=2), LOCAL_PHASE),
        *(MicroBatch(sum(lengths), answers), checkpointing),
    )
    expected = step_bytes(predicted) - item_bytes(predicted, "optimizer state")
    assert expected == pytest.approx(memory.peak, rel=0.10)


# Time


def test_the_time_is_the_roofline_at_the_assumed_efficiency(seven_b_sizes):
    shape = read_shape(Qwen2Config(**QWEN_7B))
    numerics = Numerics(is_4bit=True, dtype_bytes=2)
    work = Work(tokens=10**6, answer_tokens=10**6, attention_pairs=0, micro_batches=0)
    card = next(card for card in CARDS if card.name == "RTX 4090")
    for checkpointing, expected in ((False, 5600), (True, 3850)):
        passes = Passes(checkpointing)
        flops = compute_flops(shape, seven_b_sizes, work, 0, 40370176, passes)
        seconds = compute_seconds(card, flops, seven_b_sizes, numerics, 0, passes)
        assert 10**6 / seconds == pytest.approx(EFFICIENCY * expected, rel=0.08)
    longer = compute_seconds(card, flops, seven_b_sizes, numerics, 100, passes)
    assert longer > seconds  # weights are read for every micro-batch


@pytest.fixture(scope="module")
def deep(tiny_project, tmp_path_factory) -> Path:
    """A folder with the configuration of the tiny model, of 40 layers, and its tokenizer."""
    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(tiny_project / "model", folder, dirs_exist_ok=True)
    read = json.loads((folder / "config.json").read_text())
    read |= {"num_hidden_layers": 40, "layer_types": ["full_attention"] * 40}
    (folder / "config.json").write_text(json.dumps(read))
    return folder


def test_the_time_of_upper_layers_only_is_theirs(tiny_project, deep):
    def seconds(**changes) -> float:
        first = changes.pop("first_layer", 0)
        adapters = {name: {"rank": 1, "first_layer": first} for name in ("global", "local")}
        config = build_tiny_config(
            model={"name": str(deep)}, adapters=adapters, training=changes | {"replay": 0.0}
        )
        return build_plan(config, tiny_project, "24GB").cards[0].round_seconds

    assert seconds(first_layer=20) / seconds() == pytest.approx(0.75, abs=0.05)  # one pass
    again = {"global_epochs": 50, "local_epochs": 50}
    assert seconds(first_layer=20, **again) / seconds(**again) == pytest.approx(0.5, abs=0.05)


def test_hiding_records_is_planned_with_its_second_backward_pass(tiny_project, deep):
    settings = {"unit": "record", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    plans = [
        build_plan(
            build_tiny_config(model={"name": str(deep)}, federated={"mode": "fedavg"}, **private),
            tiny_project,
            "24GB",
        )
        for private in ({}, {"privacy": settings})
    ]
    plain, private = (plan.cards[0].round_seconds for plan in plans)
    assert private / plain == pytest.approx(1.5, abs=0.05)  # of two passes over the weights, three
    assert [plan.phases[0].torch_bytes for plan in plans] == sorted(
        plan.phases[0].torch_bytes for plan in plans
    )


def test_states_of_lower_layers_are_planned_in_host_memory(tiny_project, deep):
    adapters = {"local": {"rank": 2, "first_layer": 1}}
    for epochs, is_kept in ((1, False), (2, True)):
        config = build_tiny_config(
            model={"name": str(deep)},
            adapters=adapters,
            training={"local_epochs": epochs, "global_epochs": 2},
        )
        plan = build_plan(config, tiny_project, "24GB")
        states = {
            phase.phase: [i.num_bytes for i in phase.host if "lower layers" in i.name]
            for phase in plan.phases
        }
        tokens = max(work.tokens_per_epoch for work in plan.work if work.phase == "local")
        assert states == {"global": [], "local": [tokens * 32 * 4] if is_kept else []}


# Plans


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24e9), ("24 GB", 24e9), ("7.0GiB", 7 * 2**30), ("8g", 8e9), ("512MiB", 2**29)],
)
def test_memory_sizes(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["24", "much", "0GB", "-3GB", "GB", "1e3GB", "24GBs"])
def test_no_memory_sizes(text):
    with pytest.raises(PlanError, match="is not a size. Expected"):
        parse_memory(text)


def test_data_are_counted_as_they_are_trained_on(tiny_project):
    config = build_tiny_config(evaluation={"max_new_tokens": 20})
    plan = build_plan(config, tiny_project, "8GB")
    assert plan.verdict.fits and plan.notes == []
    assert [(w.client, w.phase) for w in plan.work] == [
        *(("ann", "global"), ("bob", "global"), ("ann", "local"), ("bob", "local"))
    ]
    ann = plan.work[0]
    assert ann.num_examples == 4 and ann.steps == 2 and ann.passes == 1
    assert 0 < ann.packing_fill <= 1 and ann.work.tokens == ann.tokens_per_epoch
    assert ann.longest < 128 and plan.phases[0].micro_batch_tokens <= 2 * ann.longest
    parameters = plan.adapter_parameters[GLOBAL]
    assert plan.traffic.up_per_client == 4 * parameters
    assert plan.traffic.up_by_dtype["bfloat16"] == 2 * parameters
    assert plan.traffic.up_by_dtype["nf4"] > parameters / 2
    assert all(card.fits and card.round_seconds > 0 for card in plan.cards)


def test_the_update_of_a_7b_model_is_planned_by_dtype(seven_b):
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "24GB", "federated.upload_dtype=nf4")
    up = plan.traffic.up_by_dtype
    assert plan.traffic.up_per_client == up["nf4"] < 22e6
    assert (up["float32"], up["bfloat16"]) == (4 * 40370176, 2 * 40370176)
    assert up["int8"] == 40370176 * (1 + 4 / 128)
    assert plan.traffic.down_per_client == up["float32"]
    said = " ".join(describe_plan(plan).split())
    assert "float32 161.5 MB, bfloat16 80.7 MB, int8 41.6 MB, nf4 21.4 MB" in said


@pytest.mark.parametrize(
    ("mode", "phases", "senders"),
    [
        ("fedavg", ["global"], 2),
        ("finetuned", ["global", "local"], 2),
        ("local-only", ["local"], 0),
        ("centralized", ["global"], 1),
    ],
)
def test_other_modes(tiny_project, mode, phases, senders):
    config = build_tiny_config(federated={"mode": mode}, adapters=ALIKE)
    plan = build_plan(config, tiny_project, "8GB")
    assert [phase.phase for phase in plan.phases] == phases
    assert plan.traffic.num_senders == senders
    assert len(plan.work) == {"finetuned": 4, "centralized": 1}.get(mode, 2)
    assert "GB" in describe_plan(plan)


def test_the_received_adapter_is_planned_where_the_new_one_is_held_near_it(tiny_project):
    changes = {"training": {"proximal_mu": 0.1}}
    plain, held = (build_plan(build_tiny_config(**c), tiny_project, "8GB") for c in ({}, changes))
    copy = item_bytes(held.phases[0], "received adapter")
    assert copy == 4 * plain.adapter_parameters[GLOBAL]
    assert [
        h.torch_bytes - p.torch_bytes for p, h in zip(plain.phases, held.phases, strict=True)
    ] == [copy, 0]
    idle = build_tiny_config(federated={"mode": "local-only"}, **changes)
    assert any("proximal_mu" in note for note in build_plan(idle, tiny_project, "8GB").notes)
    pooled = build_tiny_config(federated={"mode": "centralized"}, **changes)
    (phase,) = build_plan(pooled, tiny_project, "8GB").phases
    assert "received adapter" not in {item.name for item in phase.items}


def test_the_fine_tuning_is_planned_with_the_steps_that_it_takes(tiny_project):
    config = build_tiny_config(federated={"mode": "finetuned", "num_rounds": 3}, adapters=ALIKE)
    plan = build_plan(config, tiny_project, "8GB")
    steps = {(part.client, part.phase): part.steps for part in plan.work}
    # 4 universal and 4 local records, 2 a step, 3 rounds: 2 steps a round, then 3 times 4.
    assert (steps["bob", "global"], steps["bob", "local"]) == (2, 12)
    assert any("the fine-tuning" in note for note in plan.notes)
    assert not any("clients_at_once" in note for note in plan.notes)


@pytest.mark.parametrize("clients_at_once", [9, 0])
def test_each_client_that_is_served_at_once_has_a_base_of_its_own(tiny_project, clients_at_once):
    config = build_tiny_config(federated={"clients_at_once": clients_at_once})
    plan = build_plan(config, tiny_project, "24GB")
    count = len(config.federated.clients)
    assert f"clients_at_once: {count} base models are in memory at once" in plan.notes[-1]


def test_a_7b_model_on_cards_of_24_and_8_gb(seven_b):
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "24GB")
    assert plan.verdict.fits and not plan.verdict.checkpointing_unneeded
    assert plan.work == [] and "The training data is not here" in plan.notes[0]
    assert plan.largest_phase.micro_batch_tokens == 2048
    assert not any(phase.checkpointing for phase in plan.phases)
    small = plan_for(seven_b, "qwen2.5-7b-8gb.yaml", "7.0GiB")
    assert small.verdict.fits


@pytest.mark.slow
def test_checkpointing_that_is_not_needed_is_named(seven_b):
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "80GB", "training.gradient_checkpointing=true")
    assert plan.verdict.checkpointing_unneeded
    assert "training.gradient_checkpointing=false" in describe_plan(plan)
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "80GB")
    assert not any(phase.checkpointing for phase in plan.phases)
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "12GB")
    assert all(phase.checkpointing for phase in plan.phases) and plan.verdict.fits


LARGE = "training.batch_size=4 training.gradient_accumulation_steps=6"


@pytest.mark.parametrize(
    ("memory", "overrides", "settings"),
    [
        pytest.param(
            *("10GB", "training.gradient_checkpointing=false", ["training.gradient_checkpointing"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("9GB", LARGE, ["training.batch_size", "training.gradient_accumulation_steps"]),
            marks=pytest.mark.slow,
        ),
        ("12GB", "model.quantization=none", ["model.quantization"]),
        pytest.param(
            *(
                "7.4GB",
                LARGE,
                ["training.batch_size", "training.optimizer", "model.embedding_device"],
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_changes_that_are_named_make_it_fit(seven_b, memory, overrides, settings):
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", memory, overrides)
    verdict = plan.verdict
    assert not verdict.fits and verdict.changed_peak_bytes <= verdict.limit_bytes
    assert set(settings) <= set(verdict.changes)
    words = " ".join(f"{key}={str(value).lower()}" for key, value in verdict.changes.items())
    assert words in " ".join(describe_plan(plan).split())
    again = plan_for(seven_b, "qwen2.5-7b-4090.yaml", memory, join_overrides(overrides, words))
    assert again.verdict.fits
    training = apply_change(
        load_config(ROOT / "conf" / "qwen2.5-7b-4090.yaml"), verdict.changes
    ).training
    assert training.batch_size * training.gradient_accumulation_steps == 24


def test_nothing_helps(seven_b):
    plan = plan_for(seven_b, "qwen2.5-7b-4090.yaml", "3GB")
    assert plan.verdict.changes is None and "No setting makes it fit" in describe_plan(plan)


def test_a_smaller_limit_never_predicts_more(seven_b_sizes):
    shape, training = read_shape(Qwen2Config(**QWEN_7B)), TrainingConfig()
    numerics = Numerics(is_4bit=True, dtype_bytes=2)
    totals = [
        predict_phase(
            *(shape, seven_b_sizes, AdaptersConfig(), training, numerics, LOCAL_PHASE),
            *(MicroBatch(tokens, tokens // 2), True),
        ).total_bytes
        for tokens in (64, 512, 1024, 4096)
    ]
    assert totals == sorted(totals)


@pytest.mark.parametrize(
    ("rule", "up", "down"), [("fedavg", 1, 1), ("freeze-a", 0.5, 0.5), ("stack", 1, 3)]
)
def test_what_travels_is_counted_by_factor_and_rank(rule, up, down, tiny_project):
    """Of a tiny model A and B have nearly as many parameters; two of rank 4 stack up to 8."""
    config = build_tiny_config(federated={"aggregation": rule})
    traffic = build_plan(config, tiny_project).traffic
    whole = build_plan(build_tiny_config(), tiny_project).traffic.up_per_client
    assert traffic.up_per_client == pytest.approx(up * whole, rel=0.1)
    assert traffic.down_per_client == pytest.approx(down * whole, rel=0.1)


def test_models_that_cannot_be_planned(tiny_project, tmp_path):
    with pytest.raises(PlanError, match="not a decoder"):
        read_shape(T5Config())
    for kind in ("mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe"):
        with pytest.raises(PlanError, match="mixture of experts"):
            read_shape(AutoConfig.for_model(kind))
    with pytest.raises(PlanError, match="does not say hidden_size"):
        read_shape(object())
    with pytest.raises(ModelError, match="(?s)was not found.*A plan needs no weights.*hf download"):
        build_plan(build_tiny_config(model={"name": "nobody/nothing"}), tmp_path)
    with pytest.raises(ModelError, match="embedding_device: cpu is impossible"):
        tied = build_tiny_config(model={"embedding_device": "cpu"})
        build_plan(tied, tiny_project)
    with pytest.raises(AdapterError, match="names no linear"):
        wrong = {"global": {"target_modules": ["nothing"]}}
        build_plan(build_tiny_config(adapters=wrong), tiny_project)


def test_a_model_without_a_chat_template_is_planned_without_data(tiny_project, tmp_path):
    folder = tmp_path / "model"
    build_tiny_model(64).config.save_pretrained(folder)
    plan = build_plan(build_tiny_config(model={"name": str(folder)}), tiny_project)
    assert plan.work == [] and "The tokenizer cannot be used" in plan.notes[0]


def test_the_model_is_the_configured_one(tiny_project):
    empty = build_empty_model(build_tiny_config().model, tiny_project)
    plan = build_plan(build_tiny_config(), tiny_project, "8GB")
    assert plan.base.total == empty.num_parameters()


def test_without_a_gpu_a_plan_is_for_the_cpu(tiny_project):
    """It speaks of host memory and of this CPU's time, and of no card."""
    plan = build_plan(build_tiny_config(), tiny_project)
    assert plan.on_cpu and plan.verdict.limit_bytes == host.read_host_memory()
    (cpu,) = plan.cards
    assert cpu.card.startswith("CPU, ") and cpu.tokens_per_second > 0 and cpu.round_seconds > 0
    assert plan.largest_phase.total_bytes > host.PROCESS.num_bytes
    text = " ".join(describe_plan(plan).split())
    for part in ("memory on the CPU", "On this machine's CPU", "the machine must have", "no GPU"):
        assert part in text
    assert not any(card.name in text for card in CARDS)
    assert "CUDA" not in text and "cuBLAS" not in text
    on_card = build_plan(build_tiny_config(), tiny_project, "8GB")
    assert len(on_card.cards) == len(CARDS) and not on_card.on_cpu


def test_a_cpu_is_offered_what_a_cpu_can_do(tiny_project):
    config, seen = build_tiny_config(model={"quantization": "auto"}), []
    changes, _ = find_changes(config, False, lambda c: c.model.quantization == "4bit", True)
    assert changes == {"model.quantization": "4bit"}
    find_changes(config, False, lambda c: seen.append(c), True)
    assert seen and {c.training.optimizer for c in seen} == {"adamw"}
    assert {c.model.embedding_device for c in seen} == {"auto"}


def test_evaluation_is_planned(tiny_project):
    """In a column of its own, within what is there, and with the answers that are cut off."""
    config = build_tiny_config()
    plan = build_plan(config, tiny_project, "8GB")
    assert "to 10." in next(note for note in plan.notes if "ann_local.json" in note)
    assert sum("evaluation.max_new_tokens = 3" in note for note in plan.notes) == 3
    # ann and bob: 3 and 4 local questions, and 6 universal ones.
    assert plan.count_questions() == 19 and plan.count_questions(4) == 15
    assert "evaluation" in describe_plan(plan)
    longer = build_tiny_config(evaluation={"max_new_tokens": 2000})
    large = build_plan(longer, tiny_project, "8GB").evaluation
    assert plan.evaluation.resident_bytes < plan.evaluation.torch_bytes < large.torch_bytes
    assert large.items[-1].note == "generating"
    # Where less is there, fewer tokens go through the model at once.
    answers = large.items[-1].num_bytes
    room = large.outside[0].num_bytes + large.resident_bytes + round(0.7 * answers)
    small = build_plan(longer, tiny_project, f"{room // 1000}kB").evaluation
    assert small.micro_batch_tokens < large.micro_batch_tokens
    assert small.items[-1].num_bytes < 0.7 * answers


def test_questions_that_are_not_here_are_said(tiny_project):
    config = build_tiny_config(data={"universal_test": "nothing.json"})
    plan = build_plan(config, tiny_project, "8GB")
    assert plan.evaluation is None and plan.work
    assert (
        plan.notes[0] == "The questions are not here (nothing.json), so evaluation is not planned."
    )


# The command


def test_the_command_prints_a_plan(fedlora):
    status, out, err = fedlora("plan", ROOT / "conf" / "demo.yaml", "--gpu-memory", "8GB")
    assert status == 0, err
    for part in ("Peak of GPU memory", "northgate", "Per round", "RTX 4090", "Fits:", "assumed"):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_prints_json_alone(fedlora):
    status, out, _ = fedlora(
        *("plan", ROOT / "conf" / "demo.yaml", "--json", "--overrides", "training.batch_size=2")
    )
    plan = json.loads(out)
    assert status == 0 and plan["verdict"]["fits"] is True
    assert plan["phases"][0]["total_bytes"] > plan["phases"][0]["torch_bytes"]
    assert plan["phases"][0]["micro_batch_tokens"] <= 2 * 128
    assert plan["base"]["total"] > 10**6


def test_the_command_ends_with_2_for_what_can_be_mended(fedlora, tmp_path):
    demo = ROOT / "conf" / "demo.yaml"
    status, _, err = fedlora("plan", demo, "--gpu-memory", "24")
    assert status == 2 and "Expected a number above 0 and its unit" in err
    status, _, err = fedlora("plan", demo, "--overrides", "training.batch_sise=2")
    assert status == 2 and "batch_sise" in err
    status, _, err = fedlora("plan", demo, "--overrides", "model.name=nobody/nothing")
    assert status == 2 and "hf download nobody/nothing" in err


def test_sizes_are_written_in_powers_of_ten():
    assert [format_size(n) for n in (8.54e9, 61.6e6, 524288)] == ["8.54 GB", "61.6 MB", "524.3 kB"]
