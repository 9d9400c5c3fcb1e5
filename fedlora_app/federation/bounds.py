"""What an update, or a change of the global adapter, may be at most: its norm, and its structure.

Both ends hold what they get against what they have seen before: the server an update against those
that counted in earlier rounds, a client the change of the global adapter against earlier changes.
Neither knows what an honest one is; both know how large honest ones were, if most were honest.
Honest ones grow with the sum of the learning rates behind them, so that an earlier norm counts for
as many times more as there is more learning behind the present one (a warm-up that spans rounds,
rounds in which a client was away), and never for less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from fedlora_app.config.schema import Config
from fedlora_app.federation.packed_state import MessageError
from fedlora_app.model.adapter_state import AdapterState, compute_norm
from fedlora_app.model.ranks import rank_axis
from fedlora_app.training.schedule import mean_factor

NORMS = "norms"
"""What the server keeps from round to round, by its name: (N, 2), norms and their learning."""
MOST_IN_ONE = 0.5
"""Of a matrix's sum of squares, in the largest entries of its ranks. Trained adapters have up to
0.18 where a rank has 64 entries and less where it has more (docs/privacy.md); who plants weights
that pass single inputs on, or to single outputs, has nearly all there."""
FEWEST_ENTRIES = 64
"""In a rank; of fewer, the largest may well hold much."""


class Change(NamedTuple):
    """How far an update, or the global adapter, has moved."""

    norm: float
    learning: float
    """The mean learning rates of the rounds behind it, added up, relative to their peak."""


class NormBounds:
    """The server's bounds on the updates of one round after the other.

    A round's own updates are no measure for each other, so that the order of their arrival decides
    nothing.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ratio = config.federated.max_norm_ratio
        self._largest = config.federated.max_update_norm
        self._earlier: list[Change] = []
        self._own: list[Change] = []
        self._learning = 1.0

    def begin(self, server_round: int) -> None:
        """Start a round: what was accepted until now is from earlier ones."""
        self._earlier += self._own
        self._own = []
        self._learning = sum_learning(self._config, server_round - 1, server_round)

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
        usual = find_usual(self._earlier, self._learning)
        if self._ratio is not None and usual is not None and norm > self._ratio * usual:
            raise MessageError(
                f"{client} sent an update of norm {norm:.4g}, which is {norm / usual:.3g} times "
                "the median of earlier rounds at this one's learning rate; "
                f"federated.max_norm_ratio allows {self._ratio:g} times."
            )

    def note(self, update: AdapterState) -> None:
        """Remember an update that counts."""
        if self._ratio is not None:
            self._own.append(Change(compute_norm(update), self._learning))

    @property
    def memory(self) -> AdapterState:
        """What the rounds to come need: the norms, in an order that is not that of arrival."""
        changes = sorted(self._earlier + self._own)
        return {NORMS: torch.tensor(changes, dtype=torch.float64)} if changes else {}

    def recall(self, memory: AdapterState) -> None:
        """Go on from what ``memory`` was after an earlier round."""
        known = memory.get(NORMS, torch.empty(0, 2))
        if known.dim() == 1:  # of a run that began before their learning was kept
            known = torch.stack([known, torch.ones_like(known)], dim=1)
        self._earlier = [Change(*entry) for entry in known.tolist()]
        self._own = []


def sum_learning(config: Config, after: int, until: int) -> float:
    """Return the mean learning rates of the rounds after one and until another, added up.

    Relative to the peak; at least those of one round, whichever of the two comes first, and of no
    round that the run does not have.
    """
    total = config.federated.num_rounds
    first, last = (min(number, total) for number in sorted((after, until)))
    rounds = range(first + 1, last + 1) or [last]
    return sum(mean_factor(config.training, max(number, 1), total) for number in rounds)


def find_usual(changes: Iterable[Change], learning: float) -> float | None:
    """Return the median norm of earlier changes, None where there was none.

    Args:
        learning: behind the change that is held against it.
    """
    norms = [c.norm * max(1.0, learning / c.learning) for c in changes if c.norm > 0]
    return median(norms) if norms else None


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
