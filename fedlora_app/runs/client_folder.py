"""What one client keeps of a run on its own machine: adapters, which it alone writes and reads."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.foundation.files import (
    WEIGHTS_FILE,
    hash_file,
    make_private_dir,
    remove_partials,
    replace_folder,
)
from fedlora_app.model.adapter_files import CONFIG_FILE, load_adapter, save_adapter
from fedlora_app.model.adapters import AdaptedModel, AdapterError, AdapterState, get_state
from fedlora_app.runs.paths import RunPaths, list_rounds, require_within


class LostGlobalError(AdapterError):
    """The global adapter that a client had kept is missing or damaged; the server has it."""


@dataclass(frozen=True)
class ClientFolder:
    """A client's local adapters by round, its final one, and the global adapter it received.

    Args:
        base_name: the base model's name, which every adapter's file carries.
    """

    paths: RunPaths
    client_id: str
    base_name: str

    @property
    def path(self) -> Path:
        """The folder of what is kept during the run."""
        return self.paths.client(self.client_id)

    @property
    def gate(self) -> Path:
        """The folder of the gate before this client's local adapter."""
        return self.paths.gate(self.client_id)

    def require_own(self) -> None:
        """Raise ``RunDirectoryError`` where links lead from what is kept here out of the run.

        To be called before anything here is read or written.
        """
        kept = self.path.glob("*") if self.path.is_dir() else ()
        links = [path for path in kept if path.is_symlink()]
        for path in (self.path, self._final, *links):
            require_within(path, self.paths.folder)

    def remove_partials(self) -> None:
        """Remove what a killed process has left half written."""
        remove_partials(self.path)
        remove_partials(self._final.parent, self.client_id)

    def require_local(self, local_round: int, sha256: str) -> None:
        """Raise ``AdapterError`` unless a round's local adapter is as it was written.

        Args:
            sha256: its weights' hash as the server knows it, empty where it does not.
        """
        weights = self._local(local_round) / WEIGHTS_FILE
        if not weights.is_file():
            raise AdapterError(
                f"{weights} does not exist, and the run is to resume with it. Restore it, or "
                "resume from an earlier round."
            )
        if sha256 and hash_file(weights) != sha256:
            raise AdapterError(
                f"{weights} is damaged: its sha256 is not that of the file that the run wrote. "
                "Restore it, or resume from an earlier round."
            )

    def load_local(self, model: AdaptedModel, local_round: int, sha256: str = "") -> AdapterState:
        """Read a round's local adapter.

        Raises:
            AdapterError: it is missing, damaged or another one.
        """
        return self._load(model, LOCAL, self._local(local_round), sha256)

    def save_local(self, model: AdaptedModel, server_round: int) -> str:
        """Keep the model's local adapter as a round's; return its weights' sha256."""
        return self._save(model, LOCAL, get_state(model, LOCAL), self._local(server_round))

    def save_final(self, model: AdaptedModel) -> None:
        """Keep the model's local adapter as the one to use."""
        self._save(model, LOCAL, get_state(model, LOCAL), self._final)

    def copy_final(self, local_round: int) -> None:
        """Keep a round's local adapter as the one to use."""
        make_private_dir(self._final.parent)
        with replace_folder(self._final) as partial:
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                shutil.copyfile(self._local(local_round) / name, partial / name)

    def remove_final(self) -> None:
        """Remove the local adapter to use, of a run that had fewer rounds."""
        shutil.rmtree(self._final, ignore_errors=True)

    def load_global(self, model: AdaptedModel, sha256: str) -> AdapterState:
        """Read the global adapter that was kept last.

        Raises:
            LostGlobalError: it is missing, damaged or another one.
        """
        try:
            return self._load(model, GLOBAL, self._received, sha256)
        except AdapterError as error:
            raise LostGlobalError(str(error)) from None

    def save_global(self, model: AdaptedModel, state: AdapterState) -> str:
        """Keep a global adapter for a later message; return its weights' sha256."""
        return self._save(model, GLOBAL, state, self._received)

    def remove_global(self) -> None:
        """Remove the kept global adapter, and the folders that are empty then."""
        shutil.rmtree(self._received, ignore_errors=True)
        for folder in (self.path, self.path.parent):
            with suppress(OSError):  # it holds local adapters
                folder.rmdir()

    def thin(self, oldest_round: int) -> None:
        """Delete the local adapters of earlier rounds."""
        for number, folder in list_rounds(self.path).items():
            if number < oldest_round:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _final(self) -> Path:
        return self.paths.final_local(self.client_id)

    @property
    def _received(self) -> Path:
        return self.paths.received_global(self.client_id)

    def _local(self, server_round: int) -> Path:
        return self.paths.local_adapter(self.client_id, server_round)

    def _load(self, model: AdaptedModel, name: str, folder: Path, sha256: str) -> AdapterState:
        within = self.paths.folder
        return load_adapter(
            folder, model, name, self.base_name, within=within, sha256=sha256 or None
        )

    def _save(self, model: AdaptedModel, name: str, state: AdapterState, folder: Path) -> str:
        make_private_dir(folder.parent)
        return save_adapter(folder, model, name, state, self.base_name)
