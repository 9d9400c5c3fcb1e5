"""Epsilon against the closed form and the library called directly, and what a run's plan makes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import ALIKE, build_tiny_config
from dp_accounting import dp_event, rdp

from fedlora_app.config.loading import change_config
from fedlora_app.config.participation import training_clients
from fedlora_app.config.schema import ConfigError
from fedlora_app.federation.accountant import (
    Sampling,
    compute_epsilon,
    count_private_steps,
    count_rounds,
    find_noise_multiplier,
    most_rounds,
    noise_multiplier_for,
    record_epsilon,
    sampling_of,
)

DELTA = 1e-5


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 1), (1.0, 20), (3.0, 100), (0.5, 5)])
def test_it_is_the_closed_form_of_the_gaussian_mechanism(multiplier, releases):
    """Which is T a / (2 z^2) + log(1/delta) / (a - 1); the library's conversion is tighter."""
    orders = np.linspace(1.01, 200, 20_000)
    plain = releases * orders / (2 * multiplier**2) + math.log(1 / DELTA) / (orders - 1)
    epsilon = compute_epsilon(DELTA, [(multiplier, releases)])
    assert 0.75 * plain.min() < epsilon < plain.min() * 1.001


def test_it_is_the_library_called_directly():
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.GaussianDpEvent(1.3), 7)
    accountant.compose(dp_event.GaussianDpEvent(2.0), 3)
    direct = accountant.get_epsilon(DELTA)
    assert compute_epsilon(DELTA, [(1.3, 7), (2.0, 3)]) == pytest.approx(direct, rel=1e-12)
    sampled = rdp.RdpAccountant()
    sampled.compose(dp_event.PoissonSampledDpEvent(0.02, dp_event.GaussianDpEvent(1.0)), 300)
    ours = compute_epsilon(DELTA, [(1.0, 300)], Sampling(10, 500))
    assert ours == pytest.approx(sampled.get_epsilon(DELTA), rel=1e-12)


def test_more_noise_spends_less_and_more_releases_more():
    by_noise = [compute_epsilon(DELTA, [(z, 10)]) for z in (0.5, 1.0, 2.0, 4.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    by_rounds = [compute_epsilon(DELTA, [(1.0, n)]) for n in (0, 1, 10, 100)]
    assert by_rounds == sorted(by_rounds) and by_rounds[0] == 0
    by_rate = [compute_epsilon(DELTA, [(1.0, 100)], Sampling(n, 100)) for n in (1, 10, 100)]
    assert by_rate == sorted(by_rate)
    assert by_rate[-1] == pytest.approx(compute_epsilon(DELTA, [(1.0, 100)]))  # nobody is left out


@pytest.mark.parametrize(
    ("epsilon", "sampling"), [(0.5, None), (8.0, None), (0.5, Sampling(24, 1000))]
)
def test_the_noise_for_an_epsilon_keeps_it_and_is_not_much_more(epsilon, sampling):
    multiplier = find_noise_multiplier(epsilon, DELTA, 50, sampling)
    assert compute_epsilon(DELTA, [(multiplier, 50)], sampling) <= epsilon
    assert compute_epsilon(DELTA, [(multiplier / 1.01, 50)], sampling) > epsilon


def test_an_epsilon_that_no_noise_keeps_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: no noise keeps 5 releases within"):
        find_noise_multiplier(1e-4, 1e-15, 5)


def private(overrides, **federated):
    clients = ("ann", "bob", "cy")
    plain = build_tiny_config(clients, federated=federated, adapters=ALIKE)
    return change_config(plain, f"privacy.clip_norm=1 privacy.delta={DELTA} {overrides}")


def test_a_client_counts_in_the_rounds_in_which_it_trains():
    config = private(
        "privacy.unit=client privacy.noise=client privacy.epsilon=4 "
        "federated.clients.2.last_round=3",
        num_rounds=9,
        fraction=0.5,
    )
    of = {client: count_rounds(config, client) for client in config.client_ids}
    assert of == {
        client: sum(client in training_clients(config, n) for n in range(1, 10)) for client in of
    }
    assert most_rounds(config) == max(of.values()) < 9
    assert most_rounds(config, 1) == 1
    # Nothing is gained by drawing them, since everybody knows who is drawn.
    multiplier = noise_multiplier_for(config)
    assert multiplier == find_noise_multiplier(4, DELTA, most_rounds(config))
    assert compute_epsilon(DELTA, [(multiplier, most_rounds(config))]) <= 4


@pytest.mark.parametrize(
    ("mode", "schedule", "steps", "records"),
    [
        ("dual", "phased", 2 * 10, 20),  # a round's steps of 2 examples, in 2 rounds
        ("dual", "mixed", 2 * 10, 26),
        ("finetuned", "phased", 2 * 10, 26),
        ("fedavg", "phased", 2 * (10 + 13), 26),  # with those of the local phase and its replay
    ],
)
def test_a_records_chance_and_steps_are_those_of_the_clients_own_phase(
    mode, schedule, steps, records
):
    config = private(
        f"privacy.unit=record privacy.noise_multiplier=2 training.schedule={schedule}", mode=mode
    )
    counts = (20, 6)
    assert sampling_of(config, counts) == Sampling(2, records)
    assert count_private_steps(config, "ann", counts) == steps
    spent = compute_epsilon(DELTA, [(2.0, steps // 2)], Sampling(2, records))
    assert record_epsilon(config, "ann", counts, 1) == pytest.approx(spent)


def test_each_client_has_the_noise_that_its_own_number_of_records_needs():
    config = private("privacy.unit=record privacy.epsilon=3")
    few, many = (noise_multiplier_for(config, "ann", counts) for counts in ((2, 3), (100, 3)))
    assert few > many
    for counts in ((2, 3), (100, 3)):
        assert 2.9 < record_epsilon(config, "ann", counts) <= 3
    assert sampling_of(config, (1, 0)) == Sampling(1, 1)  # a step cannot take more than there are
