from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_config
from test_phase import build_examples, train

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.model.adapters import adapter_parameters, get_state, set_state
from fedlora_app.training import phase as phase_module
from fedlora_app.training.proximal import ProximalTerm, describe_proximal

UNCLIPPED = {"max_grad_norm": 1e9}


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
    seen = []
    take_step = phase_module._take_step

    def watch(optimizer, max_grad_norm):
        steps.append([(p.detach().clone(), p.grad.clone()) for p in adapter_parameters(*watched)])
        take_step(optimizer, max_grad_norm)

    monkeypatch.setattr(phase_module, "_take_step", watch)
    for name in (GLOBAL, LOCAL):
        watched, found = (adapted, name), []
        for mu in (0.0, 0.7):
            steps = []
            result, _ = train_anew(mu, num_steps=2)
            found.append(steps)
        seen.append(found)
    (plain, held), (plain_local, held_local) = seen
    for (before, gradient), (weights, other) in zip(plain[0], held[0], strict=True):
        assert torch.equal(before, weights) and torch.equal(gradient, other)  # it has not moved yet
    for start, (before, gradient), (weights, other) in zip(
        received, plain[1], held[1], strict=True
    ):
        assert torch.equal(before, weights)
        expected = 0.7 * (weights - start)
        torch.testing.assert_close(other - gradient, expected, rtol=1e-3, atol=1e-6)
    way = sum((w - s).square().sum() for s, (w, _) in zip(received, held[1], strict=True)).item()
    assert result.penalty == pytest.approx((0 + 0.35 * way) / 2, rel=1e-5)
    for (_, gradient), (_, other) in zip(plain_local[1], held_local[1], strict=True):
        assert torch.equal(gradient, other)  # the local adapter is not held


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


@pytest.mark.parametrize(("mode", "is_said"), [("local-only", True), ("dual", False)])
def test_where_no_global_adapter_is_trained_the_setting_is_said_to_be_idle(mode, is_said):
    config = build_tiny_config(training={"proximal_mu": 0.1}, federated={"mode": mode})
    said = list(describe_proximal(config))
    assert bool(said) == is_said
    assert not said or "training.proximal_mu 0.1 has no effect: mode local-only" in said[0]
