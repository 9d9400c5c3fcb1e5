"""Updates that the server keeps (``federated.keep_uploads``), to leave one client's out later.

Written by the strategy as they come, read by ``forgetting``. They lie in the folder of the round's
global adapter, which is written as a whole once all of them have come; so until then they wait
beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from fedlora_app.foundation.files import make_private_dir
from fedlora_app.model.adapter_files import load_tensors, save_tensors
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.runs.manifest import UPLOAD
from fedlora_app.runs.paths import RunPaths
from fedlora_app.runs.round_record import RoundRecord


class KeptUploads:
    """The updates of one round after the other, on the disk and not in memory."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        # By its name a resumed run knows it for what a stopped one left half written.
        self._waiting = paths.server / f".uploads.{os.getpid()}.partial"
        self._sha256: dict[str, str] = {}
        self._weights: dict[str, int] = {}

    def clear(self) -> None:
        """Begin a round."""
        shutil.rmtree(self._waiting, ignore_errors=True)
        self._sha256, self._weights = {}, {}

    def add(self, client: str, update: AdapterState, weight: int) -> None:
        """Keep an update that counts, fp32."""
        path = self._waiting / self._paths.upload(client, 0).name
        make_private_dir(path.parent)
        self._sha256[client] = save_tensors(path, update)
        self._weights[client] = weight

    def enter(self, record: RoundRecord) -> None:
        """Move the updates to the round's global adapter, and have the round name them."""
        if self._sha256:
            self._waiting.rename(self._paths.uploads(record.server_round))
        for client in sorted(self._sha256):
            record.adapters[f"{UPLOAD}:{client}"] = self._sha256[client]
            record.weights[client] = self._weights[client]
        self._sha256, self._weights = {}, {}


def read_upload_hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of every update that a round's entry of the manifest names, by client."""
    parts = ((name.partition(":"), sha256) for name, sha256 in entry.get("adapters", {}).items())
    return {client: sha256 for (role, _, client), sha256 in parts if role == UPLOAD and client}


def load_upload(
    paths: RunPaths, client: str, server_round: int, sha256: str, shapes: dict[str, torch.Size]
) -> AdapterState:
    """Read an update that was kept.

    Raises:
        AdapterError: it is missing or damaged.
    """
    return load_tensors(
        paths.upload(client, server_round),
        shapes,
        within=paths.folder,
        sha256=sha256,
        expected="the update that this client sent in the round. Restore it.",
    )
