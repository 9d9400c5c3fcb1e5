"""How large a base model is, as far as can be known without loading it."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedlora_app.config.presets import guess_parameters
from fedlora_app.config.schema import ModelConfig
from fedlora_app.model.pretrained import local_folder


def estimate_parameters(config: ModelConfig, root: Path) -> float:
    """Return the number of parameters by a local folder's weights, else by the model's name."""
    folder = local_folder(config, root)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    try:
        counted = sum(map(_count, files))
    except (OSError, SafetensorError):
        counted = 0
    return counted or guess_parameters(config.name)


def _count(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
