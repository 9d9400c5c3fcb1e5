"""How much the global adapter has changed at a client from message to message, and at most may."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fedlora_app.federation.bounds import find_limit, require_unplanted
from fedlora_app.federation.packed_state import MessageError
from fedlora_app.foundation.files import make_private_dir, write_json
from fedlora_app.model.adapter_state import AdapterError, AdapterState, compute_norm


@dataclass(frozen=True)
class ReceivedChanges:
    """What one client remembers of the global adapters that it has accepted, by round.

    Args:
        path: of the file in this client's folder that holds it.
        max_ratio: a change may have so many times the median norm of those of earlier rounds.
    """

    path: Path
    max_ratio: float

    def accept(self, state: AdapterState, before: AdapterState | None, server_round: int) -> None:
        """Remember a global adapter that was sent, unless it is not plausible.

        One that was accepted before, as a run that resumes sends it again, is so once more.

        Args:
            before: what this client had received before, None where it has nothing.

        Raises:
            MessageError: it has changed too much, or looks planted.
            AdapterError: what was remembered is damaged.
        """
        rounds, digest = self._load(), _digest(state)
        if any(digest == accepted for _, accepted in rounds.values()):
            return
        require_unplanted(state, "The server sent a global adapter")
        norm = 0.0
        if before is not None:
            change = {key: state[key] - before[key] for key in state}
            require_unplanted(change, "The server sent a change of the global adapter")
            norm = compute_norm(change)
            self._require_small(
                norm, {number: value for number, (value, _) in rounds.items()}, server_round
            )
        rounds[server_round] = (norm, digest)
        make_private_dir(self.path.parent)
        write_json(self.path, {str(number): rounds[number] for number in sorted(rounds)})

    def _require_small(self, norm: float, norms: dict[int, float], server_round: int) -> None:
        """Raise where a change is too large.

        Rounds that a run which resumes from an earlier one takes again do not count, unless there
        are no others: a server cannot have the bound forgotten by calling a round the first.
        """
        earlier = [value for number, value in norms.items() if number < server_round and value]
        known = earlier or [v for number, v in norms.items() if number != server_round and v]
        limit = find_limit(known, self.max_ratio)
        if limit is not None and norm > limit:
            raise MessageError(
                f"The server sent a global adapter that has changed by {norm:.4g}, which is "
                f"{norm / median(known):.3g} times the median of earlier changes; "
                f"federated.max_norm_ratio allows {self.max_ratio:g} times. Nothing was trained on "
                f"it. Where it is known to be right, this client can delete {self.path.name} in "
                "its folder of the run."
            )

    def _load(self) -> dict[int, tuple[float, str]]:
        try:
            listed = json.loads(self.path.read_text(encoding="utf-8"))
            return {int(k): (float(norm), str(digest)) for k, (norm, digest) in listed.items()}
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
