"""The configuration of a run without one of its clients, and whether there can be one."""

from __future__ import annotations

from fedlora_app.config.final_round import has_validation
from fedlora_app.config.loading import parse_config
from fedlora_app.config.participation import leave_out
from fedlora_app.config.schema import AVERAGING_MODES, Config
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.federation.accountant import noise_multiplier_for
from fedlora_app.forgetting.replay import ForgettingError
from fedlora_app.foundation.terminal import shell
from fedlora_app.runs.paths import MAX_NAME_LENGTH
from fedlora_app.runs.reading import SavedRun


def protects_clients(config: Config) -> bool:
    """Return whether the run's noise hides whole clients."""
    return config.privacy.unit == "client"


def default_name(run_name: str, client: str) -> str:
    """Return what the run without a client is called."""
    tail = f"-without-{client}"
    return run_name[: max(1, MAX_NAME_LENGTH - len(tail))] + tail


def configure_without(run: SavedRun, client: str) -> Config:
    """Return a run's configuration without a client.

    Its answers to conflict questions stay among the wrong ones, so that the questions are the same.

    Raises:
        ForgettingError, ConfigError: the client cannot be forgotten, with the reason.
    """
    path, federated = run.path, run.config.federated
    run.config.entry(client)  # raises
    if federated.mode not in AVERAGING_MODES:
        raise ForgettingError(
            f"{path} is of mode {federated.mode}, in which no server averages updates: there is "
            "nothing to take a client's share out of."
        )
    if federated.mode == "finetuned":
        raise ForgettingError(
            f"{path} is of mode finetuned: its clients answer with copies of the average that they "
            f"trained on, and what these hold of {client} cannot be taken out. Train it again "
            "without the client."
        )
    if federated.rule in PERSONAL:
        raise ForgettingError(
            f"{path} is of the aggregation rule {federated.rule}, which leaves each client a "
            "global adapter of its own; what that holds of others cannot be taken out. Train it "
            "again without the client."
        )
    if run.manifest.get("finished") is None:
        raise ForgettingError(
            f"{path} has not finished. Finish it first: fedlora train --resume {shell(path)}"
        )
    if not federated.keep_uploads:
        raise ForgettingError(
            f"{path} has not kept its clients' updates, without which nobody's share can be told. "
            "They are kept where federated.keep_uploads is true when a run begins."
        )
    raw = run.config.dump()
    leave_out(raw, [client])
    if not raw["federated"]["clients"]:
        raise ForgettingError(f"{client} is the only client of {path}; without it nothing is left.")
    if protects_clients(run.config):  # its noise is what it was, whoever is left
        multiplier = noise_multiplier_for(run.config)
        raw["privacy"] |= {"epsilon": None, "noise_multiplier": multiplier}
    if not has_validation(raw):  # the round that was chosen stands in the manifest
        raw["federated"]["final"] = "last"
    return parse_config(raw, source=f"Without {client} the configuration of {path}")
