"""Clipping, the server's and the client's noise, and what they tell of two worlds."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build_tiny_config
from random_states import draw_state
from scipy.stats import norm

from fedlora_app.config.loading import change_config
from fedlora_app.federation.accountant import compute_epsilon
from fedlora_app.federation.privacy import (
    MeanProtection,
    bound_cosine,
    clip_update,
    compute_norm,
    protect_update,
)

KEY, OTHER = bytes(32), bytes(range(32))
SHAPES = {"x.lora_A.weight": torch.Size([8, 200]), "x.lora_B.weight": torch.Size([200, 8])}
RECEIVED = draw_state(9, SHAPES)


def configure(noise="server", multiplier=2.0, clip=0.5):
    return change_config(
        build_tiny_config(("ann", "bob", "cy"), federated={"weighting": "equal"}),
        f"privacy.unit=client privacy.noise={noise} privacy.clip_norm={clip} "
        f"privacy.noise_multiplier={multiplier} privacy.delta=1e-5",
    )


def average(protection, updates, server_round=1, received=RECEIVED):
    """Return the noise that a round's mean gets."""
    protection.begin(server_round)
    clipped = {client: protection.clip(update) for client, update in updates.items()}
    for client, update in updates.items():
        protection.note(client, update, clipped[client])
    mean = {
        key: tensor + sum(update[key] for update in clipped.values()) / len(clipped)
        for key, tensor in received.items()
    }
    noisy = protection.add_noise(received, mean)
    return torch.cat([(noisy[key] - mean[key]).flatten() for key in mean])


def draw_updates(*clients, seed=1):
    return {client: draw_state(seed + i, SHAPES) for i, client in enumerate(clients)}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_an_update_is_no_longer_than_the_bound_and_points_where_it_did(scale):
    update = draw_state(1, SHAPES, scale)
    clipped = clip_update(update, 0.5)
    assert compute_norm(clipped) <= 0.5
    if scale == 1e-3:
        assert clipped is update  # to the bit
        return
    assert compute_norm(clipped) == pytest.approx(0.5, rel=1e-6)
    factors = torch.cat([(clipped[key] / update[key]).flatten() for key in update])
    torch.testing.assert_close(factors, factors[0].expand_as(factors), rtol=1e-5, atol=0)


def test_the_servers_noise_has_the_size_that_was_asked_for():
    protection = MeanProtection(configure(), KEY)
    noise = average(protection, draw_updates("ann", "bob", "cy"))
    assert noise.std().item() == pytest.approx(2.0 * 0.5 / 3, rel=0.05)  # of 3,200 numbers
    assert abs(noise.mean().item()) < 0.03
    halves = noise.split(noise.numel() // 2)
    assert [half.std().item() for half in halves] == pytest.approx([1 / 3, 1 / 3], rel=0.07)
    assert abs(torch.corrcoef(torch.stack(halves))[0, 1].item()) < 0.1  # of each tensor its own
    assert protection.figures["clipped_share"] == 1  # they are 0.57 long


def test_noise_comes_again_with_the_same_updates_and_with_nothing_else():
    """Else the difference of two results would be a client's update, bare."""
    updates = draw_updates("ann", "bob", "cy")
    noise = average(MeanProtection(configure(), KEY), updates)
    backwards = dict(reversed(updates.items()))
    again = average(MeanProtection(configure(), KEY), backwards)
    torch.testing.assert_close(again, noise, rtol=0, atol=1e-6)
    others = {
        "another key": average(MeanProtection(configure(), OTHER), updates),
        "another round": average(MeanProtection(configure(), KEY), updates, 2),
        "a client fewer": average(MeanProtection(configure(), KEY), draw_updates("ann", "bob")),
        "another update": average(
            MeanProtection(configure(), KEY), updates | {"ann": draw_state(7, SHAPES)}
        ),
        "more noise": average(MeanProtection(configure(multiplier=4.0), KEY), updates),
    }
    for what, other in others.items():
        assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1].item()) < 0.1, what


def test_what_does_not_travel_stays_to_the_bit():
    protection = MeanProtection(configure(), KEY)
    sent = {key: value for key, value in draw_state(1, SHAPES).items() if "lora_B" in key}
    protection.note("ann", sent, protection.clip(sent))
    noisy = protection.add_noise(RECEIVED, RECEIVED | {"x.lora_B.weight": sent["x.lora_B.weight"]})
    assert noisy["x.lora_A.weight"] is RECEIVED["x.lora_A.weight"]
    assert not torch.equal(noisy["x.lora_B.weight"], sent["x.lora_B.weight"])


def test_without_its_key_the_server_makes_no_mean():
    with pytest.raises(ValueError, match="needs the run's secret key"):
        average(MeanProtection(configure(), None), draw_updates("ann"))


def test_a_clients_noise_has_the_size_that_was_asked_for_and_is_its_own():
    update, other = draw_updates("ann", "bob").values()
    clipped = clip_update(update, 0.5)

    def protect(state, server_round=1, key=KEY):
        return protect_update(state, configure("client"), server_round, lambda: key)

    sent = protect(update)
    noise = torch.cat([(sent[key] - clipped[key]).flatten() for key in sent])
    assert noise.std().item() == pytest.approx(2.0 * 0.5, rel=0.05)
    assert all(torch.equal(sent[key], tensor) for key, tensor in protect(update).items())
    for changed in (protect(update, 2), protect(update, key=OTHER), protect(other)):
        assert not any(torch.equal(sent[key], changed[key]) for key in sent)


@pytest.mark.parametrize("noise", ["server", "client"])
def test_the_expected_cosine_is_that_of_the_longest_mean(noise):
    clients, config = ("ann", "bob", "cy"), configure(noise, multiplier=0.05)
    same = clip_update(draw_state(1, SHAPES), 0.5)
    if noise == "server":
        protection = MeanProtection(config, KEY)
        average(
            protection,
            dict.fromkeys(clients, same),
            received=dict.fromkeys(SHAPES, torch.tensor(0.0)),
        )
        found = protection.figures["noised_cosine"]
    else:
        sent = [protect_update(same, config, 1, lambda i=i: bytes([i] * 32)) for i in range(3)]
        mean = torch.cat([sum(s[key] for s in sent).flatten() for key in same])
        whole = torch.cat([tensor.flatten() for tensor in same.values()])
        found = torch.nn.functional.cosine_similarity(mean, whole, dim=0).item()
    assert found == pytest.approx(bound_cosine(0.05, 3200, 3, noise), abs=0.03)


def test_nobody_tells_two_worlds_apart_better_than_epsilon_allows():
    """The best test there is, by which a mean with a client's update is told from one without.

    With noise z it has an advantage of 2 Phi(1 / (2 z)) - 1; noise that is too small, or that is
    added twice, shows.
    """
    config = configure(multiplier=1.0)
    protection = MeanProtection(config, KEY)
    unit = {"x": torch.full((4,), 0.5 / 2)}
    nothing, rest = {"x": torch.zeros(4)}, {"x": torch.tensor([0.1, -0.2, 0.0, 0.1])}
    seen = {}
    for world, update in (("with", unit), ("without", nothing)):
        sums = []
        for number in range(1500):
            protection.begin(number)
            for client, sent in (("ann", update), ("bob", rest)):
                protection.note(client, sent, protection.clip(sent))
            mean = {"x": (update["x"] + rest["x"]) / 2}
            sums.append(protection.add_noise(nothing, mean)["x"].sum().item())
        seen[world] = torch.tensor(sums)
    middle = (seen["with"].mean() + seen["without"].mean()) / 2
    advantage = (seen["with"] > middle).float().mean() - (seen["without"] > middle).float().mean()
    assert advantage.item() == pytest.approx(2 * norm.cdf(0.5) - 1, abs=0.06)
    epsilon = compute_epsilon(1e-5, [(1.0, 1)])
    assert advantage < (math.exp(epsilon) - 1 + 2e-5) / (math.exp(epsilon) + 1)
