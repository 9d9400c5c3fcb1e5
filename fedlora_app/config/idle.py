"""Settings that a run carries and its mode makes no use of.

They are no faults: a baseline takes a configuration as it is, and another mode uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import AVERAGING_MODES, Config, Section

OF_AVERAGING = (
    "aggregation",
    "trim_share",
    "svd_energy",
    "weighting",
    "fraction",
    "server_optimizer",
    "server_learning_rate",
    "server_momentum",
    "server_beta_2",
    "server_tau",
    "keep_uploads",
)
"""Of ``federated``: what is made of several clients' updates."""
OF_SENDING = ("upload_dtype", "max_norm_ratio", "max_update_norm")
"""Of ``federated``: what is made of one."""


def describe_idle(config: Config) -> Iterator[str]:
    """Yield a warning that names the settings of averaging that have no effect in a run's mode."""
    federated = config.federated
    if federated.mode in AVERAGING_MODES:
        return
    sends = plan_round(config, 1).train is not None
    idle = list(_list_set("federated", federated, OF_AVERAGING + (() if sends else OF_SENDING)))
    idle += _list_set("training", config.training, ("proximal_mu",))
    if idle:
        yield (
            f"Warning: mode {federated.mode} averages no updates, so these settings have no "
            f"effect: {', '.join(idle)}."
        )


def _list_set(name: str, section: Section, keys: Iterable[str]) -> Iterator[str]:
    """Yield the keys of a section whose values are not the defaults."""
    defaults = type(section).model_fields
    return (f"{name}.{key}" for key in keys if getattr(section, key) != defaults[key].default)
