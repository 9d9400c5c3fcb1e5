"""The training step against the same step done plainly: one by one, by PEFT, by Trainer."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import build_tiny_config, build_tiny_model
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.federation.messages import MessageError
from fedlora_app.model import kernels
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_adapters,
    build_initial_state,
    get_state,
    set_state,
)
from fedlora_app.model.fused import can_fuse_adapters, fused_adapters
from fedlora_app.training import losses as losses_module
from fedlora_app.training import packing
from fedlora_app.training.activations import CHUNK_ROWS
from fedlora_app.training.attention import PackingError
from fedlora_app.training.batches import split_into_packs
from fedlora_app.training.layout import pack
from fedlora_app.training.losses import compute_losses, token_losses
from fedlora_app.training.packing import packed_attention
from fedlora_app.training.phase import TrainingError, train_phase
from fedlora_app.training.within_memory import settle_checkpointing

BOTH = (GLOBAL, LOCAL)
CPU = torch.device("cpu")


def build_examples(lengths, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example([rng.randrange(3, 200) for _ in range(length)], rng.randint(1, length - 1))
        for length in lengths
    ]


LENGTHS = (2, 40, 17, 16, 5, 70, 33)
"""Several to a group of attention and some alone."""


def fill_adapters(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(params=["qwen2", "llama", "sliding"])
def model(request, adapters_config):
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(3)
    if request.param == "qwen2":
        base = build_tiny_model(256)
    elif request.param == "llama":
        base = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    else:  # whose layers see the last eight tokens only
        base = MistralForCausalLM(MistralConfig(**settings, sliding_window=8)).eval()
    return fill_adapters(attach_adapters(base, adapters_config))


def loss_and_gradients(model, packs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    with packed_attention(model.get_base_model()):
        total = sum(compute_losses(model, examples, None, pack)[0].sum() for examples in packs)
    total.backward()
    return total.detach(), [p.grad.clone() for n in BOTH for p in adapter_parameters(model, n)]


def test_packed_loss_and_gradients_are_those_of_one_by_one_examples(model):
    activate(model, BOTH, BOTH)
    examples = build_examples(LENGTHS)
    alone_loss, alone = loss_and_gradients(model, [[example] for example in examples])
    for packs in ([examples], split_into_packs(examples, 75)):
        loss, gradients = loss_and_gradients(model, packs)
        torch.testing.assert_close(loss, alone_loss, rtol=1e-6, atol=0)
        for ours, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


def test_the_loss_is_transformers_own_without_any_packing(model):
    """One by one through the model's own attention and loss, sliding window included."""
    activate(model, BOTH, BOTH)
    examples = build_examples(LENGTHS)
    loss, gradients = loss_and_gradients(model, [examples])
    model.zero_grad()
    total = torch.zeros(())
    for example in examples:
        labels = torch.tensor([example.input_ids])
        labels[0, : example.answer_start] = -100
        mean = model(torch.tensor([example.input_ids]), labels=labels, use_cache=False).loss
        total = total + mean * example.num_answer_tokens
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-6, atol=0)
    expected = [p.grad for n in BOTH for p in adapter_parameters(model, n)]
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max())


def test_packs_hold_every_example_once_and_no_more_than_they_may():
    examples = build_examples(random.Random(1).choices(range(2, 60), k=200))
    packs = split_into_packs(examples, 64)
    assert sorted(id(e) for p in packs for e in p) == sorted(map(id, examples))
    sizes = [sum(len(e.input_ids) for e in p) for p in packs]
    assert max(sizes) <= 64 and sum(sizes) / (64 * len(packs)) > 0.95
    assert split_into_packs(examples, 64) == packs
    assert split_into_packs(build_examples([100]), 64) == [build_examples([100])]


def test_linear_layers_see_real_tokens_only():
    batch = pack(build_examples(LENGTHS), CPU)
    assert batch.inputs["input_ids"].shape == (1, sum(LENGTHS))
    padded = sum(g.count * g.width for g in batch.inputs["packed_groups"].groups)
    assert padded < 2 * sum(LENGTHS)


def test_a_model_that_mixes_packed_examples_is_refused(monkeypatch):
    base = build_tiny_model(256)

    def mix(batch, *args, **kwargs):
        hidden = type(base.model).forward(base.model, *args, **kwargs)
        hidden.last_hidden_state = hidden.last_hidden_state.cumsum(1)
        return hidden

    monkeypatch.setattr(base.model, "forward", lambda **kwargs: mix(None, **kwargs))
    with pytest.raises(PackingError, match="training.packing: false"), packed_attention(base):
        pass
    assert base.config._attn_implementation == "sdpa"


def test_built_in_packing_is_what_the_check_would_have_caught():
    """With a cache transformers forgets where one example ends, silently."""
    base = build_tiny_model(256)
    original = packing.compute_hidden_states
    try:
        packing.compute_hidden_states = lambda base, batch: base.base_model(
            batch.inputs["input_ids"], use_cache=True
        ).last_hidden_state.flatten(0, 1)
        with pytest.raises(PackingError, match="something else for examples"):
            packing._require_separation(base, "sdpa")
    finally:
        packing.compute_hidden_states = original
    with packed_attention(base):
        packing._require_separation(base, "sdpa")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_and_its_gradient_are_those_of_full_logits(monkeypatch, dtype, bias):
    monkeypatch.setattr(losses_module, "LOGIT_ROWS", 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(30, 16, dtype=dtype, requires_grad=True)
    targets, weights = torch.randint(300, (30,)), torch.rand(30)
    (token_losses(head, hidden, targets) * weights).sum().backward()
    ours = hidden.grad.float()
    hidden.grad = None
    full = functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    (full * weights).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(token_losses(head, hidden, targets), full, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, hidden.grad.float(), rtol=tolerance, atol=tolerance)


def test_a_head_that_learns_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(losses_module, "LOGIT_ROWS", 7)
    head = torch.nn.Linear(16, 300)
    hidden, targets = torch.randn(30, 16), torch.randint(300, (30,))
    token_losses(head, hidden, targets).sum().backward()
    ours, head.weight.grad = head.weight.grad, None
    functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    torch.testing.assert_close(ours, head.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("active", [(GLOBAL,), (LOCAL,), BOTH])
def test_fused_adapters_are_pefts_own(model, active):
    model.double()  # the order of summation depends on the CPU, and in fp32 shows up to 1e-5
    activate(model, active, active)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    outcomes = []
    for fuses in (False, True):
        model.zero_grad()
        if fuses:
            with fused_adapters(model, active):
                logits = model(ids).logits
        else:
            logits = model(ids).logits
        logits.square().mean().backward()
        grads = [p.grad.clone() for n in active for p in adapter_parameters(model, n)]
        outcomes.append((logits.detach(), grads))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(ids).logits.detach(), outcomes[0][0], rtol=0, atol=0)


def test_adapters_on_other_modules_are_fused_where_both_are():
    config = AdaptersConfig.model_validate(
        {
            "global": {"rank": 4, "target_modules": ["q_proj", "up_proj"]},
            "local": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        }
    )
    model = fill_adapters(attach_adapters(build_tiny_model(256), config))
    activate(model, BOTH)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(ids).logits
        with fused_adapters(model, BOTH):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-5, atol=1e-6)


def test_adapters_with_dropout_are_not_fused():
    config = AdaptersConfig.model_validate({"local": {"dropout": 0.1}})
    model = attach_adapters(build_tiny_model(256), config)
    assert can_fuse_adapters(model, (GLOBAL,)) and not can_fuse_adapters(model, BOTH)
    with pytest.raises(AdapterError, match="fused_adapters to false"), fused_adapters(model, BOTH):
        pass


def test_adapters_stay_fp32_and_compute_in_the_dtype_of_the_base():
    model = attach_adapters(build_tiny_model(256).bfloat16(), AdaptersConfig())
    fill_adapters(model)
    activate(model, BOTH, BOTH)
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    with fused_adapters(model, BOTH):
        layer.base_layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        with packed_attention(model.get_base_model()):
            compute_losses(model, build_examples(LENGTHS), None, pack)[0].sum().backward()
    parameters = [p for name in BOTH for p in adapter_parameters(model, name)]
    assert {p.dtype for p in parameters} == {p.grad.dtype for p in parameters} == {torch.float32}
    assert set(seen) == {torch.bfloat16}


class Rows(Dataset):
    def __init__(self, examples):
        self.rows = examples

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        example = self.rows[index]
        ids = list(example.input_ids)
        labels = [-100] * example.answer_start + ids[example.answer_start :]
        return {"input_ids": ids, "labels": labels}


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(values) for name, values in named.items()}


def test_ten_steps_are_those_of_trainer_with_peft(adapters_config, tmp_path):
    """One adapter; every step sees all examples, because Trainer shuffles in its own way."""
    examples = build_examples([9, 30, 17, 4, 12, 25])
    ours = attach_adapters(build_tiny_model(256), adapters_config)
    start = get_state(ours, GLOBAL)
    result = train_phase(
        ours,
        examples,
        TrainingConfig(
            learning_rate=1e-3,
            batch_size=3,
            gradient_accumulation_steps=2,
            warmup_ratio=0.0,
            lr_scheduler="constant",
            max_seq_length=32,
        ),
        active=(GLOBAL,),
        trainable=(GLOBAL,),
        num_steps=10,
        run_span=(0.0, 1.0),
        weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
        seed=1,
    )
    rank, alpha = adapters_config.global_.rank, adapters_config.global_.alpha
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear"
    )
    theirs = get_peft_model(build_tiny_model(256), config, adapter_name=GLOBAL)
    set_state(theirs, GLOBAL, start)
    trainer = Trainer(
        theirs,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=6,
            max_steps=10,
            learning_rate=1e-3,
            adam_beta2=0.99,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Rows(examples),
        data_collator=pad,
    )
    trained = trainer.train()
    assert result.train_loss == pytest.approx(trained.training_loss, rel=1e-5)
    state = get_state(theirs, GLOBAL)
    for key, tensor in get_state(ours, GLOBAL).items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=2e-5)
        assert not torch.equal(tensor, start[key])


@pytest.mark.parametrize(("free", "expected"), [(2**40, False), (2**10, True)])
def test_checkpointing_is_chosen_by_the_memory_that_is_free(model, monkeypatch, free, expected):
    from fedlora_app.training import within_memory as training

    monkeypatch.setattr(training, "read_free_memory", lambda device: free)
    phase, examples = Phase(BOTH, (LOCAL,), "local"), build_examples(LENGTHS)
    for wanted in ("auto", True, False):
        config = build_tiny_config(training={"gradient_checkpointing": wanted})
        settled = settle_checkpointing(config, model, phase, examples).gradient_checkpointing
        assert settled is (expected if wanted == "auto" else wanted)


def train(model, examples, **settings):
    return train_phase(
        model,
        examples,
        TrainingConfig(
            batch_size=1,
            gradient_accumulation_steps=4,
            max_seq_length=75,
            learning_rate=1e-2,
            **settings,
        ),
        active=BOTH,
        trainable=(LOCAL,),
        num_steps=2,
        run_span=(0.0, 1.0),
        weight_decays={LOCAL: 0.0},
        seed=1,
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_a_phase_that_fails_half_way_leaves_nothing_behind(model, monkeypatch, error):
    """An error at the second micro-batch, or a loss that is not finite: no gradient stays."""
    from fedlora_app.training import phase as training

    start, examples = get_state(model, LOCAL), build_examples(LENGTHS)
    train(model, examples)
    expected = get_state(model, LOCAL)
    set_state(model, LOCAL, start)
    original, calls = training.compute_losses, itertools.count()

    def fail(*arguments):
        losses, divergences = original(*arguments)
        if next(calls) == 1:
            if error is not None:
                raise error
            losses = losses * torch.nan
        return losses, divergences

    with monkeypatch.context() as patch, pytest.raises((TrainingError, torch.OutOfMemoryError)):
        patch.setattr(training, "compute_losses", fail)
        train(model, examples)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    set_state(model, LOCAL, start)
    train(model, examples)
    state = get_state(model, LOCAL)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_the_check_of_packing_moves_no_random_number(adapters_config):
    """With dropout: the first phase of a process is the same as one after others."""
    adapters = adapters_config.model_dump(by_alias=True) | {"local": {"rank": 2, "dropout": 0.2}}
    model = fill_adapters(
        attach_adapters(build_tiny_model(256), AdaptersConfig.model_validate(adapters))
    )
    start, states = get_state(model, LOCAL), []
    for _ in range(2):
        set_state(model, LOCAL, start)
        train(model, build_examples(LENGTHS))
        states.append(get_state(model, LOCAL))
    assert all(torch.equal(states[0][key], states[1][key]) for key in start)


def test_penalties_do_not_depend_on_the_packs(model):
    examples = [replace(e, is_replayed=i % 2 == 0) for i, e in enumerate(build_examples(LENGTHS))]
    start, outcomes = get_state(model, LOCAL), []
    for packs in (True, False):
        set_state(model, LOCAL, start)
        settings = {"local_kl_weight": 1.0, "local_orthogonality": 1.0, "packing": packs}
        outcomes.append(train(model, examples, **settings).penalty)
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4) and outcomes[0] > 0


def test_attention_that_packing_cannot_give_is_refused():
    settings = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = Gemma2ForCausalLM(Gemma2Config(**settings, **layers)).eval()
    with (
        pytest.raises(PackingError, match="asks for a bound on its scores.*packing: false"),
        packed_attention(base),
    ):
        pass


def test_the_plan_counts_chunks_of_logits_as_the_loss_makes_them():
    assert CHUNK_ROWS == losses_module.LOGIT_ROWS


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attention": "flash_attention_2"}, "flash_attention_2 needs a GPU"),
        ({"liger_kernels": True}, "liger_kernels: true needs a GPU"),
        ({"compile": True}, "needs a C\\+\\+ compiler"),
    ],
)
def test_a_missing_kernel_is_said_before_training(federation, monkeypatch, setting, message):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    config = federation.config
    model = config.model.model_copy(update={"dtype": "auto"})
    config = config.model_copy(update={"model": model})
    training = config.training.model_copy(update=setting)
    with pytest.raises(MessageError, match=message):
        federation.run(config=config.model_copy(update={"training": training}))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    settings = TrainingConfig(attention="flash_attention_2", liger_kernels=True, compile=True)
    found = kernels.find_missing_kernels(settings)
    assert [line.rpartition("pip install ")[2] for line in found] == ["flash-attn", "liger-kernel"]
    assert kernels.find_missing_kernels(TrainingConfig()) == []


@pytest.mark.minutes
@pytest.mark.parametrize(
    ("backend", "num_layers", "checkpointing"),
    [("aot_eager", 10, True), ("inductor", 2, False)],
)
def test_compiled_layers_train_as_plain_ones_and_are_compiled_once(
    tokenizer, adapters_config, monkeypatch, backend, num_layers, checkpointing
):
    """Both kinds of phases, and more layers than torch.compile makes graphs of one function."""
    from torch._dynamo import config as dynamo
    from torch._dynamo.utils import counters

    base = build_tiny_model(len(tokenizer), num_hidden_layers=num_layers)
    model = attach_adapters(base, adapters_config)
    start = {name: build_initial_state(model, name, 1) for name in BOTH}
    settings = {"max_seq_length": 128, "gradient_checkpointing": checkpointing}
    outcomes, graphs = [], []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(fail_on_recompile_limit_hit=True):
        for compiles in (False, True, True):
            for name, state in start.items():
                set_state(model, name, state)
            losses = [
                train_phase(
                    model,
                    build_examples(LENGTHS),
                    TrainingConfig(compile=compiles, **settings),
                    active=active,
                    trainable=trainable,
                    num_steps=2,
                    run_span=(0.0, 1.0),
                    weight_decays=dict.fromkeys(BOTH, 0.0),
                    seed=1,
                ).train_loss
                for active, trainable in (((GLOBAL,), (GLOBAL,)), (BOTH, (LOCAL,)))
            ]
            outcomes.append(losses)
            graphs.append(counters["stats"]["unique_graphs"])
    assert outcomes[1] == outcomes[2] == pytest.approx(outcomes[0], rel=1e-5)
    assert 0 == graphs[0] < graphs[1] == graphs[2]
    assert not any("forward" in layer.__dict__ for layer in base.model.layers)
