"""What one client keeps of a run on its own machine: adapters, which it alone writes and reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora_app.config.schema import GLOBAL, LOCAL, OWN_GLOBAL, Config
from fedlora_app.foundation.files import (
    WEIGHTS_FILE,
    hash_file,
    make_private_dir,
    remove_partials,
    replace_folder,
    write_json,
)
from fedlora_app.model.adapter_files import CONFIG_FILE, load_adapter, require_file, save_adapter
from fedlora_app.model.adapter_state import AdapterError, AdapterState
from fedlora_app.model.adapters import AdaptedModel, get_state
from fedlora_app.runs.feedback import FeedbackFolder
from fedlora_app.runs.manifest import RUN_ID
from fedlora_app.runs.own_spending import OwnSpending
from fedlora_app.runs.paths import RunDirectoryError, RunPaths, list_rounds, require_within
from fedlora_app.runs.received import ReceivedChanges
from fedlora_app.runs.secret_key import read_or_make_key

BEFORE = "before_"
"""Begins the name of a round's adapter as it was before the second half of the round."""


class LostGlobalError(AdapterError):
    """The global adapter that a client had kept is missing or damaged; the server has it."""


@dataclass(frozen=True)
class ClientFolder:
    """A client's own adapters by round, its final ones, and the global adapter it received.

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

    @property
    def feedback(self) -> FeedbackFolder:
        """What the rounding of this client's updates has left to send."""
        return FeedbackFolder(self.paths, self.client_id)

    @property
    def spending(self) -> OwnSpending:
        """What this client's own noise has spent of its privacy."""
        return OwnSpending(self.paths.own_releases(self.client_id))

    def read_or_make_secret_key(self) -> bytes:
        """Return the secret that this client's own noise is drawn from, made where there is none.

        Raises:
            RunDirectoryError: its file is damaged.
        """
        return read_or_make_key(self.paths.secret_key(self.client_id), self.paths.folder)

    def require_own(self) -> None:
        """Raise ``RunDirectoryError`` where links lead from what is kept here out of the run.

        To be called before anything here is read or written.
        """
        kept = self.path.glob("*") if self.path.is_dir() else ()
        links = [path for path in kept if path.is_symlink()]
        for path in (self.path, self._final, *links):
            require_within(path, self.paths.folder)

    def require_run(self, run_id: str) -> None:
        """Raise ``RunDirectoryError`` where what is kept here is of another run of this name.

        So no run writes over what another one has left here.
        """
        if self.is_begun and (known := self._read_run_id()) != run_id:
            what = "is of another run of this name" if known else "does not say of which run it is"
            raise RunDirectoryError(
                f"{self.path} {what} and is left as it is. Choose another name for the run, or "
                f"move this folder away, with what final/ beside it has of {self.client_id}."
            )

    def enter_run(self, run_id: str) -> None:
        """Note of which run this folder is, before anything else is kept in it.

        Raises:
            RunDirectoryError: it is of another one.
        """
        self.require_run(run_id)
        if run_id and not self.is_begun:
            make_private_dir(self.path)
            write_json(self.paths.run_id(self.client_id), {RUN_ID: run_id})

    def remove_partials(self) -> None:
        """Remove what a killed process has left half written."""
        remove_partials(self.path)
        remove_partials(self._final.parent, self.client_id)
        self.feedback.remove_partials()

    def require_local(self, local_round: int, sha256: str) -> None:
        """Raise ``AdapterError`` unless a round's local adapter is as it was written.

        Args:
            sha256: its weights' hash as the server knows it, empty where it does not.
        """
        require_file(self._local(local_round) / WEIGHTS_FILE, sha256)

    def require_own_global(self, server_round: int, sha256: str) -> None:
        """Raise likewise for the global adapter that this client has for itself."""
        require_file(self._own_global(server_round) / WEIGHTS_FILE, sha256)

    def load_local(self, model: AdaptedModel, local_round: int, sha256: str = "") -> AdapterState:
        """Read a round's local adapter.

        Raises:
            AdapterError: it is missing, damaged or another one.
        """
        return self._load(model, LOCAL, _choose(self._local(local_round), sha256), sha256)

    def keep_before(self, server_round: int, sha256: Mapping[str, str]) -> None:
        """Keep a round's adapters as they are, which the round is about to train further.

        A message that has to be sent once more finds what it began with.

        Args:
            sha256: by role, of what the message begins with.
        """
        for role, folder in (
            (LOCAL, self._local(server_round)),
            (OWN_GLOBAL, self._own_global(server_round)),
        ):
            weights = folder / WEIGHTS_FILE
            if weights.is_file() and hash_file(weights) == sha256.get(role):
                with replace_folder(_before(folder)) as partial:
                    for name in (WEIGHTS_FILE, CONFIG_FILE):
                        shutil.copyfile(folder / name, partial / name)

    def remove_before(self) -> None:
        """Remove what ``keep_before`` has kept: another round begins."""
        for place in (self.path, self._own_global(0).parent):
            for folder in place.glob(f"{BEFORE}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def save_local(self, model: AdaptedModel, server_round: int) -> str:
        """Keep the model's local adapter as a round's; return its weights' sha256."""
        return self._save(model, LOCAL, get_state(model, LOCAL), self._local(server_round))

    def load_own_global(
        self, model: AdaptedModel, server_round: int, sha256: str = ""
    ) -> AdapterState:
        """Read the global adapter that this client has for itself.

        Raises:
            AdapterError: it is missing, damaged or another one.
        """
        return self._load(model, GLOBAL, _choose(self._own_global(server_round), sha256), sha256)

    def save_own_global(
        self, model: AdaptedModel, state: AdapterState, server_round: int, *, is_final: bool
    ) -> str:
        """Keep the global adapter that this client has for itself; return its weights' sha256."""
        if is_final:
            self._save(model, GLOBAL, state, self.paths.final_own_global(self.client_id))
        return self._save(model, GLOBAL, state, self._own_global(server_round))

    def save_final(self, model: AdaptedModel) -> None:
        """Keep the model's local adapter as the one to use."""
        self._save(model, LOCAL, get_state(model, LOCAL), self._final)

    def copy_final(self, role: str, server_round: int, sha256: str) -> None:
        """Keep a round's adapter of a role as the one to use.

        Raises:
            AdapterError: it is missing, or is not what the run wrote.
        """
        own = (self._own_global(server_round), self.paths.final_own_global(self.client_id))
        source, target = own if role == OWN_GLOBAL else (self._local(server_round), self._final)
        require_file(source / WEIGHTS_FILE, sha256)
        make_private_dir(target.parent)
        with replace_folder(target) as partial:
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                shutil.copyfile(source / name, partial / name)

    def remove_final(self) -> None:
        """Remove the adapters to use, of a run that had fewer rounds."""
        for folder in (self._final, self.paths.final_own_global(self.client_id)):
            shutil.rmtree(folder, ignore_errors=True)

    def accept_global(
        self, model: AdaptedModel, state: AdapterState, averaged: int, config: Config
    ) -> None:
        """Hold a global adapter that was sent against those before, and remember it.

        Args:
            averaged: the last round whose average is in it.

        Raises:
            MessageError: it is not plausible.
            AdapterError: what was remembered is damaged.
        """
        try:
            before = self.load_global(model, "")
        except LostGlobalError:  # as in the first round
            before = None
        ReceivedChanges(self.paths.changes(self.client_id), config).accept(state, before, averaged)

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
        about = self.paths.run_id(self.client_id)
        if list(self.path.glob("*")) == [about]:
            about.unlink()
        for folder in (self.path, self.path.parent):
            with suppress(OSError):  # it holds local adapters
                folder.rmdir()

    def thin(self, oldest: Mapping[str, int]) -> None:
        """Delete this client's adapters of earlier rounds.

        Args:
            oldest: by role, the round from which on they are needed.
        """
        for role, place in ((LOCAL, self.path), (OWN_GLOBAL, self._own_global(0).parent)):
            for number, folder in list_rounds(place).items():
                if number < oldest.get(role, 0):
                    shutil.rmtree(folder, ignore_errors=True)

    @property
    def is_begun(self) -> bool:
        """Whether anything is kept here, beside the name of a run that left nothing else."""
        finals = (self._final, self.paths.final_own_global(self.client_id))
        about = self.paths.run_id(self.client_id)
        kept = (p for p in self.path.glob("*") if p != about and not p.name.startswith("."))
        return any(kept) or any(folder.exists() for folder in finals)

    def _read_run_id(self) -> str:
        """Return of which run this folder is, "" where it does not say so."""
        path = self.paths.run_id(self.client_id)
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))[RUN_ID])
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise RunDirectoryError(
                f"{path} is damaged, which says of which run this folder is. Restore it."
            ) from None

    @property
    def _final(self) -> Path:
        return self.paths.final_local(self.client_id)

    @property
    def _received(self) -> Path:
        return self.paths.received_global(self.client_id)

    def _own_global(self, server_round: int) -> Path:
        return self.paths.own_global(self.client_id, server_round)

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


def _before(folder: Path) -> Path:
    return folder.with_name(f"{BEFORE}{folder.name}")


def _choose(folder: Path, sha256: str) -> Path:
    """Return where a round's adapter of this hash lies, as it is or as it was before."""
    kept = _before(folder) / WEIGHTS_FILE
    is_kept = sha256 and kept.is_file() and hash_file(kept) == sha256
    return kept.parent if is_kept else folder
