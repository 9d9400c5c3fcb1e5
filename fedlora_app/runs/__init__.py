"""The run directory: written by training, read by everything else."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "history": ["load_history"],
        "partial": ["PartialRun", "read_what_is_left"],
        "paths": ["RunDirectoryError", "RunPaths", "find_run"],
        "reading": ["SavedRun", "load_run"],
    },
)
