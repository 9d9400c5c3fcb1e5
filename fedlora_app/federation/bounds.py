"""What an update, or a change of the global adapter, may be at most: its norm, and its structure.

Both ends hold what they get against what they have seen before: the server an update against those
that counted in earlier rounds, a client the change of the global adapter against earlier changes.
Neither knows what an honest one is; both know how large honest ones were, if most were honest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

import torch

from fedlora_app.config.schema import FederatedConfig
from fedlora_app.federation.packed_state import MessageError
from fedlora_app.model.adapter_state import AdapterState, compute_norm
from fedlora_app.model.ranks import rank_axis

NORMS = "norms"
"""What the server keeps from round to round, by its name."""
MOST_IN_ONE = 0.5
"""Of a matrix's sum of squares, in the largest entries of its ranks. Trained adapters have up to
0.18 where a rank has 64 entries and less where it has more (docs/privacy.md); who plants weights
that pass single inputs on, or to single outputs, has nearly all there."""
FEWEST_ENTRIES = 64
"""In a rank; of fewer, the largest may well hold much."""


class NormBounds:
    """The server's bounds on the updates of one round after the other.

    A round's own updates are no measure for each other, so that the order of their arrival decides
    nothing.
    """

    def __init__(self, federated: FederatedConfig) -> None:
        self._ratio = federated.max_norm_ratio
        self._largest = federated.max_update_norm
        self._earlier: list[float] = []
        self._own: list[float] = []

    def begin(self) -> None:
        """Start a round: what was accepted until now is from earlier ones."""
        self._earlier += self._own
        self._own = []

    def require(self, client: str, update: AdapterState) -> None:
        """Raise ``MessageError`` where a client's update is too large."""
        if self._ratio is None and self._largest is None:
            return
        norm = compute_norm(update)
        if self._largest is not None and norm > self._largest:
            raise MessageError(
                f"{client} sent an update of norm {norm:.4g}, above federated.max_update_norm, "
                f"which is {self._largest:g}."
            )
        limit = find_limit(self._earlier, self._ratio)
        if limit is not None and norm > limit:
            raise MessageError(
                f"{client} sent an update of norm {norm:.4g}, which is "
                f"{norm / median(self._earlier):.3g} times the median of earlier rounds; "
                f"federated.max_norm_ratio allows {self._ratio:g} times."
            )

    def note(self, update: AdapterState) -> None:
        """Remember an update that counts."""
        if self._ratio is not None:
            self._own.append(compute_norm(update))

    @property
    def memory(self) -> AdapterState:
        """What the rounds to come need: the norms, in an order that is not that of arrival."""
        norms = sorted(self._earlier + self._own)
        return {NORMS: torch.tensor(norms, dtype=torch.float64)} if norms else {}

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        self._earlier = memory[NORMS].tolist() if NORMS in memory else []
        self._own = []


def find_limit(norms: Iterable[float], ratio: float | None) -> float | None:
    """Return the largest norm that earlier ones allow, None where nothing says what that is."""
    earlier = [norm for norm in norms if norm > 0]
    return ratio * median(earlier) if earlier and ratio is not None else None


def require_unplanted(state: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise ``MessageError`` where a matrix reads single inputs or writes single outputs.

    With each rank of A passing one input on, or B leading to one output, a server can read off the
    update what single activations were. Other forms of such weights pass, and so does a matrix of
    zeros, which B is at first.

    Args:
        state: an adapter, or a change of one.
        what: to begin the error with.
    """
    for key, tensor in state.items():
        if (share := share_of_largest(key, tensor)) > MOST_IN_ONE:
            raise MessageError(
                f"{what}: {share:.0%} of {key} lie in the largest entry of each rank, which no "
                f"training does (at most {MOST_IN_ONE:.0%} are accepted). These weights look as if "
                "they were made to copy training data into updates. Nothing was trained on them; "
                "ask who runs the server."
            )


def share_of_largest(key: str, tensor: torch.Tensor) -> float:
    """Return the share of the sum of squares in the largest entries of a matrix's ranks.

    0 where all are 0, and where a rank has too few entries for it to mean anything.

    Args:
        tensor: A (r, in) or B (out, r), as its key says.
    """
    axis = 1 - rank_axis(key)
    if tensor.shape[axis] < FEWEST_ENTRIES:
        return 0.0
    # Of ratios to the largest, since the squares of huge values are infinite.
    largest = tensor.abs().max().double()
    if largest == 0:
        return 0.0
    squares = (tensor.double() / largest).square()
    return (squares.amax(axis).sum() / squares.sum()).item()
