"""Server optimizers against the papers' equations, written out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import build_tiny_config
from flwr.supercore.task_identity import TaskIdentity
from random_states import SHAPES, draw_state

from fedlora_app.federation.server_optimizer import ServerOptimizer

BETA_1, BETA_2, TAU = 0.9, 0.99, 1e-3
A, B = SHAPES

draw = partial(draw_state, shapes=SHAPES, scale=1.0)


@pytest.fixture(autouse=True)
def outside_of_a_run(monkeypatch):
    """As in ``fedlora forget``: no task of Flower's is there to make messages for."""
    monkeypatch.setattr(TaskIdentity, "_run_id", None)


def build(name: str, **settings) -> ServerOptimizer:
    settings = {"server_optimizer": name, **settings}
    return ServerOptimizer(build_tiny_config(federated=settings).federated)


def run(optimizer, state, updates):
    for update in updates:
        state = optimizer.step(state, {key: state[key] + update[key] for key in state})
    return state


def expect(name: str, state, updates, rate: float):
    """Reddi et al. 2021, algorithm 2; Hsu et al. 2019; Adam's bias as Kingma and Ba correct it."""
    x = {key: tensor.double() for key, tensor in state.items()}
    m, v = ({key: torch.zeros_like(t) for key, t in x.items()} for _ in range(2))
    for t, update in enumerate(updates, start=1):
        for key in x:
            d = (x[key] + update[key]).float().double() - x[key].float().double()
            if name == "momentum":
                m[key] = BETA_1 * m[key] + d
                x[key] = x[key] + rate * m[key]
                continue
            m[key] = (0 if name == "adagrad" else BETA_1) * m[key]
            m[key] = m[key] + (1 if name == "adagrad" else 1 - BETA_1) * d
            if name == "adagrad":
                v[key] = v[key] + d**2
            elif name == "yogi":
                v[key] = v[key] - (1 - BETA_2) * d**2 * torch.sign(v[key] - d**2)
            else:
                v[key] = BETA_2 * v[key] + (1 - BETA_2) * d**2
            corrected = (1 - BETA_2**t) ** 0.5 / (1 - BETA_1**t) if name == "adam" else 1.0
            x[key] = x[key] + rate * corrected * m[key] / (v[key].sqrt() + TAU)
    return x


@pytest.mark.parametrize(
    ("name", "rate"), [("momentum", 0.7), ("adam", 0.01), ("yogi", 0.02), ("adagrad", 0.03)]
)
class TestEveryOptimizer:
    def test_it_is_the_paper_s(self, name, rate):
        state, updates = draw(0), [draw(seed) for seed in (1, 2, 3)]
        found = run(build(name, server_learning_rate=rate), state, updates)
        expected = expect(name, state, updates, rate)
        for key in state:
            torch.testing.assert_close(found[key].double(), expected[key], rtol=0, atol=1e-6)
            assert found[key].dtype == torch.float32

    def test_what_it_remembers_has_it_go_on(self, name, rate):
        one, state = build(name), draw(0)
        state = run(one, state, [draw(1), draw(2)])
        other = build(name)
        other.recall({key: tensor.clone() for key, tensor in one.memory.items()})
        results = [run(optimizer, state, [draw(3)]) for optimizer in (one, other)]
        assert all(torch.equal(*(result[key] for result in results)) for key in state)

    def test_a_factor_that_does_not_travel_stays_with_its_moments(self, name, rate):
        """As in rule alternate: B moves in the first round, A in the second."""
        both, state = build(name, server_learning_rate=rate), draw(0)
        for key, seed in ((B, 1), (A, 2)):
            mean = state | {key: state[key] + draw(seed)[key]}
            moved = both.step(state, mean)
            still = A if key == B else B
            assert torch.equal(moved[still], state[still])
            expected = expect(name, {key: state[key]}, [{key: draw(seed)[key]}], rate)
            torch.testing.assert_close(moved[key].double(), expected[key], rtol=0, atol=1e-6)
            state = moved


def test_without_one_the_mean_is_taken_as_it_is_or_scaled():
    state, update = draw(0), draw(1)
    mean = {key: state[key] + update[key] for key in state}
    plain = build("none")
    assert plain.step(state, mean) is mean and plain.memory == {}
    halved = build("none", server_learning_rate=0.5).step(state, mean)
    for key in state:
        torch.testing.assert_close(halved[key], state[key] + update[key] / 2, rtol=0, atol=1e-6)
