"""States of the layers below those that learn: the same step with them and without."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import build_tiny_model
from transformers import (
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import activate, attach_adapters, get_state, set_state
from fedlora_app.model.base import decoder_layers
from fedlora_app.training import kept_states
from fedlora_app.training.kept_states import KeptStates, keeping_states
from fedlora_app.training.packing import packed_attention
from fedlora_app.training.phase import train_phase

BOTH = (GLOBAL, LOCAL)
NUM_LAYERS = 4
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PHASES = {
    "global alone": ((GLOBAL,), (GLOBAL,), 2, 0),
    "local beside a whole global one": (BOTH, (LOCAL,), 0, 3),
    "local beside an upper global one": (BOTH, (LOCAL,), 2, 1),
    "both learn": (BOTH, BOTH, 2, 3),
}
"""Active, trainable, and the first layers of the global and the local adapter."""


def build_base(kind: str):
    torch.manual_seed(3)
    if kind == "qwen2":
        return build_tiny_model(256, num_hidden_layers=NUM_LAYERS)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if kind == "sliding":  # whose layers see the last eight tokens only
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    # Whose layers differ in their windows and positions, and which scales its embedding.
    layer_types = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=8, layer_types=layer_types, pad_token_id=0
    )
    return Gemma3ForCausalLM(config).eval()


def build_adapters(global_first: int = 0, local_first: int = 2, **local) -> AdaptersConfig:
    return AdaptersConfig.model_validate(
        {
            "global": {"rank": 4, "first_layer": global_first},
            "local": {"rank": 2, "alpha": 4, "first_layer": local_first, **local},
        }
    )


def build_model(kind: str = "llama", *first_layers: int, **settings):
    return fill(attach_adapters(build_base(kind), build_adapters(*first_layers, **settings)))


def fill(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def build_examples(num_replayed: int = 3) -> list[Example]:
    rng = random.Random(0)
    examples = [
        Example([rng.randrange(3, 200) for _ in range(length)], rng.randint(1, length - 1))
        for length in (2, 40, 17, 16, 5, 31, 33, 9, 24)
    ]
    marked = [replace(example, is_replayed=True) for example in examples[:num_replayed]]
    return marked + examples[num_replayed:]


def train(model, examples, *, keeps_states=True, active=BOTH, trainable=(LOCAL,), **settings):
    """Three passes in packs of at most 80 tokens; return every step's loss and the penalty."""
    losses = []
    result = train_phase(
        model,
        examples,
        TrainingConfig(
            **{
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_seq_length": 40,
                "learning_rate": 1e-2,
                "warmup_ratio": 0.0,
            }
            | settings
        ),
        active=active,
        trainable=trainable,
        num_steps=9,
        run_span=(0.0, 1.0),
        weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
        seed=1,
        progress=lambda step, num_steps, loss: losses.append(loss),
        keeps_states=keeps_states,
    )
    return torch.tensor([*losses, result.penalty], dtype=torch.float64)


@contextmanager
def counted_layers(model):
    """Count how often each decoder layer's attention runs in the block."""
    counts, handles = Counter(), []
    for index, layer in enumerate(decoder_layers(model.get_base_model())):
        hook = layer.self_attn.register_forward_hook(lambda *_, i=index: counts.update([i]))
        handles.append(hook)
    yield counts
    for handle in handles:
        handle.remove()


def compare(model, tolerance: float = 1e-10, **arguments) -> tuple[Counter, Counter]:
    """Train with kept states and without, require the same; return how often each layer ran."""
    examples = build_examples()
    start = {name: get_state(model, name) for name in BOTH}
    outcomes, counts = [], []
    for keeps_states in (False, True):
        for name, state in start.items():
            set_state(model, name, state)
        with counted_layers(model) as counted:
            losses = train(model, examples, keeps_states=keeps_states, **arguments)
        outcomes.append((losses, {name: get_state(model, name) for name in BOTH}))
        counts.append(counted)
    moved = outcomes[0][1][arguments.get("trainable", (LOCAL,))[-1]]
    before = start[arguments.get("trainable", (LOCAL,))[-1]]
    assert any(not torch.equal(moved[key], before[key]) for key in moved)
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=tolerance, atol=tolerance)
    return tuple(counts)


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen2", "sliding"))],
)
@pytest.mark.parametrize("phase", PHASES)
def test_kept_states_change_no_loss_and_no_weight(kind, phase):
    active, trainable, *first = PHASES[phase]
    model = build_model(kind, *first).double()
    assert is_kept(model, build_examples(), trainable)  # tried out, and not again
    plain, kept = compare(model, active=active, trainable=trainable)
    below = min(f for name, f in zip(BOTH, first, strict=True) if name in trainable)
    for layer in range(NUM_LAYERS):
        if layer < below:  # in one pass of three, whose packs differ a little
            assert kept[layer] < plain[layer] / 2
        else:
            assert kept[layer] == plain[layer]


@pytest.mark.parametrize(
    "settings",
    [
        {"local_kl_weight": 1.0, "local_orthogonality": 1.0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "local_kl_weight": 1.0},
        {"packing": False},
        {"fused_adapters": False},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_they_change_nothing_under_other_settings(settings):
    plain, kept = compare(build_model(global_first=1).double(), **settings)
    assert kept[0] < plain[0] / 2


def test_they_stay_in_the_dtype_of_a_base_in_bf16():
    plain, kept = compare(build_model().bfloat16(), tolerance=2e-2)
    assert kept[0] < plain[0] / 2


def test_they_serve_a_base_in_4_bit(tmp_path):
    build_base("llama").save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as model.base does, and why
    assert type(decoder_layers(base)[0].mlp.up_proj).__name__ == "Linear4bit"
    plain, kept = compare(fill(attach_adapters(base, build_adapters())), tolerance=1e-4)
    assert kept[0] < plain[0] / 2


@pytest.mark.minutes
def test_compiled_layers_take_kept_states():
    model = fill(attach_adapters(build_tiny_model(256), build_adapters(local_first=1)))
    start, losses = get_state(model, LOCAL), []
    for keeps_states in (False, True):
        set_state(model, LOCAL, start)
        losses.append(train(model, build_examples(), keeps_states=keeps_states, compile=True))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def is_kept(model, examples, trainable=(LOCAL,), num_steps=9) -> bool:
    training = TrainingConfig(batch_size=4, gradient_accumulation_steps=1)
    activate(model, BOTH, trainable)
    with (
        packed_attention(model.get_base_model()),
        keeping_states(model, examples, training, trainable, num_steps) as kept,
    ):
        return kept is not None


def test_states_are_kept_only_where_that_pays_and_is_exact(monkeypatch):
    examples, model = build_examples(), build_model(global_first=0, local_first=2)
    assert is_kept(model, examples)
    assert not is_kept(model, examples, trainable=(GLOBAL,))  # which begins at the first layer
    assert not is_kept(model, examples, num_steps=3)  # one pass
    dropping = AdaptersConfig.model_validate(
        {"global": {"dropout": 0.1}, "local": {"first_layer": 2}}
    )
    assert not is_kept(attach_adapters(build_base("llama"), dropping), examples)
    upper = build_model(global_first=2, local_first=2, dropout=0.1)
    assert is_kept(upper, examples)  # dropout above the layers whose states are kept
    needed = sum(len(example.input_ids) for example in examples) * SIZES["hidden_size"] * 4
    for free, expected in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(kept_states, "read_free_memory", lambda device, free=free: free)
        assert is_kept(model, examples) is expected


def test_a_model_whose_layers_hand_on_more_than_states_keeps_none():
    model = build_model()
    layers, seen = decoder_layers(model.get_base_model()), []
    layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    layers[3].register_forward_hook(lambda module, args, output: output + seen[-1])
    assert not is_kept(model, build_examples())


def test_nothing_of_a_phase_stays_in_memory(monkeypatch):
    """Also where it fails half-way: the next client's phase runs in the same process."""
    sizes = []
    original = KeptStates.clear

    def clear(self):
        sizes.append(len(self._states))
        original(self)
        sizes.append(len(self._states))

    monkeypatch.setattr(KeptStates, "clear", clear)
    model, examples = build_model(), build_examples()
    before = {id(layer): dict(layer.__dict__) for layer in decoder_layers(model.get_base_model())}
    train(model, examples)
    with pytest.raises(RuntimeError, match="loss became"), ExitStack() as stack:
        stack.callback(monkeypatch.undo)
        train(model, examples, learning_rate=1e30)
    assert sizes[:2] == [len(examples), 0] and sizes[3] == 0
    for layer in decoder_layers(model.get_base_model()):
        assert layer.__dict__.keys() == before[id(layer)].keys()
