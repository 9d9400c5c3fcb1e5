"""Plans: the memory model against counted tensors, the verdict, the text and its errors.

Measured with these tests' models (hidden 32 to 256, 2 to 6 layers, 200 to 1,600 tokens, fp32 and
bf16): the peak of a step is predicted within 12 %, see ``test_the_peak_of_a_real_step``. The
shape of Qwen2.5-7B, on tensors without memory: see ``test_the_peak_of_a_step_of_7b``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEMO_MODEL, ROOT, build_tiny_config, build_tiny_model
from live_memory import LiveMemory
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, T5Config

from fedlora_app import command
from fedlora_app.adapters import AdapterError, activate, adapter_parameters, attach_adapters
from fedlora_app.config import GLOBAL, LOCAL, AdaptersConfig, TrainingConfig
from fedlora_app.config_file import load_config
from fedlora_app.model import ModelError, build_empty_model
from fedlora_app.planning.advice import apply_change
from fedlora_app.planning.cards import CARDS, EFFICIENCY, Work, compute_flops, compute_seconds
from fedlora_app.planning.memory import (
    MicroBatch,
    Numerics,
    PlanError,
    adapter_sizes,
    predict_activation_bytes,
    predict_phase,
    read_shape,
)
from fedlora_app.planning.plan import build_plan, parse_memory
from fedlora_app.planning.sizes import measure_sizes
from fedlora_app.planning.text import describe_plan, format_size
from fedlora_app.rounds import BOTH, Phase
from fedlora_app.tokens import Example
from fedlora_app.training import train_phase

GLOBAL_PHASE = Phase((GLOBAL,), (GLOBAL,), "universal")
LOCAL_PHASE = Phase(BOTH, (LOCAL,), "local")
JOINT_PHASE = Phase(BOTH, BOTH, "mixed")
SEVEN_B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory) -> Path:
    """A folder with the configuration of Qwen2.5-7B, a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("seven_b")
    Qwen2Config(**SEVEN_B, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seven_b_sizes():
    with torch.device("meta"):
        return measure_sizes(Qwen2ForCausalLM(Qwen2Config(**SEVEN_B)), AdaptersConfig())


def plan_for(folder: Path, name: str, memory: str = "", overrides: str = ""):
    config = load_config(ROOT / "conf" / name, f"model.name={folder} {overrides}")
    return build_plan(config, ROOT, memory)


def item_bytes(phase, name: str) -> int:
    return next(item.num_bytes for item in phase.items if item.name == name)


def step_bytes(phase) -> int:
    """What comes and goes with a phase."""
    return phase.torch_bytes - phase.resident_bytes


@pytest.fixture
def fedlora(capsys, monkeypatch):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


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
            *(read_shape(Qwen2Config(**SEVEN_B)), seven_b_sizes, AdaptersConfig()),
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
    model_config, adapters = Qwen2Config(**SEVEN_B), AdaptersConfig()
    full = predict_activation_bytes(model_config, adapters, (GLOBAL,), 1024, 2, False)
    assert full / 1024 == pytest.approx(5.9e6, rel=0.1)  # per token
    assert item_bytes(joint, "activations") / 1024 == pytest.approx(0.2e6, rel=0.01)


# The memory model against what a step holds


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example([token % 64 for token in range(n)], max(1, n // 2)) for n in lengths]


SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
DEEP = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("shape", "lengths", "checkpointing", "phase", "dtype"),
    [
        (SMALL, [128] * 8, False, GLOBAL_PHASE, torch.bfloat16),
        (SMALL, [128] * 8, True, LOCAL_PHASE, torch.float32),
        (WIDE, [256, 120] * 4, False, LOCAL_PHASE, torch.float32),
        (WIDE, [256, 120] * 4, True, GLOBAL_PHASE, torch.bfloat16),
        (DEEP, [200, 60, 33] * 3, False, JOINT_PHASE, torch.bfloat16),
        (DEEP, [200, 60, 33] * 3, True, GLOBAL_PHASE, torch.float32),
    ],
)
def test_the_peak_of_a_real_step(shape, lengths, checkpointing, phase, dtype):
    model = build_tiny_model(64, **shape, max_position_embeddings=1024).to(dtype)
    adapters = AdaptersConfig.model_validate({"global": {"rank": 8}, "local": {"rank": 8}})
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
        )
    room = min(training.batch_size * training.max_seq_length, sum(lengths))
    batch = MicroBatch(room, room // 2)
    predicted = predict_phase(
        *(read_shape(model.config), sizes, adapters, training),
        *(Numerics(is_4bit=False, dtype_bytes=dtype.itemsize), phase, batch, checkpointing),
    )
    print(f"{step_bytes(predicted) / memory.peak - 1:+.1%}")
    assert step_bytes(predicted) == pytest.approx(memory.peak, rel=0.15)
