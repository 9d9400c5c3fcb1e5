"""The 4-bit path on whatever the process computes on: a GPU where there is one, else the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, ModelConfig, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model import base as model_module
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_once,
    get_state,
    set_state,
)
from fedlora_app.model.base import load_base_model
from fedlora_app.model.device import has_spoilt_process
from fedlora_app.model.fused import fused_adapters, fused_answering
from fedlora_app.training import attention
from fedlora_app.training.layout import pack
from fedlora_app.training.losses import compute_losses
from fedlora_app.training.packing import packed_attention
from fedlora_app.training.phase import train_phase

BOTH = (GLOBAL, LOCAL)
LENGTHS = (2, 40, 17, 16, 5, 60, 33)
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far two tensors may lie apart, beside their length."""


@pytest.fixture(params=TOLERANCES)
def dtype(request):
    return request.param


@pytest.fixture
def model(tiny_project, dtype):
    model_module._resident.clear()
    config = ModelConfig(name="model", quantization="4bit", dtype=dtype, cache_quantized=False)
    adapters = AdaptersConfig.model_validate({"global": {"rank": 4}, "local": {"rank": 4}})
    adapted = attach_once(load_base_model(config, tiny_project), adapters)
    for name in BOTH:
        generator = torch.Generator().manual_seed(1)
        state = {
            key: torch.empty(tensor.shape).normal_(0, 0.05, generator=generator)
            for key, tensor in get_state(adapted, name).items()
        }
        set_state(adapted, name, state)
    yield adapted
    model_module._resident.clear()


def build_examples() -> list[Example]:
    rng = random.Random(0)
    return [
        Example([rng.randrange(3, 200) for _ in range(length)], rng.randint(1, length - 1))
        for length in LENGTHS
    ]


def assert_near(ours, theirs, dtype) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= TOLERANCES[dtype] * other.norm() + 1e-12


def loss_and_gradients(model, packs) -> list[torch.Tensor]:
    model.zero_grad()
    with packed_attention(model.get_base_model()):
        total = sum(compute_losses(model, examples, None, pack)[0].sum() for examples in packs)
    total.backward()
    return [total.detach(), *(p.grad.clone() for n in BOTH for p in adapter_parameters(model, n))]


def train(model, **settings):
    settings = {"learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation_steps": 4} | settings
    return train_phase(
        model,
        build_examples(),
        TrainingConfig(warmup_ratio=0.0, max_seq_length=64, **settings),
        active=BOTH,
        trainable=(LOCAL,),
        num_steps=3,
        run_span=(0.0, 1.0),
        weight_decays={LOCAL: 0.0},
        seed=1,
    )


def test_packed_and_fused_is_one_by_one_with_peft(model, dtype):
    activate(model, BOTH, BOTH)
    examples = build_examples()
    alone = loss_and_gradients(model, [[example] for example in examples])
    with fused_adapters(model, BOTH):
        packed = loss_and_gradients(model, [examples])
    assert_near(packed, alone, dtype)


def test_checkpointing_changes_nothing(model, dtype):
    start, outcomes = get_state(model, LOCAL), []
    for checkpointing in (False, True):
        set_state(model, LOCAL, start)
        train(model, gradient_checkpointing=checkpointing)
        outcomes.append(list(get_state(model, LOCAL).values()))
    assert_near(*outcomes, dtype)
    assert not all(map(torch.equal, outcomes[0], start.values()))


def test_fused_answers_are_those_of_peft(model, dtype):
    activate(model, BOTH)
    ids = torch.randint(3, 200, (3, 20), device=model.device)
    with torch.inference_mode():
        expected = model(ids).logits.float()
        with fused_answering(model):
            assert_near([model(ids).logits.float()], [expected], dtype)


@pytest.mark.gpu
def test_on_a_gpu_the_paged_optimizer_learns_and_keeps_no_more_memory(model):
    """Its pages are managed by CUDA, outside of what torch counts."""
    result, taken = train(model, optimizer="paged_adamw_8bit"), []
    assert result.final_train_loss < result.train_loss
    for _ in range(20):
        train(model, optimizer="paged_adamw_8bit")
        torch.cuda.empty_cache()
        taken.append(torch.cuda.mem_get_info()[0])
    assert max(taken) - min(taken[5:]) < 2**22


@pytest.mark.gpu
def test_on_a_gpu_two_runs_of_a_phase_agree(model, dtype):
    start, outcomes = get_state(model, LOCAL), []
    torch.use_deterministic_algorithms(True, warn_only=True)  # as a client does
    try:
        for _ in range(2):
            set_state(model, LOCAL, start)
            train(model)
            outcomes.append(list(get_state(model, LOCAL).values()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_near(*outcomes, dtype)
    if dtype == "bfloat16":  # whose attention is FlashAttention's
        assert all(map(torch.equal, *outcomes))


@pytest.mark.gpu
def test_on_a_gpu_flash_attention_is_the_padded_one(model, dtype, monkeypatch):
    """In fp32 both are the padded one."""
    activate(model, BOTH, BOTH)
    ours = loss_and_gradients(model, [build_examples()])
    monkeypatch.setattr(attention, "_has_flash", lambda query: False)
    assert_near(ours, loss_and_gradients(model, [build_examples()]), dtype)


def test_a_lost_cuda_context_is_told_from_memory_that_ran_out():
    def raised(error: Exception, cause: Exception | None = None) -> Exception:
        try:
            raise error from cause
        except type(error) as caught:
            return caught

    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert has_spoilt_process(lost)
    assert has_spoilt_process(raised(ValueError("the model cannot be read"), lost))
    assert has_spoilt_process(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not has_spoilt_process(torch.AcceleratorError("CUDA error: out of memory"))
    assert not has_spoilt_process(torch.OutOfMemoryError("CUDA out of memory"))
    assert not has_spoilt_process(ValueError("shapes differ"))
