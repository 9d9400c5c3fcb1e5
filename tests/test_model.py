from __future__ import annotations

import shutil

import pytest
import torch
from transformers import GenerationConfig

from fedlora_app import model as model_module
from fedlora_app.adapters import adapter_parameters, attach_adapters, get_state
from fedlora_app.config import GLOBAL, LOCAL, ModelConfig, TrainingConfig
from fedlora_app.model import (
    ModelError,
    build_empty_model,
    compute_fingerprint,
    load_base_model,
    load_tokenizer,
)
from fedlora_app.tokens import Example
from fedlora_app.training import train_phase


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(name="model", quantization="none", dtype="float32")


def test_the_base_is_loaded_once_and_frozen(config, tiny_project):
    model_module._resident.clear()
    loads = model_module.num_loads
    first, second = load_base_model(config, tiny_project), load_base_model(config, tiny_project)
    assert first is second and model_module.num_loads == loads + 1
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_the_dtype_is_what_the_configuration_says(config, tiny_project):
    bf16 = config.model_copy(update={"dtype": "bfloat16"})
    assert load_base_model(bf16, tiny_project).model.dtype == torch.bfloat16
    assert load_base_model(config, tiny_project).model.dtype == torch.float32


def test_the_servers_model_has_shapes_and_no_weights(config, tiny_project):
    empty = build_empty_model(config, tiny_project)
    real = load_base_model(config, tiny_project).model
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert shapes.items() >= {name: p.shape for name, p in empty.named_parameters()}.items()
    assert all(p.device.type == "meta" for p in empty.parameters())


def test_a_folder_without_weights_is_named(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(config, tmp_path)


def test_pickled_weights_are_not_opened(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(config, tmp_path)


def test_a_base_without_a_chat_template_is_refused(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(config, tmp_path)


def test_the_fingerprint_knows_other_weights(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    assert compute_fingerprint(config, tmp_path) == compute_fingerprint(config, tiny_project)
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert compute_fingerprint(config, tmp_path) != compute_fingerprint(config, tiny_project)


def test_a_models_own_sampling_settings_do_not_reach_the_evaluation(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    settings = GenerationConfig(do_sample=True, repetition_penalty=1.5, no_repeat_ngram_size=2)
    settings.save_pretrained(tmp_path / "model")
    model = load_base_model(config, tmp_path).model
    plain = load_base_model(config, tiny_project).model
    ids = torch.arange(3, 20).unsqueeze(0)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0)
    outputs = [m.generate(ids, generation_config=greedy) for m in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("changes", "weight_dtype"),
    [
        ({"quantization": "4bit", "dtype": "float32"}, torch.uint8),
        ({"quantization": "4bit", "dtype": "bfloat16"}, torch.uint8),
        ({"quantization": "none", "dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_fp32_adapters_learn_over_nf4_and_bf16_weights(
    config, tiny_project, adapters_config, changes, weight_dtype
):
    """The 4-bit path needs no GPU to be tested: bitsandbytes runs NF4 on the CPU."""
    loaded = load_base_model(config.model_copy(update=changes), tiny_project)
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert (type(layer).__name__ == "Linear4bit") == (changes["quantization"] == "4bit")
    assert layer.weight.dtype == weight_dtype
    model = attach_adapters(loaded.model, adapters_config)
    before = get_state(model, GLOBAL)
    result = train_phase(
        model,
        [Example(list(range(3, 20)), 9), Example(list(range(30, 60)), 12)],
        TrainingConfig(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=1),
        active=(GLOBAL, LOCAL),
        trainable=(GLOBAL, LOCAL),
        num_steps=20,
        run_span=(0.0, 1.0),
        weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
        seed=1,
    )
    assert {p.dtype for p in adapter_parameters(model, GLOBAL)} == {torch.float32}
    assert result.final_train_loss < 0.9 * result.train_loss
    assert any(not torch.equal(before[key], t) for key, t in get_state(model, GLOBAL).items())
    model_module._resident.clear()
