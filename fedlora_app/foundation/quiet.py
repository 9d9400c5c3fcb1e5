"""Usage statistics of the libraries are off unless the user's environment switches them on.

Each is sent by a library on its own, to its maker; this project sends none. To be called before
the libraries are imported: some read their switch once.
"""

from __future__ import annotations

import os
import sys

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "WANDB_ERROR_REPORTING": "false",
}


def switch_off_telemetry() -> None:
    """Set each switch to off where the environment says nothing; child processes inherit it."""
    for name, off in SWITCHES.items():
        os.environ.setdefault(name, off)
    flower = sys.modules.get("flwr.supercore.telemetry")
    if flower is not None:  # Flower has read its own before it imports an app
        flower.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]
