"""The frozen base model and the two LoRA adapters on it."""
