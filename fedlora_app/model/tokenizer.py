"""The base model's tokenizer with its chat template. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedlora_app.config.schema import ModelConfig
from fedlora_app.model.chat_template import find_template_fault
from fedlora_app.model.pretrained import ModelError, from_pretrained


def load_tokenizer(config: ModelConfig, root: Path) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which must bring a chat template."""
    tokenizer = from_pretrained(AutoTokenizer, config, root)
    templates = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if not template:
        raise ModelError(
            f"{config.name} has no chat template. Expected an instruct model, such as "
            "Qwen/Qwen2.5-7B-Instruct."
        )
    fault = find_template_fault(template, tokenizer.special_tokens_map)
    if fault is not None:
        raise ModelError(
            f"The chat template of {config.name} {fault}. Use another model, or fix the template "
            "in a copy of its folder."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
