from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation
from test_phase import build_examples, train

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.model.adapters import adapter_parameters, get_state, set_state
from fedlora_app.training import phase as phase_module
from fedlora_app.training.proximal import ProximalTerm, without_idle_term


def measure_distance(one, other) -> float:
    return sum((one[key] - other[key]).double().square().sum().item() for key in one) ** 0.5


@pytest.fixture
def train_anew(adapted):
    """Train from the same weights every time; return the result and the global adapter."""
    start = {name: get_state(adapted, name) for name in (GLOBAL, LOCAL)}

    def run(mu: float, **settings):
        for name, state in start.items():
            set_state(adapted, name, state)
        result = train(adapted, build_examples(8), settings={"proximal_mu": mu}, **settings)
        return result, get_state(adapted, GLOBAL)

    return run


def test_the_term_and_its_gradient_are_those_of_autograd():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    received = [parameter.detach().clone() for parameter in parameters]
    term = ProximalTerm(parameters, mu=0.3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    pairs = list(zip(parameters, received, strict=True))
    expected = 0.15 * sum((now - before).square().sum() for now, before in pairs)
    gradients = torch.autograd.grad(expected, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert term.add_gradient() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad - 1, gradient, rtol=1e-5, atol=1e-6)


def test_each_step_s_gradient_has_mu_times_the_way_from_what_was_received(
    adapted, monkeypatch, train_anew
):
    received = [p.detach().clone() for p in adapter_parameters(adapted, GLOBAL)]
    steps = []
    take_step = phase_module._take_step

    def watch(optimizer, max_grad_norm):
        parameters = {name: adapter_parameters(adapted, name) for name in (GLOBAL, LOCAL)}
        steps.append(
            {n: [(p.detach().clone(), p.grad.clone()) for p in ps] for n, ps in parameters.items()}
        )
        take_step(optimizer, max_grad_norm)

    monkeypatch.setattr(phase_module, "_take_step", watch)
    train_anew(0.0, num_steps=2)
    result, _ = train_anew(0.7, num_steps=2)
    for plain, held in zip(steps[:2], steps[2:], strict=True):
        for name in (GLOBAL, LOCAL):
            for (weights, _), (others, _) in zip(plain[name], held[name], strict=True):
                assert torch.equal(weights, others)  # the first gradient is the same: no way yet
        for (_, gradient), (_, other) in zip(plain[LOCAL], held[LOCAL], strict=True):
            assert torch.equal(gradient, other)  # the local adapter is not held
        for start, (weights, gradient), (_, other) in zip(
            received, plain[GLOBAL], held[GLOBAL], strict=True
        ):
            expected = 0.7 * (weights - start)
            torch.testing.assert_close(other - gradient, expected, rtol=1e-3, atol=1e-6)
    ways = [(w - s).square().sum() for s, (w, _) in zip(received, steps[3][GLOBAL], strict=True)]
    assert result.penalty == pytest.approx((0 + 0.35 * sum(ways).item()) / 2, rel=1e-5)
    assert result.penalty > 0


def test_a_large_mu_keeps_the_adapter_near_what_was_received(adapted, train_anew):
    received = get_state(adapted, GLOBAL)
    settings = {"trainable": (GLOBAL,), "active": (GLOBAL,), "num_steps": 30}
    (free, moved), (held, near) = (train_anew(mu, **settings) for mu in (0.0, 100.0))
    assert measure_distance(near, received) < 0.3 * measure_distance(moved, received)
    assert held.penalty > 0 and free.penalty == 0


def test_the_local_phase_is_not_held(adapted, train_anew):
    states = []
    for mu in (0.0, 100.0):
        result, _ = train_anew(mu, trainable=(LOCAL,))
        states.append(get_state(adapted, LOCAL))
        assert result.penalty == 0
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("mode", ["local-only", "centralized", "fedavg", "dual"])
def test_where_nothing_is_averaged_the_term_is_left_out(mode):
    config = build_tiny_config(training={"proximal_mu": 0.1}, federated={"mode": mode})
    is_idle = mode in ("local-only", "centralized")
    assert without_idle_term(config).proximal_mu == (0.0 if is_idle else 0.1)


def test_a_centralized_run_is_not_held_to_its_own_last_round(tiny_project, tmp_path):
    weights = []
    for mu in (0.0, 10.0):
        config = build_tiny_config(
            training={"proximal_mu": mu},
            federated={"mode": "centralized"},
            evaluation={"interval": 0},
        )
        run = Federation(tiny_project, tmp_path / f"{mu}", config).run()
        weights.append((run / "final" / "global" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
