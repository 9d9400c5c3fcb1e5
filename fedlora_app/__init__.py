"""Federated fine-tuning with two LoRA adapters per client: one shared, one private."""

import warnings

__version__ = "0.1.0"

# Notices to the libraries' own developers, which would bury what a run has to say.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.modeling_utils")
