"""Federated fine-tuning with two LoRA adapters per client: one shared, one private.

For notebooks the package offers what reads and draws runs: ``load_run``, ``load_history``, the
``plot_*`` functions of ``report.plots``, and ``draw``, which says what a run lacks for one of them.
None of them needs torch.
"""

from fedlora_app.foundation.face import offer
from fedlora_app.foundation.quiet import hide_notices, switch_off_telemetry

__version__ = "0.1.0"

# Here, because every module of ours comes after this, and most libraries do.
switch_off_telemetry()
hide_notices()

__getattr__, __all__ = offer(
    __name__,
    {
        "report.plots": [
            "plot_accuracy",
            "plot_aggregation_error",
            "plot_foreign_adapters",
            "plot_gate",
            "plot_local_scale",
            "plot_loss",
            "plot_memory",
            "plot_seconds",
            "plot_swap_table",
            "plot_traffic",
            "plot_update_cosine",
            "plot_update_norm",
        ],
        "report.drawing": ["draw"],
        "runs.history": ["load_history"],
        "runs.reading": ["load_run"],
    },
)
__all__ = ["__version__", *__all__]
