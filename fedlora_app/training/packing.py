"""Whether a base model keeps packed examples apart, and the context in which it does."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedlora_app.data.tokens import Example
from fedlora_app.model.base import decoder_layers, find_decoder
from fedlora_app.model.device import is_out_of_memory
from fedlora_app.training.attention import ATTENTION, WAY_OUT, PackingError, counted
from fedlora_app.training.layout import compute_hidden_states, pack, pad

TOLERANCE = 0.05  # of hidden states, relative; other kernels and bf16 stay well below it
PROBES = (Example([1, 2, 0, 2], 1), Example([0, 1, 2], 1))

_separable: set[str] = set()
_trusted: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


@contextmanager
def packed_attention(base: PreTrainedModel, implementation: str = ATTENTION) -> Iterator[None]:
    """Have a model's attention keep packed examples apart while the block runs.

    Raises:
        PackingError: it does not, because some layer mixes tokens by other means.
    """
    with using_attention(base, implementation) as own:
        trusted = _trusted.setdefault(base, set())
        if implementation not in trusted:
            _require_separation(base, own)
            trusted.add(implementation)
        yield


@contextmanager
def using_attention(base: PreTrainedModel, implementation: str) -> Iterator[str]:
    """Have a model use an implementation of attention while the block runs; yield its own."""
    own = base.config._attn_implementation
    try:
        base.set_attn_implementation(implementation)
        yield own
    finally:
        base.set_attn_implementation(own)


def require_separable(config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise ``PackingError`` where a model's configuration shows that it cannot be packed for.

    A model without memory runs two examples: every layer has to ask attention, for nothing that
    packed examples cannot be given. What only numbers show is seen before the first step.
    """
    about = config.to_json_string()
    if about in _separable:
        return
    batch = pack(PROBES, torch.device("cpu"))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            base = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
            ).eval()
            num_layers = len(decoder_layers(base))
            parts = find_decoder(base).modules()
            has_convolution = any(isinstance(part, torch.nn.Conv1d) for part in parts)
            with using_attention(base, ATTENTION), counted() as counts:
                compute_hidden_states(base, batch)
    except (RuntimeError, NotImplementedError):  # what cannot be done without memory
        return
    except (ValueError, TypeError, AttributeError) as error:
        raise _explain(error) from error
    if has_convolution or counts[0] < num_layers:
        raise PackingError(
            "The base model has layers that look at other tokens by other means than attention, "
            f"and would mix packed examples. {WAY_OUT}"
        )
    _separable.add(about)


def _require_separation(base: PreTrainedModel, own: str) -> None:
    """Compare what a model makes of an example behind another one, and alone and unpacked.

    In evaluation mode and without a draw from the random numbers, so that nothing depends on
    whether this process has checked before.

    Args:
        own: the model's own implementation of attention.
    """
    device, was_training = base.device, base.training
    base.eval()
    try:
        with torch.no_grad():
            together = compute_hidden_states(base, pack(PROBES, device)).float()
            with using_attention(base, own):
                alone = [compute_hidden_states(base, pad([probe], device)) for probe in PROBES]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _explain(error) from error
    finally:
        base.train(was_training)
    alone = torch.cat(alone).float()
    if not (together - alone).norm() <= TOLERANCE * alone.norm():
        raise PackingError(
            "The base model computes something else for examples that are packed together than "
            f"for each alone, so it would be trained on the wrong context. {WAY_OUT}"
        )


def _explain(error: Exception) -> PackingError:
    if isinstance(error, PackingError):
        return error
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return PackingError(f"The base model does not take packed examples: {reason} {WAY_OUT}")
