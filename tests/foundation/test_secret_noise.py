"""Numbers of a secret key: their law, that they come back, and what they depend on."""

from __future__ import annotations

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy.stats import kstest

from fedlora_app.foundation import secret_noise
from fedlora_app.foundation.secret_noise import gaussian, uniform

KEY, OTHER = bytes(range(32)), bytes(32)


def test_numbers_have_the_laws_that_they_are_said_to_have():
    numbers = gaussian(KEY, "law", shape=(200, 500)).flatten()
    assert kstest(numbers.numpy(), "norm").pvalue > 1e-3
    assert kstest(uniform(KEY, "law", n=100_000).numpy(), "uniform").pvalue > 1e-3
    assert numbers.dtype == torch.float64
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.015  # independent, so far as this shows


def test_the_same_key_and_purpose_give_the_same_numbers_and_others_do_not():
    numbers = gaussian(KEY, 1, 2, "name", shape=(50,))
    assert torch.equal(numbers, gaussian(KEY, 1, 2, "name", shape=(50,)))
    for key, parts in (
        (OTHER, (1, 2, "name")),
        (KEY, (1, 3, "name")),
        (KEY, (12, "name")),
        (KEY, ("1", 2, "name")),
    ):
        assert not torch.isclose(numbers, gaussian(key, *parts, shape=(50,))).any()


def test_the_stream_is_that_of_rfc_8439():
    """Its first test vector (appendix A.1): a key and a nonce of zeros."""
    stream = Cipher(ChaCha20(bytes(32), bytes(16)), mode=None).encryptor().update(bytes(8))
    assert stream.hex() == "76b8e0ada0f13d90"


@pytest.mark.parametrize(
    ("bits", "expected"), [(0, 9.16), (1, -9.16), (2**64 - 1, 0.0), (2**64 - 2, 0.0)]
)
def test_the_ends_of_the_range_are_finite(bits, expected, monkeypatch):
    drawn = secret_noise.np.array([bits], dtype="u8")
    monkeypatch.setattr(secret_noise, "_draw_bits", lambda *_: drawn)
    assert gaussian(KEY, shape=(1,)).item() == pytest.approx(expected, abs=0.01)
    assert 0 <= uniform(KEY, n=1).item() < 1


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32 bytes; this one has 16"):
        gaussian(bytes(16), shape=(1,))
