"""From a YAML file and overrides to a checked configuration, or to all of its faults at once."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedlora_app.config.combinations import fill_frozen_rank, find_faults
from fedlora_app.config.faults import describe_faults, list_faults, shorten, show
from fedlora_app.config.final_round import find_final_faults
from fedlora_app.config.privacy import find_privacy_faults
from fedlora_app.config.private import find_private_faults, is_bare
from fedlora_app.config.schema import (
    GLOBAL,
    LOCAL,
    AdapterConfig,
    Config,
    ConfigError,
)

MAX_CONFIG_BYTES = 1 << 20
YAML_ERRORS = (  # PyYAML passes on whatever int(), float() and its own look-ups raise
    *(yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError),
)


def load_config(path: Path, overrides: str = "", **settings: Any) -> Config:
    """Read a YAML file, lay overrides over it and check everything at once.

    Args:
        path: the experiment's YAML.
        overrides: ``"training.learning_rate=1e-4 adapters.local.rank=8"``.
        settings: dotted keys with ``.`` written as ``__``; None leaves the YAML's value.

    Raises:
        ConfigError: with every fault, each under its dotted path.
    """
    return _change(read_yaml(path), str(path), overrides, settings)


def change_config(config: Config, overrides: str = "", **settings: Any) -> Config:
    """Return a configuration with overrides and settings laid over it, as ``load_config`` does."""
    return _change(config.dump(), "the configuration with overrides", overrides, settings)


def _change(raw: dict[str, Any], source: str, overrides: str, settings: dict[str, Any]) -> Config:
    faults = []
    changes = {key.replace("__", "."): v for key, v in settings.items() if v is not None}
    overridden, override_faults = parse_overrides(overrides)
    faults += override_faults
    for key in sorted(changes.keys() & overridden.keys()):
        ours, theirs = changes[key], overridden[key]
        if ours != theirs:
            faults.append(
                f"{key}: it is {show(ours)} by a setting of its own and {show(theirs)} in "
                "overrides. Leave one of them out."
            )
    for key, value in (changes | overridden).items():
        if not set_dotted(raw, key, value):
            faults.append(
                f'overrides: "{shorten(key)}" leads nowhere; no section or list item is there.'
            )
    return parse_config(raw, source=source, known_faults=faults)


def parse_config(
    raw: dict[str, Any], source: str = "the configuration", known_faults: list[str] | None = None
) -> Config:
    """Check plain data and return the configuration, or raise with all faults together."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds no sections. Expected keys such as model, federated.")
    faults = list(known_faults or [])
    raw = fill_frozen_rank(raw)
    num_more = 0
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        found, num_more = describe_faults(error, Config)
        faults += found
    faults += [*_cross_faults(raw), *find_faults(raw), *find_privacy_faults(raw)]
    if config is None or faults:
        raise ConfigError(list_faults(source, faults, num_more))
    return config


def parse_overrides(text: str) -> tuple[dict[str, Any], list[str]]:
    """Parse ``"a.b=1 c.d='x y'"`` to dotted keys with YAML values, and the faults in it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        return {}, [f"overrides: {error} in {show(text)}."]
    changes: dict[str, Any] = {}
    texts: dict[str, str] = {}
    faults = []
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            faults.append(f'overrides: "{shorten(word)}" is not of the form section.key=value.')
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except YAML_ERRORS:
            faults.append(f'overrides: the value of "{shorten(word)}" is not YAML.')
            continue
        if key in changes and changes[key] != value:
            both = f"as {shorten(texts[key])} and as {shorten(text)}"
            faults.append(f"overrides: {shorten(key)} is there twice, {both}. Leave one out.")
        changes[key], texts[key] = value, text
    return changes, faults


def join_overrides(*parts: str) -> str:
    """Return overrides laid over one another, in which a later part's value of a key counts."""
    try:
        words = [word for part in parts for word in shlex.split(part)]
    except ValueError:
        return " ".join(parts)  # which parse_overrides says what is wrong with
    return shlex.join({word.partition("=")[0]: word for word in words}.values())


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: ``1e-4`` is a number, not a string. A key stands once in its section.

    Merge keys are not read, because nested ones grow without bound.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a section after looking at its keys."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, 'merge keys ("<<") are not read', key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key.value)} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> bool:
    """Set a value by its path; return False where the path meets no section or item."""
    *sections, key = dotted.split(".")
    node: Any = raw
    for section in sections:
        if isinstance(node, list) and re.fullmatch("[0-9]{1,9}", section):
            if int(section) >= len(node):
                return False
            node = node[int(section)]
        elif isinstance(node, dict):
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
        else:
            return False
    if not isinstance(node, dict):
        return False
    node[key] = value
    return True


def _cross_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Find faults between fields, on raw data so that they join those of the fields."""
    yield from _tracker_faults(raw)
    yield from _kernel_faults(raw)
    yield from _copy_faults(raw)
    yield from find_final_faults(raw)
    federated = raw.get("federated")
    clients = federated.get("clients") if isinstance(federated, dict) else None
    if not isinstance(clients, list):
        return
    named = [client for client in clients if isinstance(client, dict)]
    yield from find_private_faults(named, federated.get("mode"))
    yield from _id_faults([c["id"] for c in named if isinstance(c.get("id"), str)])
    yield from _protection_faults(raw)
    min_clients = federated.get("min_clients")
    if isinstance(min_clients, int) and min_clients > len(clients):
        yield (
            f"federated.min_clients: {min_clients} clients are required and only "
            f"{len(clients)} are named."
        )
    yield from _universal_faults(raw, named)


def _tracker_faults(raw: dict[str, Any]) -> Iterator[str]:
    (experiment,) = _sections(raw, "experiment")
    track = experiment.get("track")
    if isinstance(track, list):
        track = [name for name in track if isinstance(name, str)]
        for name in sorted({name for name in track if track.count(name) > 1}):
            times = f"{track.count(name)} times"
            yield f"experiment.track: {shorten(name)} is named {times}; once is enough."


def _id_faults(ids: list[str]) -> Iterator[str]:
    counts, lowered = Counter(ids), Counter(name.lower() for name in ids)
    for name, count in sorted(counts.items()):
        shown = f'the id "{shorten(name)}"'
        if count > 1:
            yield f"federated.clients: {count} clients have {shown}; ids must differ."
        elif lowered[name.lower()] > 1:
            yield f"federated.clients: {shown} differs from another only in case."


def _protection_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Find settings that protect the global adapter's knowledge and do not go together."""
    training, data = _sections(raw, "training", "data")
    if None not in (training.get("local_kept_share"), training.get("local_weight_decay")):
        yield (
            "training.local_kept_share: training.local_weight_decay is set too, and each says what "
            "the other one is. Set one of them to null, or leave it out."
        )
    if training.get("local_kl_weight") and training.get("local_mixing_weight") is not None:
        yield (
            "training.local_kl_weight: it holds the pair near the global adapter as it answers "
            "alone, which with training.local_mixing_weight counts only in part where the local "
            "one learns. Set one of them to 0 or null."
        )
    has_kl, has_public = bool(training.get("local_kl_weight")), data.get("public") is not None
    if has_kl and training.get("replay") == 0 and not has_public:
        yield (
            "training.local_kl_weight: it acts on replayed records and those of data.public, and "
            "there are none. Set training.replay above 0, or name a file in data.public."
        )
    if has_public and not has_kl:
        yield (
            "data.public: its records are used by training.local_kl_weight, which is 0. Set it "
            "above 0, or data.public to null."
        )


def _universal_faults(raw: dict[str, Any], clients: list[dict[str, Any]]) -> Iterator[str]:
    """Find clients that have no universal records of their own where nobody shares any."""
    (data,) = _sections(raw, "data")
    if data.get("universal_train", "") is not None:
        return
    for client in clients:
        if client.get("universal_train") is None and not is_bare(client):
            name = client["id"] if isinstance(client.get("id"), str) else None
            yield (
                f'federated.clients: "{shorten(str(name))}" has no universal_train and '
                "data.universal_train is null; set one of them."
            )


def _sections(raw: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """Return sections by their names, an empty one for each that is not there or is none."""
    return [raw[name] if isinstance(raw.get(name), dict) else {} for name in names]


def _copy_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Find adapters of which one cannot be a copy of the other, where mode finetuned makes one."""
    federated, adapters = _sections(raw, "federated", "adapters")
    if federated.get("mode") != "finetuned":
        return
    pair = _sections(adapters, GLOBAL, LOCAL)
    for key, field in AdapterConfig.model_fields.items():
        ours, theirs = (adapter.get(key, field.default) for adapter in pair)
        if key == "frozen_rank":  # a local one has none, which combinations.py says
            if ours:
                yield (
                    f"federated.aggregation: {show(federated.get('aggregation'))} gives the "
                    "global adapter a frozen part, and in mode finetuned the local one begins as "
                    "a copy of it and has none. Use another rule or another mode."
                )
        elif ours != theirs and key != "dropout":
            yield (
                f"adapters.local.{key}: it is {show(theirs)} and adapters.global.{key} is "
                f"{show(ours)}. In mode finetuned the local adapter begins as a copy of the "
                "global one; set both to the same."
            )


def _kernel_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Find settings of the training step that exclude each other."""
    training, model, adapters = _sections(raw, "training", "model", "adapters")
    dropping = [
        name
        for name in (GLOBAL, LOCAL)
        if isinstance(adapters.get(name), dict) and adapters[name].get("dropout")
    ]
    if training.get("fused_adapters") is True and dropping:
        yield (
            f"training.fused_adapters: adapters.{dropping[0]}.dropout is not 0, and adapters with "
            "dropout cannot be fused. Set one of them to 0 or false."
        )
    if training.get("attention") == "flash_attention_2" and model.get("dtype") == "float32":
        yield (
            "training.attention: flash_attention_2 computes in bfloat16 and model.dtype is "
            "float32. Set model.dtype to auto or bfloat16."
        )


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: it is not there, too large, or no YAML.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a regular file. Expected a YAML file.")
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path} has {size} bytes; a configuration has at most {MAX_CONFIG_BYTES}."
            )
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.{_list_siblings(path)}") from None
    except (OSError, *YAML_ERRORS) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error


def _list_siblings(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f" {path.parent} has: {', '.join(names)}." if names else ""
