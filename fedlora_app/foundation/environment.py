"""Variables that must stand before torch is imported and Ray started. Needs neither."""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping

ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_BEFORE = "PYTORCH_CUDA_ALLOC_CONF"
"""Its name before torch 2.9."""


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what nobody has set, also to nothing."""
    # Under Flower's default of 0 GPUs per client Ray hides every GPU from the worker otherwise.
    environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Packed batches differ in length, so a block of fixed size would not fit the next batch. Under
    # WSL2 the first allocation in growing segments fails with many drivers (pytorch #192330).
    if ALLOCATOR_BEFORE not in environ and "microsoft" not in platform.release().lower():
        environ.setdefault(ALLOCATOR, "expandable_segments:True")
