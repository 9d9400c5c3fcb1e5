"""Settings of differential privacy that cannot work are refused by name, before all else."""

from __future__ import annotations

from itertools import product

import pytest
from conftest import ALIKE, build_tiny_config

from fedlora_app.config.loading import change_config
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import AVERAGING_MODES, GLOBAL, Config, ConfigError

CLIENTS = ("ann", "bob", "cy")
WEIGHED = "privacy.unit=client privacy.clip_norm=1 "
CENTRAL = WEIGHED + "federated.weighting=equal "
LOCAL = "privacy.unit=client privacy.clip_norm=1 privacy.noise=client "
RECORD = "privacy.unit=record privacy.clip_norm=1 "
NOISE = "privacy.noise_multiplier=1 privacy.delta=1e-5 "


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("privacy.clip_norm=1", r"privacy\.clip_norm: privacy\.unit is none, so it has no effect"),
        ("privacy.noise=client", r"privacy\.noise: privacy\.unit is none"),
        ("privacy.noise_multiplier=1", r"privacy\.noise_multiplier: privacy\.unit is none"),
        ("privacy.epsilon=1", r"privacy\.epsilon: privacy\.unit is none"),
        ("privacy.delta=1e-5", r"privacy\.delta: privacy\.unit is none"),
        ("privacy.unit=client", r"privacy\.clip_norm: .* noise hides a client's update only where"),
        ("privacy.unit=record", r"privacy\.clip_norm: .* noise hides one example's gradient"),
        (CENTRAL + NOISE + "privacy.epsilon=1", r"privacy\.epsilon: privacy\.noise_multiplier is"),
        (CENTRAL + "privacy.noise_multiplier=1", r"privacy\.delta: privacy\.noise_multiplier is"),
        (CENTRAL + "privacy.epsilon=1", r"privacy\.delta: privacy\.epsilon is set"),
        (CENTRAL + "privacy.delta=1e-5", r"privacy\.delta: there is no noise"),
        (CENTRAL + NOISE + "federated.aggregation=median", "median is not linear in the updates"),
        (WEIGHED + NOISE + "federated.weighting=examples", "weighting: examples one client can be"),
        (CENTRAL + "federated.mode=local-only", "in mode local-only the server makes no average"),
        (LOCAL + "federated.mode=centralized", "in mode centralized the server makes no average"),
        (RECORD + "federated.mode=centralized", "global adapter that a record could be hidden in"),
        (RECORD + "training.schedule=joint", "they pass through the local one"),
        ("privacy.secure_aggregation=true", r"Flower 1\.41 has SecAgg\+ for its legacy API alone"),
    ],
)
def test_what_would_protect_nothing_is_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        change_config(build_tiny_config(CLIENTS), overrides)


def test_all_faults_come_together():
    with pytest.raises(ConfigError) as caught:
        change_config(
            build_tiny_config(CLIENTS),
            "privacy.unit=client privacy.epsilon=1 privacy.secure_aggregation=true "
            "privacy.clip_norm=x federated.aggregation=svd",
        )
    text = str(caught.value)
    for what in (
        "secure_aggregation: it",
        "delta: privacy.epsilon",
        "svd is not",
        "weighting: exa",
    ):
        assert what in text
    assert "privacy.clip_norm: input should be a valid number" in text


@pytest.mark.parametrize("rule", ["fedavg", "freeze-a", "alternate", "share-a", "share-b"])
def test_the_servers_noise_goes_with_every_plain_mean(rule):
    change_config(build_tiny_config(CLIENTS), f"{CENTRAL}{NOISE}federated.aggregation={rule}")


@pytest.mark.parametrize("start", [LOCAL + NOISE, "privacy.unit=client privacy.clip_norm=1 "])
def test_noise_that_is_there_already_and_clipping_alone_go_with_any_rule(start):
    overrides = start + "federated.aggregation=median federated.weighting=examples"
    assert change_config(build_tiny_config(CLIENTS), overrides).federated.rule == "median"


@pytest.mark.parametrize(
    ("mode", "schedule"), list(product(AVERAGING_MODES, ("phased", "mixed", "joint")))
)
def test_records_are_protected_where_the_global_adapter_trains_alone(mode, schedule):
    """What the faults go by, on raw data, is what a round does."""
    plain = build_tiny_config(
        CLIENTS, federated={"mode": mode}, training={"schedule": schedule}, adapters=ALIKE
    )
    alone = all(plan_round(plain, number).train.active == (GLOBAL,) for number in (1, 2))
    if alone:
        assert change_config(plain, RECORD + NOISE).privacy.unit == "record"
    else:
        with pytest.raises(ConfigError, match=r"privacy\.unit: record protects the gradients"):
            change_config(plain, RECORD + NOISE)


def test_older_configurations_have_no_privacy():
    raw = build_tiny_config(CLIENTS).dump()
    del raw["privacy"]
    assert Config.model_validate(raw).privacy.unit == "none"


def test_flower_still_has_secure_aggregation_for_its_legacy_api_alone():
    """Where this fails, what the refusal says is no longer so."""
    from flwr import clientapp, serverapp
    from flwr.app import Context, RecordDict
    from flwr.server.workflow import SecAggPlusWorkflow

    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)
    with pytest.raises(TypeError, match="Expect a LegacyContext, but get Context"):
        workflow(None, Context(1, 1, {}, RecordDict(), {}))
    for package in (clientapp.mod, serverapp.strategy):
        assert not [name for name in dir(package) if "secagg" in name.lower()]
