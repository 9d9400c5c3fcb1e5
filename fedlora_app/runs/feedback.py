"""What the rounding of a client's updates has left to send, one file a round (error feedback)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedlora_app.federation.messages import Kept
from fedlora_app.federation.quantised import feed_back
from fedlora_app.foundation.files import make_private_dir, remove_partials
from fedlora_app.model.adapter_files import load_tensors, require_file, save_tensors
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.runs.paths import RunPaths, list_rounds

EXPECTED = (
    "what the rounding of this client's updates has left to send, which is never silently dropped. "
    "Restore it, or resume from an earlier round."
)


@dataclass(frozen=True)
class FeedbackFolder:
    """The files of one client, which it alone writes and reads.

    As with local adapters, the server says which round's a client goes on from: the last one whose
    update has counted.
    """

    paths: RunPaths
    client_id: str

    def settle(
        self,
        update: AdapterState,
        shapes: dict[str, torch.Size],
        upload_dtype: str,
        server_round: int,
        kept: Kept,
    ) -> tuple[AdapterState, str]:
        """Add what is left to an update, and keep what its own rounding will leave.

        Args:
            update: what was learnt, of the tensors that travel.
            shapes: of all that the client can train of the global adapter.
            kept: says after which round something was left, and of which rounds it is kept.

        Returns:
            What is to be sent, and the sha256 of the new file.

        Raises:
            AdapterError: what was left is missing, damaged or another adapter's.
        """
        residual: AdapterState = {}
        if kept.round >= 0:
            path = self._file(kept.round)
            limits = {"within": self.paths.folder, "sha256": kept.sha256}
            residual = load_tensors(path, shapes, expected=EXPECTED, **limits)
        owed, left = feed_back(update, residual, upload_dtype)
        path = self._file(server_round)
        make_private_dir(path.parent)
        sha256 = save_tensors(path, left)
        for number, earlier in list_rounds(path.parent).items():
            if number < kept.oldest:
                earlier.unlink(missing_ok=True)
        return owed, sha256

    def require(self, server_round: int, sha256: str) -> None:
        """Raise ``AdapterError`` unless a round's file is as it was written."""
        require_file(self._file(server_round), sha256)

    def remove_partials(self) -> None:
        """Remove what a killed process has left half written."""
        remove_partials(self._file(0).parent)

    def _file(self, server_round: int) -> Path:
        return self.paths.feedback(self.client_id, server_round)
