"""What a run says its noise is worth, and where it says that it is worth nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_config

from fedlora_app.config.loading import change_config
from fedlora_app.federation.privacy_notice import count_travelling, describe_privacy

CLIENT = "privacy.unit=client privacy.clip_norm=0.2 federated.weighting=equal "
NOISE = "privacy.delta=1e-5 privacy.noise_multiplier=1.5 "
ASSUMED = "Assumed: a client is compared with one whose updates are zero; who trains is known"
LOST = "what 3 clients have in common is lost in this noise"
NEXT_TO_NOTHING = "protects next to nothing: 3 clients cannot be hidden by this noise"


def tell(overrides, num_values=2048, counts=None):
    config = change_config(build_tiny_config(("ann", "bob", "cy")), overrides)
    return "\n".join(describe_privacy(config, num_values, counts or {}))


@pytest.mark.parametrize(
    ("overrides", "told", "untold"),
    [
        ("privacy.unit=none", [], ["unit", "Warning"]),
        (
            CLIENT + NOISE,
            [
                "unit client: each update as a whole is clipped to norm 0.2; noise by the server "
                "on 2,048 numbers of the mean: 1.5 x 0.2 / 3 = 0.1",
                "epsilon 4.42 at delta 1e-05 after 2 rounds of training",
                ASSUMED,
                "the server is trusted",
                "Not covered: counts, scores and losses that clients report, local adapters, what",
                "Expected cosine of the mean with its noise and without it: at most 0.044",
                f"Warning: {LOST} (4.53 long, where the mean of their updates is at most 0.2)",
            ],
            [NEXT_TO_NOTHING],
        ),
        (
            f"{CLIENT}{NOISE}privacy.noise=client",
            [
                "noise by the client on 2,048 numbers of each update: 1.5 x 0.2 = 0.3",
                "the server need not be trusted",
                "at most 0.026",
                f"{LOST} (7.84 long",
            ],
            ["what the history measures"],
        ),
        (
            f"{CLIENT}privacy.delta=1e-5 privacy.noise_multiplier=0.1",
            ["at most 0.55", NEXT_TO_NOTHING],
            [LOST],
        ),
        (
            f"{CLIENT}privacy.noise_multiplier=1.5 privacy.delta=0.5",
            ["delta 0.5 is not below one over 3 clients"],
            [],
        ),
        (CLIENT, ["norm 0.2, without noise", "Warning: without noise epsilon is infinite"], ["At"]),
        ("privacy.unit=record privacy.clip_norm=1", ["example's gradient", "is infinite"], []),
    ],
)
def test_it_comes_with_what_it_assumes_and_with_warnings(overrides, told, untold):
    text = tell(overrides)
    assert not [what for what in told if what not in text], text
    assert not [what for what in untold if what in text], text


def test_with_records_each_client_has_a_figure_of_its_own():
    text = tell(
        "privacy.unit=record privacy.clip_norm=1 privacy.delta=0.01 privacy.noise_multiplier=2",
        counts={"ann": (40, 3), "bob": (200, 3)},
    )
    ann, bob = (next(line for line in text.splitlines() if c in line) for c in ("ann", "bob"))
    assert "at delta 0.01 after 40 steps of 2 of 40 records, with noise multiplier 2" in ann
    assert "after 200 steps of 2 of 200 records" in bob
    assert float(ann.split("epsilon ")[1].split()[0]) > float(bob.split("epsilon ")[1].split()[0])
    assert "delta 0.01 is not below one over 200 records of bob" in text
    assert "each step draws every one with the same chance, in secret" in text


@pytest.mark.parametrize(
    ("rule", "expected"), [("fedavg", 48), ("freeze-a", 32), ("alternate", 32), ("share-a", 16)]
)
def test_what_travels_is_counted(rule, expected):
    config = build_tiny_config(("ann", "bob"), federated={"aggregation": rule})
    shapes = {"x.lora_A.w": torch.Size([4, 4]), "x.lora_B.w": torch.Size([8, 4])}
    assert count_travelling(config, shapes) == expected
