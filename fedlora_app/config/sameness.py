"""Which settings make one run another run, and which only say how it is carried out."""

from __future__ import annotations

from typing import Any

from fedlora_app.config.schema import Config

CARRIED_OUT = {
    "experiment": ("track",),
    "federated": ("share_gpu", "client_timeout_seconds", "reconnect_seconds"),
}
"""Settings of how a run is carried out on a machine, which change no figure of it."""


def gives_the_same(one: Config, other: Config) -> bool:
    """Return whether two configurations give the same figures on the same machine and data."""
    return dump_what_counts(one) == dump_what_counts(other)


def dump_what_counts(config: Config) -> dict[str, Any]:
    """Return plain data without the settings of how a run is carried out, and without defaults.

    So a setting that came later, and has its default, makes no other run of an earlier one.
    """
    dump = config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for section, names in CARRIED_OUT.items():
        for name in names:
            dump.get(section, {}).pop(name, None)
    return dump
