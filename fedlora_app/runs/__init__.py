"""The run directory: written by training, read by everything else."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "history": ["load_history"],
        "paths": ["RunDirectoryError", "RunPaths", "find_run"],
        "reading": ["PartialRun", "SavedRun", "load_run", "read_what_is_left"],
    },
)
