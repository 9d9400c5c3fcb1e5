"""Keeps libraries from reporting home, and from printing what is not news to a user.

Usage statistics are sent by a library on its own, to its maker; this project sends none. To be
called before the libraries are imported: some read their switch once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "WANDB_ERROR_REPORTING": "false",
}
NO_NEWS = ("kernels-community", "Manually terminating")


def switch_off_telemetry() -> None:
    """Set each switch to off unless the environment sets it; child processes inherit it."""
    for name, off in SWITCHES.items():
        os.environ.setdefault(name, off)
    flower = sys.modules.get("flwr.supercore.telemetry")
    if flower is not None:  # Flower has read its own before it imports an app
        flower.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]


def hide_notices() -> None:
    """Hide notices that concern the libraries' own developers, or hardware that is not in use."""
    for category, module in (
        (DeprecationWarning, r"torch\.jit"),
        (FutureWarning, r"transformers\.modeling_utils"),
    ):
        warnings.filterwarnings("ignore", category=category, module=module)
    # On every import bitsandbytes asks CPUs with AVX512-BF16 for a package that would make its
    # 4-bit product faster there. No gradient passes that product, so it is never used here.
    # Flower warns at the end of each simulation that it ends its workers, and logs empty lines.
    for name in ("bitsandbytes.backends.cpu.ops", "flwr"):
        logging.getLogger(name).addFilter(_is_news)
    # Ray colours its prefix of each worker's line even where the log is a file.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")


@contextmanager
def quieted(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Leave out what a library's logger says below a level."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_news(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return bool(text) and not any(phrase in text for phrase in NO_NEWS)
