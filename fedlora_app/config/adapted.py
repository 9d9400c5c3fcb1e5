"""What new clients of a finished run train with: what their YAML says, over what the run had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora_app.config.loading import parse_config, read_yaml
from fedlora_app.config.schema import ClientConfig, Config, FederatedConfig

MODE = "adapted"
USED = ("clients", "num_rounds", "keep_rounds", "share_gpu")
"""Of ``federated``: the rest is about a server, and none takes part."""
OF_ROUNDS = ("weight", "first_round", "last_round")
"""Of a client: when and how much it counts at a server."""
MUST_AGREE = (("adapters", "global"), ("adapters", "gate"))
"""The adapter is given, and who answers what is to be comparable with the run's own clients."""


def load_adapted_config(path: Path, kept: Config) -> tuple[Config, list[str]]:
    """Read the YAML of new clients, lay it over a run's configuration, and check everything.

    Args:
        kept: the run's. Its clients are not taken over, and neither is what a stranger must not
            decide: whether code that comes with the model is run, and which trackers get metrics.

    Returns:
        A configuration of mode *adapted*, and the settings in the YAML that have no effect in it.

    Raises:
        ConfigError: with every fault, and every setting that differs and must not.
    """
    given = read_yaml(path)
    if not isinstance(given, dict):
        parse_config(given, source=str(path))  # raises
    base = kept.dump()
    base["model"].pop("trust_remote_code")
    base["experiment"].pop("track")
    base.pop("privacy")  # of what is sent to a server
    base["federated"] = {name: base["federated"][name] for name in ("num_rounds", "keep_rounds")}
    # The records of the run's conflict file may be used as they are, with the new clients' answers.
    base["data"]["conflict_clients"] = kept.conflict_ids
    federated, unused = given.get("federated"), []
    if isinstance(federated, dict):
        unused = [key for key in federated if key in FederatedConfig.model_fields.keys() - {*USED}]
        used = {key: value for key, value in federated.items() if key not in unused}
        if isinstance(clients := used.get("clients"), list):
            used["clients"] = [_without(client, OF_ROUNDS) for client in clients]
            unused += [f"clients.{key}" for key in OF_ROUNDS if _says(clients, key)]
        given = given | {"federated": used}
    raw = _lay_over(base, given)
    if isinstance(raw.get("federated"), dict):
        raw["federated"]["mode"] = MODE
    faults = [
        f"{key}: it is {ours!r} in the run and {theirs!r} in {path.name}. New clients work with "
        "the run's global adapter as it is; leave the setting out."
        for key, ours, theirs in _find_differences(base, raw)
    ]
    config = parse_config(raw, source=str(path), known_faults=faults)
    config.require_clients()
    return config, [f"federated.{key}" for key in unused if key != "mode"]


def _says(clients: list[Any], key: str) -> bool:
    default = ClientConfig.model_fields[key].default
    return any(isinstance(c, dict) and c.get(key, default) != default for c in clients)


def _without(client: Any, keys: tuple[str, ...]) -> Any:
    if not isinstance(client, dict):
        return client  # the parser's matter
    return {key: value for key, value in client.items() if key not in keys}


def _lay_over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with what is given in the place of what was there; lists are replaced."""
    merged = dict(base)
    for key, value in given.items():
        below = base.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _lay_over(below, value) if both else value
    return merged


def _find_differences(
    base: Mapping[str, Any], raw: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that must agree and do not, with both values."""
    for section, name in MUST_AGREE:
        ours = base[section][name]
        theirs = raw[section].get(name) if isinstance(raw[section], Mapping) else None
        if not isinstance(ours, Mapping):
            if theirs != ours:
                yield f"{section}.{name}", ours, theirs
        elif isinstance(theirs, Mapping):  # what is no section is the parser's matter
            for key in ours:
                if theirs.get(key) != ours[key]:
                    yield f"{section}.{name}.{key}", ours[key], theirs.get(key)
