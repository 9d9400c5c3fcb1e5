"""What libraries print or send on their own."""

from __future__ import annotations

import logging
import os

import pytest

from fedlora_app.foundation.quiet import SWITCHES, hide_notices, switch_off_telemetry


def test_switches_are_off_unless_the_environment_says_otherwise(monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    switch_off_telemetry()
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    "name, text, is_shown",
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load %s from kernels-community: %s", False),
        ("bitsandbytes.backends.cpu.ops", "Another warning", True),
        ("flwr", "Manually terminating ClientAppActor", False),
        ("flwr", "", False),
        ("flwr", "A client failed", True),
    ],
)
def test_notices_are_hidden_and_warnings_are_not(name, text, is_shown):
    hide_notices()
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, text, None, None)
    assert bool(logging.getLogger(name).filter(record)) is is_shown
