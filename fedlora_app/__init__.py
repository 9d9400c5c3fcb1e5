"""Federated fine-tuning with two LoRA adapters per client: one shared, one private."""

__version__ = "0.1.0"
