"""The run directory: written by training, read by everything else."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "directory": ["RunDirectoryError"],
        "history": ["load_history"],
        "reading": ["SavedRun", "find_run", "load_run"],
    },
)
