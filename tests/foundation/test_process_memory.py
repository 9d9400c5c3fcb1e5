from __future__ import annotations

import sys

import pytest

from fedlora_app.foundation.process_memory import read_peak, read_resident, reset_peak

SIZE = 50 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak begins anew on Linux only")
def test_a_peak_is_of_what_was_held_since_it_began():
    reset_peak()
    before = read_resident()
    held = bytearray(SIZE)
    assert read_resident() - before > 0.9 * SIZE
    del held
    assert read_peak() - before > 0.9 * SIZE
    reset_peak()
    assert read_peak() - before < 0.5 * SIZE
