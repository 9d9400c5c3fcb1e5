"""The kept share means the same whatever the learning rate and the number of steps."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, build_tiny_config

from fedlora_app.client import Client
from fedlora_app.config.loading import load_config
from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, ConfigError
from fedlora_app.data.tokens import Example
from fedlora_app.federation.messages import Kept
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    build_initial_state,
    scaled_local,
)
from fedlora_app.training.decay import (
    choose_decays,
    compute_kept_share,
    describe_decay,
    solve_decay,
)
from fedlora_app.training.optimizer import fresh_optimizer
from fedlora_app.training.phase import train_phase
from fedlora_app.training.schedule import learning_rates

LARGE = (
    "training.learning_rate=2e-4 training.warmup_ratio=0.1 training.final_learning_rate_ratio=0.1"
)
SHAPES = {
    "demo": ("demo.yaml", "", 20),
    "SmolLM2": ("smollm2-135m-cpu.yaml", "", 20),
    # 2 passes over as many records, 24 a step, as conf/qwen2.5-7b-4090.yaml has it
    "25,000 + 25,000 records": ("demo.yaml", f"{LARGE} federated.num_rounds=2", 4168),
}
DECAY = "training.local_kept_share=null training.local_weight_decay=10"


def load(kind: str, overrides: str = ""):
    name, changes, num_steps = SHAPES[kind]
    return load_config(ROOT / "conf" / name, f"{changes} {overrides}"), num_steps


def norm_of(model) -> float:
    weights = [p.detach().flatten() for p in adapter_parameters(model, LOCAL)]
    return torch.cat(weights).double().norm().item()


@pytest.mark.parametrize("kind", SHAPES)
def test_the_same_share_is_left_in_runs_of_every_shape(adapted, kind):
    """Of a real adapter by the real optimizer, with gradients of zero."""
    config, num_steps = load(
        kind, "training.local_kept_share=0.52 training.local_weight_decay=null"
    )
    training, num_rounds = config.training, config.federated.num_rounds
    decays = choose_decays(config, plan_round(config, 1).personalise, num_steps)
    before = norm_of(adapted)
    rates = learning_rates(training, num_steps, num_rounds).reshape(num_rounds, num_steps)
    for rates_of_round in rates:
        activate(adapted, (LOCAL,), (LOCAL,))
        with fresh_optimizer(adapted, training, {LOCAL: decays[LOCAL]}) as optimizer:
            for parameter in adapter_parameters(adapted, LOCAL):
                parameter.grad = torch.zeros_like(parameter)
            for rate in rates_of_round:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
    left = (norm_of(adapted) / before) ** (1 / num_rounds)
    assert left == pytest.approx(0.52, rel=1e-3)


def test_a_phase_of_training_leaves_the_share_that_was_asked_for(adapted):
    """An adapter that is scaled to nothing has no effect on the loss, so decay alone moves it."""
    changes = {"local_kept_share": 0.3, "learning_rate": 3e-3, "batch_size": 1}
    config = build_tiny_config(training=changes, federated={"num_rounds": 3})
    phase, num_steps = plan_round(config, 1).personalise, 4
    shares, examples = [], [Example([5, 6, 7, 8], 2)]
    for server_round in (1, 2, 3):
        before = norm_of(adapted)
        with scaled_local(adapted, 0.0):
            train_phase(
                adapted,
                examples,
                config.training.model_copy(update={"gradient_checkpointing": False}),
                active=phase.active,
                trainable=phase.trainable,
                num_steps=num_steps,
                run_span=((server_round - 1) / 3, server_round / 3),
                weight_decays=choose_decays(config, phase, num_steps),
                seed=server_round,
            )
        shares.append(norm_of(adapted) / before)
    assert torch.tensor(shares).log().mean().exp().item() == pytest.approx(0.3, rel=1e-4)
    assert shares[1] < shares[2], "the learning rate falls, and takes less with it"


@pytest.mark.parametrize(
    ("kind", "left", "in_all", "warning"),
    [
        ("demo", "52 %", "0.52 %", None),
        ("SmolLM2", "90 %", "80 %", None),
        ("25,000 + 25,000 records", "1.06 %", "0.01 %", "erases the local adapter"),
    ],
)
def test_an_older_configuration_is_told_what_its_decay_amounts_to(kind, left, in_all, warning):
    config, num_steps = load(kind, DECAY)
    assert choose_decays(config, plan_round(config, 1).personalise, num_steps)[LOCAL] == 10
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps
    num_local = num_steps * per_step // config.training.local_epochs
    said = list(describe_decay(config, {"ann": (0, num_local), "bob": (0, num_local)}))
    assert f"weight decay 10 alone leaves {left} over a phase of {num_steps:,} steps" in said[0]
    assert f"and {in_all} over the run's {config.federated.num_rounds}." in said[0]
    assert len(said) == 1 if warning is None else f"local_weight_decay 10 {warning}." in said[1]


def test_a_decay_that_protects_nothing_is_warned_of_and_none_at_all_is_not():
    config, _ = load("demo", "training.local_kept_share=null training.local_weight_decay=0.1")
    said = list(describe_decay(config, {"ann": (192, 120), "bob": (400, 120)}))
    assert "leaves 99 % over a phase of 20 to 33 steps" in said[0]
    assert "protects next to nothing" in said[1]
    for changes in ("training.local_weight_decay=0", "federated.mode=fedavg", ""):
        config, _ = load("demo", f"training.local_kept_share=null {changes}")
        assert not list(describe_decay(config, {"ann": (192, 120)}))


def test_a_share_and_its_decay_are_each_others_inverse():
    config, _ = load("demo")
    for share in (1.0, 0.9999, 0.5, 1e-3, 1e-12):
        decay = solve_decay(share, config.training, 20, 8)
        assert compute_kept_share(decay, config.training, 20, 8) == pytest.approx(share, rel=1e-6)
    assert solve_decay(1.0, config.training, 20, 8) == 0
    # One step cannot take less than nothing, nor a run more than all.
    assert compute_kept_share(300.0, config.training, 20, 8) == 0
    out_of_reach = solve_decay(1e-30, config.training, 1, 40)
    assert compute_kept_share(out_of_reach, config.training, 1, 40) < 0.2


def test_an_adapter_that_learns_alone_has_nothing_to_spare():
    config = build_tiny_config(training={"local_kept_share": 0.5, "global_weight_decay": 0.25})
    alone = Phase((LOCAL,), (LOCAL,), "mixed")
    assert choose_decays(config, alone, 4) == {GLOBAL: 0.25, LOCAL: 0.25}


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "all"])
def test_a_share_that_is_none_is_a_fault(share):
    with pytest.raises(ConfigError, match=r"1 fault:\n  training.local_kept_share: input should"):
        build_tiny_config(training={"local_kept_share": share})


def test_a_share_and_a_decay_are_one_fault_and_read_back_as_they_were():
    both = {"local_kept_share": 0.5, "local_weight_decay": 10.0}
    with pytest.raises(ConfigError, match="training.local_weight_decay is set too") as caught:
        build_tiny_config(training=both)
    assert "1 fault" in str(caught.value)
    for key, value in both.items():
        config = build_tiny_config(training={key: value})
        assert build_tiny_config(training=config.dump()["training"]) == config


@pytest.mark.minutes
def test_what_a_decay_erases_with_much_data_a_share_protects(tmp_path):
    """The demo with every universal record twelve times over, at one client."""
    records = json.loads((ROOT / "data/demo/northgate/universal_train.json").read_text())
    many = tmp_path / "many.json"
    many.write_text(json.dumps(records * 12))
    overrides = f"federated.clients.0.universal_train={many} federated.num_rounds=2 "
    overrides += "training.global_epochs=1 evaluation.interval=2 data.on_lint_error=warn "
    found, states = {}, []
    for kind in ("training.local_kept_share=0.52", DECAY):
        config = load_config(ROOT / "conf/demo.yaml", overrides + kind)
        client = Client(config, "northgate", tmp_path / kind[-5:] / "run", ROOT)
        if not states:
            states = train_alone(client)
        for server_round, state in enumerate(states, start=1):
            kept = {LOCAL: Kept(server_round - 1)} if server_round > 1 else {}
            metrics, _ = client.personalise(server_round, state, kept)
        names = ("local", "conflict")
        found[kind] = [metrics[f"global+local/{name}/exact_match"] for name in names]
        print(kind, found[kind], metrics["train_local/num_steps"])
    kept, decayed = found.values()
    assert min(kept) >= 0.95
    assert max(decayed) <= 0.8


def train_alone(client: Client):
    """Return the global adapter after every round of a federation of one."""
    model = client._load_model()[1]
    state, states = build_initial_state(model, GLOBAL, 1), []
    for server_round in range(1, client.config.federated.num_rounds + 1):
        update, _, _ = client.train(server_round, state, {})
        state = {key: state[key] + update[key] for key in state}
        states.append(state)
    return states
