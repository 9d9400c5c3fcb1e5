from __future__ import annotations

import json

import pytest
import torch
from conftest import build_tiny_model
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig
from fedlora_app.model.adapter_files import load_adapter, save_adapter
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_adapters,
    base_only,
    build_initial_state,
    compute_overlap,
    find_first_layer,
    get_state,
    scaled_local,
    set_state,
    state_shapes,
)
from fedlora_app.model.fused import fused_answering

INPUT_IDS = torch.arange(1, 13).reshape(2, 6)


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


def test_both_adapters_add_up(adapted):
    """y = W0 x + s_G B_G A_G x + s_L B_L A_L x in every adapted layer."""
    activate(adapted, (GLOBAL, LOCAL))
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    expected = x @ layer.base_layer.weight.T
    for name, scale in ((GLOBAL, 32 / 4), (LOCAL, 4 / 2)):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        expected = expected + scale * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_each_combination_answers_differently(adapted):
    with base_only(adapted):
        outputs = [logits(adapted)]
    for active in ((GLOBAL,), (LOCAL,), (GLOBAL, LOCAL)):
        activate(adapted, active)
        outputs.append(logits(adapted))
    for index, one in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("trainable", [(), (GLOBAL,), (LOCAL,), (GLOBAL, LOCAL)])
def test_exactly_the_named_adapters_get_gradients(adapted, trainable):
    activate(adapted, (GLOBAL, LOCAL), trainable)
    expected = {id(p) for name in trainable for p in adapter_parameters(adapted, name)}
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == expected
    assert set(adapted.active_adapters) == {GLOBAL, LOCAL}
    assert len(adapter_parameters(adapted, GLOBAL)) == 2 * 7 * 2  # A and B, modules, layers


def test_the_state_round_trips_and_is_a_copy(adapted):
    state = get_state(adapted, GLOBAL)
    before = {key: tensor.clone() for key, tensor in state.items()}
    for parameter in adapter_parameters(adapted, GLOBAL):
        parameter.data.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)
    set_state(adapted, GLOBAL, state)
    after = get_state(adapted, GLOBAL)
    assert all(torch.equal(after[key], before[key]) for key in state)


def test_setting_one_adapter_leaves_the_other(adapted):
    local = get_state(adapted, LOCAL)
    zeros = {key: torch.zeros(shape) for key, shape in state_shapes(adapted, GLOBAL).items()}
    set_state(adapted, GLOBAL, zeros)
    after = get_state(adapted, LOCAL)
    assert all(torch.equal(after[key], local[key]) for key in local)


def test_the_server_needs_no_weights_for_shapes_and_initial_state(tokenizer, adapters_config):
    real = attach_adapters(build_tiny_model(len(tokenizer)), adapters_config)
    with torch.device("meta"):
        empty = attach_adapters(build_tiny_model(len(tokenizer)), adapters_config)
    assert state_shapes(empty, GLOBAL) == state_shapes(real, GLOBAL)
    one, other = build_initial_state(empty, GLOBAL, 5), build_initial_state(real, GLOBAL, 5)
    assert all(torch.equal(one[key], other[key]) for key in one)
    different = build_initial_state(empty, GLOBAL, 6)
    for key, tensor in one.items():
        is_b = ".lora_B." in key
        assert torch.equal(tensor, different[key]) == is_b
        assert bool(tensor.any()) != is_b
    assert all(".global." not in key for key in one)  # the keys do not name the adapter


def test_a_saved_adapter_loads_in_peft_and_gives_the_same_logits(
    adapted, tokenizer, adapters_config, tmp_path
):
    activate(adapted, (GLOBAL,))
    expected = logits(adapted)
    save_adapter(tmp_path / "a", adapted, GLOBAL, get_state(adapted, GLOBAL), "tiny")
    loaded = PeftModel.from_pretrained(build_tiny_model(len(tokenizer)), tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_saving_twice_gives_the_same_bytes(adapted, tmp_path):
    state = get_state(adapted, LOCAL)
    hashes = {save_adapter(tmp_path / name, adapted, LOCAL, state, "tiny") for name in "ab"}
    configs = {(tmp_path / name / "adapter_config.json").read_bytes() for name in "ab"}
    assert len(hashes) == len(configs) == 1


def test_adapters_can_be_attached_anew(tokenizer, adapters_config):
    base = build_tiny_model(len(tokenizer))
    with torch.no_grad():
        plain = base(INPUT_IDS).logits
    for rank in (2, 3):
        config = adapters_config.model_copy(
            update={"local": adapters_config.local.model_copy(update={"rank": rank})}
        )
        model = attach_adapters(base, config)
        shapes = state_shapes(model, LOCAL)
        assert {s[0] for key, s in shapes.items() if "lora_A" in key} == {rank}
        assert len(model.peft_config) == 2
        with base_only(model):
            torch.testing.assert_close(logits(model), plain)


@pytest.mark.parametrize("targets", [["q_proj", "nope"], ["embed_tokens"], []])
def test_targets_that_are_no_linear_modules_are_refused(tokenizer, adapters_config, targets):
    local = adapters_config.local.model_copy(update={"target_modules": targets})
    config = adapters_config.model_copy(update={"local": local})
    with pytest.raises(AdapterError, match=r"adapters\.local\.target_modules.*It has: down_proj"):
        attach_adapters(build_tiny_model(len(tokenizer)), config)


def test_layers_that_are_not_there_are_refused_with_all_other_faults(tokenizer):
    config = AdaptersConfig.model_validate(
        {"global": {"first_layer": 2}, "local": {"target_modules": ["nope"], "first_layer": 1}}
    )
    with pytest.raises(AdapterError) as refused:
        attach_adapters(build_tiny_model(len(tokenizer)), config)
    message = str(refused.value)
    assert "adapters.global.first_layer: 2 leaves no layer" in message
    assert "has 2 decoder layers, counted from 0, so that 1 is the most" in message
    assert "adapters.local.target_modules: ['nope']" in message and "local.first" not in message


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_an_adapter_of_upper_layers_is_there_and_nowhere_else(tokenizer, tmp_path, targets):
    config = AdaptersConfig.model_validate(
        {
            "global": {"first_layer": 1, "target_modules": targets},
            "local": {"first_layer": 3, "target_modules": targets},
        }
    )
    base = build_tiny_model(len(tokenizer), num_hidden_layers=4)
    model = attach_adapters(base, config)
    whole = attach_adapters(
        build_tiny_model(len(tokenizer), num_hidden_layers=4),
        AdaptersConfig.model_validate({"global": {"target_modules": targets}}),
    )
    everywhere = state_shapes(whole, GLOBAL)
    for name, first in ((GLOBAL, 1), (LOCAL, 3)):
        assert find_first_layer(model, [name]) == first
        upper = {k: s for k, s in everywhere.items() if int(k.split(".layers.")[1][0]) >= first}
        assert state_shapes(model, name) == upper and upper
        save_adapter(tmp_path / name, model, name, get_state(model, name), "tiny")
        assert load_adapter(tmp_path / name, model, name, "tiny").keys() == upper.keys()
        with pytest.raises(AdapterError, match="tensors are missing"):
            load_adapter(tmp_path / name, whole, name, "tiny")
        loaded = PeftModel.from_pretrained(
            build_tiny_model(len(tokenizer), num_hidden_layers=4), tmp_path / name
        )
        assert set(get_peft_model_state_dict(loaded)) == set(upper)
    assert find_first_layer(model, (GLOBAL, LOCAL)) == 1


ALL_LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


class TestRefusals:
    @pytest.fixture
    def folder(self, adapted, tmp_path):
        save_adapter(tmp_path / "a", adapted, LOCAL, get_state(adapted, LOCAL), "tiny")
        return tmp_path / "a"

    def test_a_good_folder_is_read(self, folder, adapted):
        state = load_adapter(folder, adapted, LOCAL, "tiny")
        expected = get_state(adapted, LOCAL)
        assert all(torch.equal(state[key], expected[key]) for key in expected)

    def test_missing(self, adapted, tmp_path):
        with pytest.raises(AdapterError, match=r"does not exist.*never silently restarted"):
            load_adapter(tmp_path / "none", adapted, LOCAL, "tiny")

    def test_another_role(self, folder, adapted):
        with pytest.raises(AdapterError, match="role 'local', expected 'global'"):
            load_adapter(folder, adapted, GLOBAL, "tiny")

    def test_another_base(self, folder, adapted):
        with pytest.raises(AdapterError, match="trained on the base model 'tiny'.*'other'"):
            load_adapter(folder, adapted, LOCAL, "other")

    def test_another_rank(self, folder, tokenizer, adapters_config):
        config = adapters_config.model_copy(
            update={"local": adapters_config.local.model_copy(update={"rank": 3})}
        )
        model = attach_adapters(build_tiny_model(len(tokenizer)), config)
        with pytest.raises(AdapterError, match="another rank or another base model"):
            load_adapter(folder, model, LOCAL, "tiny")

    def test_truncated(self, folder, adapted):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(AdapterError, match="is damaged"):
            load_adapter(folder, adapted, LOCAL, "tiny")

    def test_not_finite_or_incomplete(self, folder, adapted):
        weights = folder / "adapter_model.safetensors"
        state = load_file(weights)
        key = next(iter(state))
        metadata = {"fedlora_role": LOCAL}
        save_file(state | {key: torch.full_like(state[key], torch.nan)}, weights, metadata)
        with pytest.raises(AdapterError, match="not finite"):
            load_adapter(folder, adapted, LOCAL, "tiny")
        save_file({k: v for k, v in state.items() if k != key}, weights, metadata)
        with pytest.raises(AdapterError, match="1 tensors are missing"):
            load_adapter(folder, adapted, LOCAL, "tiny")

    def test_a_pickle_is_not_opened(self, folder, adapted):
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / "adapter_model.bin")
        with pytest.raises(AdapterError, match="does not exist"):
            load_adapter(folder, adapted, LOCAL, "tiny")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("lora_alpha", 800),
            ("lora_alpha", None),
            ("lora_alpha", 10**400),
            ("lora_alpha", float("nan")),
            ("r", 99),
            ("use_rslora", True),
            ("use_dora", True),
            ("target_modules", ["q_proj"]),
            ("target_modules", "all-linear"),
            ("target_modules", ["nothing", *ALL_LINEAR]),
            ("alpha_pattern", {"q_proj": 100}),
            ("modules_to_save", ["lm_head"]),
            ("peft_type", "IA3"),
        ],
    )
    def test_a_config_of_another_adapter(self, folder, adapted, key, value):
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(AdapterError, match=rf"adapter_config\.json has {key} .*Restore it"):
            load_adapter(folder, adapted, LOCAL, "tiny")

    def test_modules_may_be_named_in_short_and_new_settings_left_out(self, folder, adapted):
        """As earlier versions and other ones of PEFT wrote the file."""
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text()) | {"target_modules": ALL_LINEAR, "lora_alpha": 4}
        del content["use_qalora"], content["target_parameters"]
        path.write_text(json.dumps(content))
        assert load_adapter(folder, adapted, LOCAL, "tiny")

    def test_a_config_that_is_no_object(self, folder, adapted):
        (folder / "adapter_config.json").write_text(json.dumps([1]))
        with pytest.raises(AdapterError, match="is damaged"):
            load_adapter(folder, adapted, LOCAL, "tiny")


def test_adapters_may_sit_on_different_modules(tiny_model):
    """What scales local, or measures the overlap, looks only where the adapters are."""
    config = AdaptersConfig.model_validate(
        {"global": {"rank": 2}, "local": {"rank": 2, "target_modules": ["q_proj"]}}
    )
    model = attach_adapters(tiny_model, config)
    assert 0 <= compute_overlap(model).item() <= 1
    activate(model, (GLOBAL, LOCAL))
    scales = {}
    with scaled_local(model, 0.5):
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and LOCAL in module.scaling:
                scales[name] = module.scaling[LOCAL]
    assert scales and all("q_proj" in name for name in scales)
    assert set(scales.values()) == {0.5 * config.local.alpha / 2}


def test_fused_answers_are_those_of_peft_at_every_scale(adapted):
    """At several scales and with none for a while: what a gate and its fitting ask for."""
    ids = torch.randint(3, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    factors = (1.0, 0.0, 0.5)

    def answer():
        logits = []
        for factor in factors:
            with scaled_local(adapted, factor):
                logits.append(adapted(ids).logits)
        with base_only(adapted):
            logits.append(adapted(ids).logits)
        return [*logits, adapted(ids).logits]

    with torch.inference_mode():
        for active in ((GLOBAL,), (LOCAL,), (GLOBAL, LOCAL)):
            activate(adapted, active)
            expected = answer()
            with fused_answering(adapted):
                found = answer()
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert (expected[-1] - expected[-2]).abs().max() > 0.01
    assert not any("forward" in module.__dict__ for module in adapted.modules())


def test_tensors_that_share_their_memory_are_written_as_others(adapted, tmp_path):
    """As they come out of a message: Flower sends equal arrays once."""
    state = {key: torch.zeros_like(tensor) for key, tensor in get_state(adapted, GLOBAL).items()}
    expected = save_adapter(tmp_path / "apart", adapted, GLOBAL, state, "base")
    by_shape = {tensor.shape: tensor for tensor in state.values()}
    shared = {key: by_shape[tensor.shape] for key, tensor in state.items()}
    assert save_adapter(tmp_path / "shared", adapted, GLOBAL, shared, "base") == expected
