from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora_app.config.schema import GLOBAL, LOCAL, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_adapters,
    compute_overlap,
    get_state,
    set_state,
)
from fedlora_app.training import losses as losses_module
from fedlora_app.training import optimizer
from fedlora_app.training.batches import count_steps, step_batches
from fedlora_app.training.losses import answer_log_likelihoods
from fedlora_app.training.phase import (
    TrainingError,
    schedule_factor,
    train_phase,
)

CPU = torch.device("cpu")


def build_examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    lengths = [(rng.randint(3, 9), rng.randint(1, 7)) for _ in range(count)]
    return [
        Example([rng.randrange(3, 200) for _ in range(prompt + answer)], prompt)
        for prompt, answer in lengths
    ]


def train(model, examples, **changes):
    settings = TrainingConfig(
        learning_rate=1e-2, batch_size=4, gradient_accumulation_steps=1, warmup_ratio=0.0
    ).model_copy(update=changes.pop("settings", {}))
    arguments = {
        "active": (GLOBAL, LOCAL),
        "trainable": (GLOBAL, LOCAL),
        "num_steps": 3,
        "run_span": (0.0, 1.0),
        "weight_decays": {GLOBAL: 0.0, LOCAL: 0.0},
        "seed": 1,
    }
    return train_phase(model, examples, settings, **(arguments | changes))


def changed(before, after) -> bool:
    return any(not torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(params=["qwen2", "llama"])
def architecture(request, adapted, adapters_config):
    """The tiny Qwen2, and a Llama of its size (SmolLM2 is one)."""
    if request.param == "qwen2":
        return adapted
    torch.manual_seed(3)
    settings = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    base = LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4)).eval()
    return attach_adapters(base, adapters_config)


def test_the_loss_is_that_of_transformers_on_answer_tokens(architecture):
    adapted = architecture
    activate(adapted, (GLOBAL, LOCAL))
    for example in build_examples(5):
        labels = torch.tensor([example.input_ids])
        labels[0, : example.answer_start] = -100
        with torch.no_grad():
            expected = adapted(torch.tensor([example.input_ids]), labels=labels).loss
        ours = -answer_log_likelihoods(adapted, [example])[0].mean()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_change_no_likelihood(adapted):
    activate(adapted, (GLOBAL, LOCAL))
    examples = build_examples(6)
    with torch.no_grad():
        together = answer_log_likelihoods(adapted, examples)
        for example, expected in zip(examples, together, strict=True):
            alone = answer_log_likelihoods(adapted, [example])[0]
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


def test_the_loss_in_chunks_equals_the_whole(adapted, monkeypatch):
    activate(adapted, (GLOBAL, LOCAL), (GLOBAL, LOCAL))
    results = []
    for rows in (1000, 5):
        monkeypatch.setattr(losses_module, "LOGIT_ROWS", rows)
        adapted.zero_grad()
        loss = -torch.cat(answer_log_likelihoods(adapted, build_examples(6))).mean()
        loss.backward()
        gradients = [p.grad.clone() for p in adapter_parameters(adapted, GLOBAL)]
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainable", [(GLOBAL,), (LOCAL,), (GLOBAL, LOCAL)])
def test_a_phase_moves_exactly_its_adapters(adapted, trainable):
    before = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}
    base = {k: v.clone() for k, v in adapted.state_dict().items() if "lora" not in k}
    train(adapted, build_examples(8), trainable=trainable)
    for name in (GLOBAL, LOCAL):
        assert changed(before[name], get_state(adapted, name)) == (name in trainable)
    after = adapted.state_dict()
    assert all(torch.equal(base[key], after[key]) for key in base)


def test_accumulation_weighs_tokens_and_equals_one_large_batch(adapted):
    start = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}
    results = []
    for batch_size, accumulation in ((6, 1), (2, 3), (1, 6)):
        for name, state in start.items():
            set_state(adapted, name, state)
        settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        result = train(adapted, build_examples(6), num_steps=1, settings=settings)
        results.append((result.train_loss, get_state(adapted, GLOBAL)))
    for loss, state in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][1][key], rtol=1e-3, atol=2e-5)


def test_training_lowers_the_loss_and_repeats_to_the_bit(adapted):
    start = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}
    outcomes = []
    for _ in range(2):
        for name, state in start.items():
            set_state(adapted, name, state)
        torch.rand(7)  # the global generator's position must not matter
        result = train(adapted, build_examples(8), num_steps=30)
        outcomes.append((result.final_train_loss, get_state(adapted, LOCAL)))
    assert outcomes[0][0] == outcomes[1][0] < 0.7 * result.train_loss
    assert not changed(outcomes[0][1], outcomes[1][1])


def test_weight_decay_is_the_adapters_own(adapted):
    norms = {}
    start = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}
    for decay in (0.0, 20.0):
        for name, state in start.items():
            set_state(adapted, name, state)
        train(adapted, build_examples(8), weight_decays={GLOBAL: 0.0, LOCAL: decay}, num_steps=10)
        norms[decay] = {
            name: sum(t.norm().item() for t in get_state(adapted, name).values())
            for name in (GLOBAL, LOCAL)
        }
    assert norms[20.0][LOCAL] < 0.5 * norms[0.0][LOCAL]
    assert norms[20.0][GLOBAL] > 0.9 * norms[0.0][GLOBAL]


def test_gradient_checkpointing_changes_no_weight(adapted):
    start = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}
    states = []
    for checkpointing in (False, True, False):
        for name, state in start.items():
            set_state(adapted, name, state)
        train(adapted, build_examples(8), settings={"gradient_checkpointing": checkpointing})
        states.append(get_state(adapted, GLOBAL))
    assert not changed(states[0], states[2])
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_with_advice(adapted):
    adapter_parameters(adapted, GLOBAL)[0].data.fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"at step \d of 3.*learning_rate"):
        train(adapted, build_examples(4))


def test_steps_count_the_last_incomplete_batch():
    settings = TrainingConfig(batch_size=4, gradient_accumulation_steps=2)
    assert [count_steps(n, 1, settings) for n in (1, 8, 9)] == [1, 1, 2]
    assert count_steps(9, 3, settings) == 6


def test_every_epoch_sees_every_example_once(adapted):
    settings = TrainingConfig(batch_size=2, gradient_accumulation_steps=1)
    examples = build_examples(5)
    batches = list(itertools.islice(step_batches(examples, settings, 3), 6))
    for epoch in (batches[:3], batches[3:]):
        seen = [tuple(example.input_ids) for batch in epoch for example in batch]
        assert sorted(seen) == sorted(tuple(example.input_ids) for example in examples)
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_schedule_rises_and_falls_over_the_whole_run(scheduler):
    settings = TrainingConfig(
        lr_scheduler=scheduler, warmup_ratio=0.1, final_learning_rate_ratio=0.2
    )
    values = [schedule_factor(step / 100, settings) for step in range(101)]
    assert values[0] < 0.02 and max(values) == values[10] == pytest.approx(1.0)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == pytest.approx(0.2)
    tiny = settings.model_copy(update={"warmup_ratio": 0.0005})
    assert schedule_factor(0.0, tiny) == 1.0
    constant = settings.model_copy(update={"lr_scheduler": "constant"})
    assert schedule_factor(0.9, constant) == 1.0


def mark_replayed(examples: list[Example], count: int) -> list[Example]:
    return [replace(ex, is_replayed=index < count) for index, ex in enumerate(examples)]


def measure_divergence(model, examples) -> float:
    """KL(global alone || pair) per answer token, by transformers' own logits."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        span = slice(example.answer_start - 1, len(example.input_ids) - 1)
        with torch.no_grad():
            activate(model, (GLOBAL,))
            reference = model(ids).logits[0, span].log_softmax(-1)
            activate(model, (GLOBAL, LOCAL))
            pair = model(ids).logits[0, span].log_softmax(-1)
        total += (reference.exp() * (reference - pair)).sum().item()
        count += reference.shape[0]
    return total / count


def test_the_kl_penalty_is_the_divergence_on_replayed_records(adapted):
    examples = mark_replayed(build_examples(6), 3)
    expected = measure_divergence(adapted, examples[:3])
    settings = {"local_kl_weight": 2.0, "batch_size": 6, "gradient_accumulation_steps": 1}
    result = train(adapted, examples, trainable=(LOCAL,), num_steps=1, settings=settings)
    assert result.penalty == pytest.approx(2.0 * expected, rel=1e-4)


def test_public_records_are_held_and_not_learnt(adapted):
    """A step on both is the step on the own records, where the pair says what global does."""
    state = get_state(adapted, LOCAL)
    silent = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in state.items()}
    examples = build_examples(6)
    mixed = [replace(e, is_public=index < 3) for index, e in enumerate(examples)]
    found = {}
    for name, trained in (("mixed", mixed), ("own", examples[3:]), ("all", examples)):
        set_state(adapted, LOCAL, silent)
        settings = {"local_kl_weight": 2.0, "batch_size": 6, "gradient_accumulation_steps": 1}
        result = train(adapted, trained, trainable=(LOCAL,), num_steps=1, settings=settings)
        found[name] = (result.train_loss, result.num_answer_tokens, get_state(adapted, LOCAL))
    assert found["mixed"][:2] == pytest.approx(found["own"][:2], rel=1e-5)
    for key, value in found["mixed"][2].items():
        torch.testing.assert_close(value, found["own"][2][key])
    assert any(not torch.equal(v, found["all"][2][k]) for k, v in found["mixed"][2].items())


def test_the_kl_penalty_is_the_divergence_on_public_records(adapted):
    examples = [replace(e, is_public=index < 3) for index, e in enumerate(build_examples(6))]
    expected = measure_divergence(adapted, examples[:3])
    settings = {"local_kl_weight": 2.0, "batch_size": 6, "gradient_accumulation_steps": 1}
    result = train(adapted, examples, trainable=(LOCAL,), num_steps=1, settings=settings)
    assert result.penalty == pytest.approx(2.0 * expected, rel=1e-4)


def test_a_batch_of_public_records_alone_does_not_count_as_a_loss_of_0(adapted):
    own = build_examples(4)
    public = [replace(e, is_public=True) for e in own]
    settings = {"local_kl_weight": 1.0, "batch_size": 1, "gradient_accumulation_steps": 1}
    settings |= {"learning_rate": 1e-12}
    losses = [
        train(adapted, trained, trainable=(LOCAL,), num_steps=len(trained), settings=settings)
        for trained in (own, own + public)
    ]
    assert losses[0].train_loss == pytest.approx(losses[1].train_loss, rel=1e-4)
    assert losses[1].final_train_loss > 0


def test_the_kl_penalty_keeps_the_pair_near_global(adapted):
    start = get_state(adapted, LOCAL)
    examples = mark_replayed(build_examples(8), 4)
    divergences = {}
    for weight in (0.0, 10.0):
        set_state(adapted, LOCAL, start)
        settings = {"local_kl_weight": weight}
        train(adapted, examples, trainable=(LOCAL,), num_steps=30, settings=settings)
        divergences[weight] = measure_divergence(adapted, examples[:4])
    assert divergences[10.0] < 0.5 * divergences[0.0]


def test_the_orthogonality_penalty_turns_local_away_from_global(adapted):
    for module in adapted.modules():
        if hasattr(module, "lora_A") and LOCAL in module.lora_A:
            weights = module.lora_A[GLOBAL].weight.data
            module.lora_A[LOCAL].weight.data = weights[:2].clone()
    before = compute_overlap(adapted).item()
    settings = {"local_orthogonality": 10.0}
    result = train(adapted, build_examples(8), trainable=(LOCAL,), num_steps=40, settings=settings)
    assert result.penalty > 0
    assert compute_overlap(adapted).item() < 0.3 * before


def test_penalties_touch_the_local_phase_only(adapted):
    settings = {"local_kl_weight": 1.0, "local_orthogonality": 1.0}
    examples = mark_replayed(build_examples(4), 4)
    assert train(adapted, examples, settings=settings).penalty == 0
    alone = train(adapted, examples, active=(LOCAL,), trainable=(LOCAL,), settings=settings)
    assert alone.penalty == 0


def test_the_peak_of_memory_covers_what_was_held_at_once(adapted):
    held = torch.ones(2**24)  # 64 MiB, so that the process cannot have taken less
    result = train(adapted, build_examples(4))
    assert held.nbytes < result.peak_memory_bytes < 2**40


def test_pages_of_one_phase_serve_the_next(adapted, monkeypatch):
    """bitsandbytes takes them from CUDA and gives none back; what they held is forgotten."""
    from bitsandbytes import functional
    from bitsandbytes.optim import PagedAdamW8bit

    made = []

    def make(self, p, dtype=torch.float32):
        made.append(torch.zeros_like(p, dtype=dtype))
        made[-1].is_paged = True
        return made[-1]

    monkeypatch.setattr(PagedAdamW8bit, "get_state_buffer", make)
    monkeypatch.setattr(functional, "prefetch_tensor", lambda page: None)
    monkeypatch.setattr(functional, "fill", lambda page, value: page.fill_(value))
    optimizer._unused_pages.clear()
    start, outcomes, counts = get_state(adapted, LOCAL), [], []
    for _ in range(3):
        set_state(adapted, LOCAL, start)
        settings = {"optimizer": "paged_adamw_8bit"}
        train(adapted, build_examples(8), trainable=(LOCAL,), settings=settings)
        outcomes.append(get_state(adapted, LOCAL))
        counts.append(len(made))
    assert counts == [2 * len(start)] * 3
    for outcome in outcomes[1:]:
        assert all(torch.equal(outcome[key], outcomes[0][key]) for key in start)
    assert not torch.equal(
        *(torch.cat([t.flatten() for t in s.values()]) for s in (start, outcome))
    )


@pytest.mark.gpu
def test_on_a_gpu_every_phase_has_a_peak_of_its_own(adapted):
    model = adapted.cuda()
    torch.ones(2**28, device="cuda")  # 1 GiB, let go before the phase
    result = train(model, build_examples(4))
    assert 0 < result.peak_memory_bytes < 2**30
