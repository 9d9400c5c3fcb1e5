"""Federated fine-tuning with two LoRA adapters per client: one shared, one private.

For notebooks the package offers what reads and draws runs: ``load_run``, ``load_history`` and the
``plot_*`` functions of ``report.plots``. None of them needs torch.
"""

import importlib

from fedlora_app.foundation.quiet import hide_notices, switch_off_telemetry

__version__ = "0.1.0"

# Here, because every module of ours comes after this, and most libraries do.
switch_off_telemetry()
hide_notices()

_PLOTS = (
    "plot_accuracy",
    "plot_aggregation_error",
    "plot_foreign_adapters",
    "plot_local_scale",
    "plot_loss",
    "plot_memory",
    "plot_seconds",
    "plot_swap_table",
    "plot_traffic",
    "plot_update_norm",
)
_HOMES = dict.fromkeys(_PLOTS, "fedlora_app.report.plots")
_HOMES |= {"load_history": "fedlora_app.runs.history", "load_run": "fedlora_app.runs.reading"}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    """Import what is asked for, and nothing before that."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
