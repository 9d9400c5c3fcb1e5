"""The run without a client: its rounds replayed and written, and what others have of it copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedlora_app.config.schema import FEEDBACK, GLOBAL, LOCAL, Config
from fedlora_app.forgetting.configuration import protects_clients
from fedlora_app.forgetting.replay import (
    ForgettingError,
    Replayed,
    load_global,
    of_role,
    replay,
)
from fedlora_app.foundation.files import make_private_dir, new_folder, write_json
from fedlora_app.model.adapter_files import save_adapter, save_tensors
from fedlora_app.model.adapters import AdaptedModel
from fedlora_app.runs.directory import SERVER, RunDirectory, begin_manifest
from fedlora_app.runs.history import read_history
from fedlora_app.runs.manifest import FORGOTTEN, MEMORY, RUN_ID, UPLOAD, WEIGHTS
from fedlora_app.runs.paths import MEMORY_FILE
from fedlora_app.runs.reading import SavedRun
from fedlora_app.runs.spending import Spending

EPSILON = "epsilon"
APPROXIMATION = (
    "An approximation: the other clients' updates were trained from global adapters that held the "
    "forgotten client's share, and their local adapters are those that were fitted beside them."
)

Report = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Forgetting:
    """A client that is taken out of a run.

    Args:
        config: the run's without the client.
        root: the project that the run lies in.
        model: the base with its adapters, without weights.
    """

    run: SavedRun
    client: str
    config: Config
    root: Path
    model: AdaptedModel

    @cached_property
    def _entries(self) -> dict[int, dict[str, Any]]:
        return {entry["round"]: entry for entry in self.run.manifest["rounds"]}

    def check(self, report: Report) -> None:
        """Replay the run with all of its updates, and compare every global adapter with its own.

        Raises:
            ForgettingError: one differs in a bit.
        """
        total = self.run.config.federated.num_rounds
        for replayed in replay(self.run, self.run.config, self.model):
            number = replayed.server_round
            recorded = load_global(self.run, number, self.model)
            differing = [k for k in recorded if not _same_bits(replayed.state[k], recorded[k])]
            if differing:
                largest = max(
                    (replayed.state[k] - recorded[k]).abs().max().item() for k in differing
                )
                raise ForgettingError(
                    f"{self.run.path}: with all of its updates round {number} does not become the "
                    f"global adapter that the run has; they differ by up to {largest:.3g} in "
                    f"{len(differing)} of {len(recorded)} tensors. Expected the same bytes. The "
                    "run was made with other code, libraries or threads (see its manifest), or its "
                    "files were changed."
                )
            report("checking rounds", number, total)

    def write(self, target: Path, report: Report) -> dict[str, Any]:
        """Write the run without the client; return what its manifest says of that.

        The folder is whole or absent.

        Raises:
            RunDirectoryError: something is there already, or a local adapter was changed.
        """
        RunDirectory.require_absent(target)
        clients = {c: r for c, r in self.run.manifest["clients"].items() if c != self.client}
        with new_folder(target) as partial:
            partial.chmod(0o700)
            new = RunDirectory(partial)
            base = self.run.manifest["base_model"]
            date = self.run.date or None
            new.manifest = begin_manifest(self.config, self.root, clients, date, base_model=base)
            if run_id := self.run.manifest.get(RUN_ID):  # by which clients know their folders
                new.manifest[RUN_ID] = run_id
            write_json(new.paths.config, self.config.dump())
            still = self._write_rounds(new, report)
            self._copy_others(new)
            about = self._describe(still)
            new.log_event("forgotten", **about)
            if (final := self.run.manifest.get("final")) is not None:
                missing = [c for c in final.get("missing", []) if c != self.client]
                chosen = {"why": f"final/ holds round {final['round']}, as in {self.run.name}."}
                chosen |= {"missing": missing} if missing else {}
                new.manifest["final"] = {"round": final["round"], **chosen}
            new.finish(**{FORGOTTEN: about})
        RunDirectory(target).point_latest()
        return about

    @property
    def absent(self) -> list[str]:
        """The other clients whose local adapters are not on this machine, to be copied."""
        paths, final = self.run.paths, self.run.final_round
        return [
            client
            for client in self.config.client_ids
            if any(client in of_role(e["adapters"], LOCAL) for e in self._entries.values())
            and not paths.local_adapter(client, self.run.local_round(final, client)).exists()
        ]

    def describe(self, about: dict[str, Any]) -> Iterator[str]:
        """Yield what is to be known of the new run.

        Args:
            about: what its manifest says.
        """
        yield about["note"]
        if still := about["rounds_without_update"]:
            yield (
                f"In round {', '.join(map(str, still))} no other client trained the global "
                "adapter; it stands still there."
            )
        if self.absent:
            yield (
                f"Not on this machine, and so not in the new run: the local adapters of "
                f"{', '.join(self.absent)}."
            )
        yield (
            f"{self.run.path} still holds the updates of {self.client} and all that was made of "
            "them. Delete it where the client is to be forgotten."
        )

    def _describe(self, still: list[int]) -> dict[str, Any]:
        final, earlier = self.run.final_round, self.run.manifest.get(FORGOTTEN)
        return {
            "client": self.client,
            "run": self.run.name,
            "round": final,
            "global_adapter": self._entries[final]["adapters"][GLOBAL],
            "rounds_without_update": still,
            "note": APPROXIMATION,
            **self._limit,
            **({"earlier": earlier} if earlier else {}),
        }

    @property
    def _limit(self) -> dict[str, float]:
        """The epsilon that the run was to keep within: its noise stays, and no round may follow."""
        epsilon = self.run.config.privacy.epsilon if protects_clients(self.run.config) else None
        if epsilon is None:
            return {k: v for k, v in self.run.manifest.get(FORGOTTEN, {}).items() if k == EPSILON}
        return {EPSILON: epsilon}

    def _write_rounds(self, new: RunDirectory, report: Report) -> list[int]:
        """Write all rounds and the history; return the rounds in which nobody else trained."""
        history, still = list(self._kept_history()), []
        spending = self._copy_secrets(new)
        for replayed in replay(self.run, self.config, self.model, self.client):
            number = replayed.server_round
            new.manifest["rounds"].append(self._write_round(new, replayed))
            if replayed.release is not None:
                spending.note(replayed.release)
            if replayed.stands_still:
                still.append(number)
            elif number > 0:
                entry = {"round": number, "client": SERVER, "phase": "aggregate"}
                history.append({**entry, "metrics": replayed.metrics})
            report("rounds", number, self.config.federated.num_rounds)
        new.write_history(sorted(history, key=lambda entry: entry["round"]))
        return still

    def _write_round(self, new: RunDirectory, replayed: Replayed) -> dict[str, Any]:
        """Write what is the server's of a round; return the manifest's entry."""
        number, base = replayed.server_round, self.config.model.name
        before = self._entries[number]
        folder = new.paths.global_adapter(number)
        adapters = {GLOBAL: save_adapter(folder, self.model, GLOBAL, replayed.state, base)}
        if number == self.run.final_round:
            save_adapter(new.paths.final_global, self.model, GLOBAL, replayed.state, base)
        if replayed.memory:
            adapters[MEMORY] = save_tensors(folder / MEMORY_FILE, replayed.memory)
        if replayed.errors is not None:
            new.log_event("aggregation", round=number, relative_error=replayed.errors.by_module)
        for role in (LOCAL, UPLOAD, FEEDBACK):
            found = of_role(before["adapters"], role).items()
            adapters |= {f"{role}:{c}": sha256 for c, sha256 in found if c != self.client}
        for client in of_role(adapters, UPLOAD):  # whoever is forgotten next is left out of these
            new.paths.uploads(number).mkdir(exist_ok=True)
            shutil.copy2(self.run.paths.upload(client, number), new.paths.upload(client, number))
        facts = {
            name: {c: value for c, value in before[name].items() if c != self.client}
            for name in (WEIGHTS, "failures")
            if name in before
        }
        kept = {name: value for name, value in facts.items() if value}
        return {"round": number, "adapters": adapters, **kept}

    def _copy_secrets(self, new: RunDirectory) -> Spending:
        """Copy the secret of the server's noise, and what it has told: that is not taken back."""
        make_private_dir(new.paths.server)
        for name in ("server_key", "releases"):
            if (source := getattr(self.run.paths, name)).exists():
                shutil.copy2(source, getattr(new.paths, name))
        return Spending(self.config, new.paths)

    def _copy_others(self, new: RunDirectory) -> None:
        """Copy what the other clients have of their own, as far as it is on this machine."""
        for client in self.config.client_ids:
            ours, theirs = self.run.paths, new.paths
            pairs = [(ours.gate(client), theirs.gate(client))]  # it looks at the base model alone
            pairs.append((ours.final_local(client), theirs.final_local(client)))
            # What rounding has left to send is sent when rounds follow.
            pairs.append((ours.feedback(client, 0).parent, theirs.feedback(client, 0).parent))
            for number, entry in self._entries.items():
                folder = ours.local_adapter(client, number)
                if client in of_role(entry["adapters"], LOCAL) and folder.exists():
                    self.run.adapter_sha256(number, client)  # raises where it was changed
                    pairs.append((folder, theirs.local_adapter(client, number)))
            for source, copy in pairs:
                if source.is_dir():
                    shutil.copytree(source, copy)
            if (about := ours.run_id(client)).is_file() and theirs.client(client).is_dir():
                shutil.copy2(about, theirs.run_id(client))

    def _kept_history(self) -> Iterator[dict[str, Any]]:
        """Yield what holds of the new run too: not what the old global adapters answered."""
        for entry in read_history(self.run.path):
            was_asked = entry["phase"] == "evaluate" and entry["round"] > 0
            if entry["client"] not in (self.client, SERVER) and not was_asked:
                yield entry


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
