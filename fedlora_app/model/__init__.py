"""The frozen base model and the two LoRA adapters on it."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "adapter_files": ["load_adapter", "save_adapter"],
        "adapters": [
            "AdapterError",
            "AdapterState",
            "attach_adapters",
            "attach_once",
            "build_initial_state",
            "get_state",
            "only_adapters",
            "set_state",
        ],
        "base": ["LoadedModel", "ModelError", "build_empty_model", "load_base_model"],
    },
)
