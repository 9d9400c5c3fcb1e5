"""Settings that a mode makes no use of are named."""

import pytest
from conftest import build_tiny_config

from fedlora_app.config.idle import describe_idle

SETTINGS = {
    "aggregation": "svd",
    "fraction": 0.5,
    "keep_uploads": True,
    "server_learning_rate": 0.5,
    "server_momentum": 0.5,
    "upload_dtype": "int8",
    "max_update_norm": 1.0,
}
OF_AVERAGING = [
    "aggregation",
    "fraction",
    "server_learning_rate",
    "server_momentum",
    "keep_uploads",
]
OF_SENDING = ["upload_dtype", "max_update_norm"]


@pytest.mark.parametrize(
    ("mode", "idle"),
    [
        ("dual", []),
        ("fedavg", []),
        ("centralized", OF_AVERAGING),
        ("local-only", OF_AVERAGING + OF_SENDING),
    ],
)
def test_what_a_mode_makes_no_use_of_is_named_and_nothing_else(mode, idle):
    federated = SETTINGS | {"mode": mode}
    if not idle:
        del federated["server_learning_rate"]  # which svd refuses where it averages
    config = build_tiny_config(training={"proximal_mu": 0.1}, federated=federated)
    said = list(describe_idle(config))
    assert len(said) == bool(idle)
    if idle:
        names = [f"federated.{key}" for key in idle] + ["training.proximal_mu"]
        assert said[0].endswith(f"effect: {', '.join(names)}.")


@pytest.mark.parametrize("mode", ["local-only", "centralized"])
def test_a_plain_baseline_is_told_nothing(mode):
    assert list(describe_idle(build_tiny_config(federated={"mode": mode}))) == []
