"""The base model with its adapters, without weights: shapes, file headers, and what cannot work."""

from __future__ import annotations

from pathlib import Path

from fedlora_app.config.schema import Config
from fedlora_app.model.adapter_state import AdapterError
from fedlora_app.model.adapters import AdaptedModel, attach_adapters
from fedlora_app.model.base import ModelError, build_empty_model
from fedlora_app.training.attention import PackingError
from fedlora_app.training.packing import require_separable


def build_shapes(config: Config, root: Path) -> tuple[AdaptedModel | None, list[str]]:
    """Return the base model with its adapters, without weights; or None, and why there is none."""
    try:
        empty = build_empty_model(config.model, root)
        model = attach_adapters(empty, config.adapters)
        if config.training.packing:
            trusts = config.model.trust_remote_code
            require_separable(empty.config, trust_remote_code=trusts)
        return model, []
    except (ModelError, AdapterError, PackingError) as error:
        return None, [str(error)]
