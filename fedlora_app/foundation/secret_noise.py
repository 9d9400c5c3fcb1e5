"""Random numbers of a secret key, for the noise and the samples of differential privacy.

Numbers of the experiment's seed would protect nothing: whoever knows the seed, as all clients and
the server do, draws them again and takes them away. ChaCha20 (RFC 8439) under a key that
HMAC-SHA256 derives from the secret one and from what the numbers are for gives the same numbers
whenever they are asked for again, as after a resume, and tells nothing to whoever lacks the key.
"""

from __future__ import annotations

import hmac
import json
import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy.special import ndtri

KEY_BYTES = 32


def gaussian(key: bytes, *parts: str | int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal numbers (shape), fp64 on the CPU.

    The quantile function of a uniform number of 64 bits: one is the sign, and the others reach
    down to 2**-65, hence out to 9.2 standard deviations. What lies beyond has a chance of 5e-20.

    Args:
        parts: what they are for, such as round, step and a tensor's name; others, other numbers.
    """
    bits = _draw_bits(key, ("gaussian", *parts), math.prod(shape))
    below = ((bits >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64  # in (0, 0.5]
    numbers = np.where(bits & np.uint64(1), ndtri(below), -ndtri(below))
    return torch.from_numpy(numbers).reshape(shape)


def uniform(key: bytes, *parts: str | int, n: int) -> torch.Tensor:
    """Return ``n`` uniform numbers in [0, 1), multiples of 2**-53, fp64 on the CPU.

    Args:
        parts: as for ``gaussian``; the numbers of the two are independent of each other.
    """
    bits = _draw_bits(key, ("uniform", *parts), n)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _draw_bits(key: bytes, parts: tuple[str | int, ...], n: int) -> np.ndarray:
    """Return ``n`` random integers of 64 bits, the same on every machine."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"A key of secret noise has {KEY_BYTES} bytes; this one has {len(key)}.")
    derived = hmac.digest(key, json.dumps(parts).encode(), "sha256")
    stream = Cipher(ChaCha20(derived, bytes(16)), mode=None).encryptor()  # one stream per key
    return np.frombuffer(stream.update(bytes(8 * n)), dtype="<u8").astype(np.uint64)
