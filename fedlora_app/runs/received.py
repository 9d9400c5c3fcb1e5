"""How much the global adapter has changed at a client from message to message, and at most may."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedlora_app.config.schema import Config
from fedlora_app.federation.bounds import Change, find_usual, require_unplanted, sum_learning
from fedlora_app.federation.packed_state import MessageError
from fedlora_app.foundation.files import make_private_dir, write_json
from fedlora_app.model.adapter_state import AdapterError, AdapterState, compute_norm


class Accepted(NamedTuple):
    """A global adapter that was accepted."""

    norm: float
    """Of its change, 0 where there was nothing before."""
    digest: str
    since: int
    """The last round whose average was in what it has changed from."""


@dataclass(frozen=True)
class ReceivedChanges:
    """What one client remembers of the global adapters that it has accepted, by round.

    Args:
        path: of the file in this client's folder that holds it.
        config: its ``federated.max_norm_ratio`` says how many times the median of earlier changes
            a change may be.
    """

    path: Path
    config: Config

    def accept(self, state: AdapterState, before: AdapterState | None, averaged: int) -> None:
        """Remember a global adapter that was sent, unless it is not plausible.

        One that was accepted before, as a run that resumes sends it again, is so once more.

        Args:
            before: what this client had received before, None where it has nothing.
            averaged: the last round whose average is in it.

        Raises:
            MessageError: it has changed too much, or looks planted.
            AdapterError: what was remembered is damaged.
        """
        rounds, digest = self._load(), _digest(state)
        numbers = {accepted.digest: number for number, accepted in rounds.items()}
        if digest in numbers:
            return
        require_unplanted(state, "The server sent a global adapter")
        norm, since = 0.0, averaged - 1
        if before is not None:
            change = {key: state[key] - before[key] for key in state}
            require_unplanted(change, "The server sent a change of the global adapter")
            norm, since = compute_norm(change), numbers.get(_digest(before), since)
            self._require_small(norm, since, rounds, averaged)
        rounds[averaged] = Accepted(norm, digest, since)
        make_private_dir(self.path.parent)
        write_json(self.path, {str(number): rounds[number] for number in sorted(rounds)})

    def _require_small(
        self, norm: float, since: int, rounds: Mapping[int, Accepted], averaged: int
    ) -> None:
        """Raise where a change is too large.

        Rounds that a run which resumes from an earlier one takes again do not count, unless there
        are no others: a server cannot have the bound forgotten by calling a round the first.
        """
        changes = {
            number: Change(known.norm, sum_learning(self.config, known.since, number))
            for number, known in rounds.items()
            if known.norm > 0
        }
        earlier = [change for number, change in changes.items() if number < averaged]
        learning = sum_learning(self.config, since, averaged)
        usual = find_usual(earlier or changes.values(), learning)
        ratio = self.config.federated.max_norm_ratio
        if usual is not None and ratio is not None and norm > ratio * usual:
            raise MessageError(
                f"The server sent a global adapter that has changed by {norm:.4g}, which is "
                f"{norm / usual:.3g} times the median of earlier changes at the learning rates of "
                f"the rounds between; federated.max_norm_ratio allows {ratio:g} times. Nothing was "
                "trained on it. Where it is known to be right, this client can delete "
                f"{self.path.name} in its folder of the run."
            )

    def _load(self) -> dict[int, Accepted]:
        try:
            listed = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                # Without the round before it where the run began before that was kept.
                int(n): Accepted(float(norm), str(digest), int(*since or [int(n) - 1]))
                for n, (norm, digest, *since) in listed.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise AdapterError(
                f"{self.path} is damaged, by which this client knows how much the global adapter "
                "has changed. Restore it, or delete it to accept the next one unseen."
            ) from None


def _digest(state: AdapterState) -> str:
    """Return a sha256 of an adapter's values."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().numpy())
    return digest.hexdigest()
