"""Settings of differential privacy: what cannot work together, and what they amount to.

Faults are found on raw data, so that they join those of single fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedlora_app.config.schema import AVERAGING_MODES, PrivacyConfig
from fedlora_app.config.sharing import PLAIN_MEANS

DEFAULTS = {key: field.default for key, field in PrivacyConfig.model_fields.items()}
MEANS_TEXT = ", ".join(PLAIN_MEANS)
NO_SECURE_AGGREGATION = (
    "privacy.secure_aggregation: it cannot be had here. Flower 1.41 has SecAgg+ for its legacy API "
    "alone: SecAggPlusWorkflow wants a LegacyContext with a strategy of that API, secaggplus_mod "
    "reads a client's reply as a FitRes, and neither flwr.serverapp.strategy nor "
    "flwr.clientapp.mod has one for messages such as these. The rules that need no more than a sum "
    f"would allow it ({MEANS_TEXT}, with weights that are known beforehand); the others look at "
    "single updates. Set it to false. Meanwhile: privacy.noise: client hides each update from the "
    "server itself; TLS from everybody between; else it takes a coordinator whom all trust."
)


def has_noise(privacy: PrivacyConfig) -> bool:
    """Return whether noise is added anywhere, so that there is an epsilon."""
    return privacy.noise_multiplier is not None or privacy.epsilon is not None


def protects_at(privacy: PrivacyConfig, place: str) -> bool:
    """Return whether whole updates are clipped at the "server" or the "client", and get noise."""
    return privacy.unit == "client" and privacy.noise == place


def find_privacy_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Yield what cannot work together, each with the reason and what to do."""
    given = raw.get("privacy")
    if not isinstance(given, dict):
        return
    privacy = DEFAULTS | given
    if privacy["secure_aggregation"] is True:
        yield NO_SECURE_AGGREGATION
    if privacy["unit"] == "none":
        yield from _idle_faults(privacy)
    elif privacy["unit"] in ("client", "record"):
        yield from _noise_faults(privacy)
        yield from _federation_faults(raw, privacy)


def _idle_faults(privacy: dict[str, Any]) -> Iterator[str]:
    """Find settings without a unit that they would protect."""
    for key in ("noise", "clip_norm", "noise_multiplier", "epsilon", "delta"):
        if privacy[key] != DEFAULTS[key]:
            yield (
                f"privacy.{key}: privacy.unit is none, so it has no effect. Set the unit to client "
                "or record, or leave the setting out."
            )


def _noise_faults(privacy: dict[str, Any]) -> Iterator[str]:
    unit = privacy["unit"]
    multiplier, epsilon, delta = (privacy[k] for k in ("noise_multiplier", "epsilon", "delta"))
    if privacy["clip_norm"] is None:
        what = "a client's update" if unit == "client" else "one example's gradient"
        hint = "; update_norm in the history of a run without it says what is usual"
        yield (
            f"privacy.clip_norm: privacy.unit is {unit}, and noise hides {what} only where that is "
            f"bounded. Set it to the largest norm that is to count{hint * (unit == 'client')}."
        )
    if multiplier is not None and epsilon is not None:
        yield (
            "privacy.epsilon: privacy.noise_multiplier is set too, and each says what the other "
            "one is. Set one of them to null, or leave it out."
        )
    noisy = "epsilon" if epsilon is not None else "noise_multiplier"
    if privacy[noisy] is not None and delta is None:
        yield (
            f"privacy.delta: privacy.{noisy} is set, and Gaussian noise gives an epsilon for some "
            "delta only. Set it well below one over the number of units, such as 1e-5."
        )
    if delta is not None and multiplier is None and epsilon is None:
        yield (
            "privacy.delta: there is no noise that it could belong to. Set "
            "privacy.noise_multiplier or privacy.epsilon, or leave it out."
        )


def _federation_faults(raw: dict[str, Any], privacy: dict[str, Any]) -> Iterator[str]:
    federated, training = (
        raw[name] if isinstance(raw.get(name), dict) else {} for name in ("federated", "training")
    )
    mode, unit = federated.get("mode", "dual"), privacy["unit"]
    if mode not in AVERAGING_MODES:
        yield (
            f"privacy.unit: in mode {mode!s:.100} the server makes no average of several clients' "
            f"updates, so no global adapter that a {unit} could be hidden in. Set it to none, "
            f"or use one of {', '.join(AVERAGING_MODES)}."
        )
    elif unit == "record" and mode == "dual" and training.get("schedule") == "joint":
        yield (
            "privacy.unit: record protects the gradients of the global adapter, and with "
            "training.schedule: joint they pass through the local one, which nothing protects. "
            "Use phased or mixed."
        )
    elif unit == "record":
        yield from _record_faults(raw)
    elif unit == "client" and privacy["noise"] == "server":
        yield from _server_noise_faults(federated, privacy)


def _server_noise_faults(federated: dict[str, Any], privacy: dict[str, Any]) -> Iterator[str]:
    """Find what makes one client's share in the mean larger than clip_norm over their number."""
    if privacy["noise_multiplier"] is None and privacy["epsilon"] is None:
        return
    rule, weighting = federated.get("aggregation", "fedavg"), federated.get("weighting", "examples")
    if federated.get("max_norm_ratio") is not None:
        yield (
            "federated.max_norm_ratio: whom it refuses depends on the others' norms, so that one "
            "client decides whether another's update is in the mean, which the server's noise is "
            "not made for; privacy.clip_norm bounds all of them. Set it to null, or use "
            "privacy.noise: client."
        )
    if rule not in PLAIN_MEANS:
        yield (
            f"privacy.noise: the server's noise hides a client in a plain mean, and {rule!s:.100} "
            f"is not linear in the updates. Use one of {MEANS_TEXT}, or privacy.noise: client, "
            "which leaves the server no update without noise and any rule."
        )
    if weighting != "equal":
        yield (
            f"privacy.noise: with federated.weighting: {weighting!s:.100} one client can be more "
            "of the mean than another, by a number that its own data decide or that the noise does "
            "not know. Set federated.weighting: equal, or privacy.noise: client."
        )


def _record_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Find what lets no single example be bounded, as far as settings show it."""
    adapters = raw.get("adapters")
    ours = adapters.get("global") if isinstance(adapters, dict) else None
    ours = ours if isinstance(ours, dict) else {}
    if ours.get("dropout"):
        yield (
            "adapters.global.dropout: with privacy.unit: record it would give an example other "
            "random numbers where another one is added or left out. Set it to 0."
        )
    targets = ours.get("target_modules")
    if isinstance(targets, list) and "lm_head" in targets:
        yield (
            "adapters.global.target_modules: lm_head is run on answers only, so that privacy.unit: "
            "record cannot tell which part of it an example is. Leave it out."
        )
