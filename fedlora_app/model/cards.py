"""Which GPU this process computes on: one base model a card.

A process claims a card by a file whose lock it holds until it ends, however it ends, so that
others see who is there. Two runs that train would each take a card's memory as free while the
other grows; so a run takes a card that no other run has, or is refused. Workers of one run spread
over the cards, and share them where there are fewer.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import make_private_dir
from fedlora_app.model.kept_hashes import find_cache_dir


class CardError(UserError):
    """Every GPU is another run's."""


@dataclass(frozen=True)
class Claim:
    """Who computes on a card."""

    card: str
    pid: int
    run: str
    """The run that trains there; empty where a run is only read."""
    since: str

    def __str__(self) -> str:  # noqa: D105
        what = f"run {self.run}" if self.run else "a command that reads a run"
        return f"{what} (process {self.pid}, since {self.since})"


@dataclass(frozen=True)
class _Held:
    index: int
    claim: Claim
    file: IO[str]


_held: _Held | None = None


def claim_card(cards: Sequence[str], run: str = "", *, may_share: bool = False) -> int:
    """Return the index of the card that is this process's until it ends or lets go.

    It is one that nobody has, else one with the fewest others. A process that has a card keeps
    it, and can become one that trains.

    Args:
        cards: what tells the machine's cards apart, such as their UUIDs.
        run: the run that trains, empty for whoever only reads.
        may_share: the run may be on a card where another one trains.

    Raises:
        CardError: another run trains on every card.
    """
    global _held
    if _held is not None and run in ("", _held.claim.run):
        return _held.index
    choice = range(len(cards)) if _held is None else [_held.index]
    release_card()
    folder = find_cache_dir() / "cards"
    try:
        make_private_dir(folder)
        with (folder / "choosing.lock").open("a") as choosing:
            fcntl.flock(choosing, fcntl.LOCK_EX)
            claims = _read_claims(folder, removes_dead=True)
            others = {i: [c for c in claims if c.card == cards[i]] for i in choice}
            free = [i for i in choice if may_share or not _rivals(others[i], run)]
            if not free:
                raise CardError(_refuse([c for i in choice for c in _rivals(others[i], run)]))
            index = min(free, key=lambda i: (len(others[i]), i))
            claim = Claim(cards[index], os.getpid(), run, time.strftime("%H:%M"))
            _held = _Held(index, claim, _write_claim(folder, claim))
    except OSError as error:
        print(
            f"Note: nobody else sees that this process uses a GPU, because {folder} cannot be "
            f"written ({error.strerror or error}).",
            file=sys.stderr,
        )
        return choice[0]
    if others[index]:
        who = " and ".join(map(str, others[index]))
        print(f"On the same GPU: {who}. Its memory has to do for all.", file=sys.stderr)
    return index


def release_card() -> None:
    """Let others have this process's card, on which it keeps nothing."""
    global _held
    if _held is not None:
        Path(_held.file.name).unlink(missing_ok=True)
        _held.file.close()
        _held = None


def list_neighbours() -> list[str]:
    """Return, in words, who else computes on this process's card."""
    if _held is None:
        return []
    claims = _read_claims(Path(_held.file.name).parent)
    return [str(c) for c in claims if c.card == _held.claim.card and c != _held.claim]


def _rivals(claims: Sequence[Claim], run: str) -> list[Claim]:
    """Return which of a card's claims keep the run away."""
    return [claim for claim in claims if run and claim.run not in ("", run)]


def _refuse(rivals: Sequence[Claim]) -> str:
    who = ", ".join(map(str, dict.fromkeys(rivals)))
    return (
        f"Another run trains on every GPU here: {who}. Two would each count on memory that the "
        "other one takes. Wait until it has ended, or set federated.share_gpu: true if fedlora "
        "plan says that both fit."
    )


def _read_claims(folder: Path, *, removes_dead: bool = False) -> list[Claim]:
    """Return the claims of living processes, which hold their files' locks."""
    claims = []
    for path in folder.glob("*.json"):
        try:
            with path.open(encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    claims.append(Claim(**json.load(file)))
                    continue
            if removes_dead:
                path.unlink(missing_ok=True)
        except (OSError, ValueError, TypeError):  # gone meanwhile, or not one of ours
            continue
    return claims


def _write_claim(folder: Path, claim: Claim) -> IO[str]:
    # No process id as its name: containers that share the folder number theirs alike.
    number, name = tempfile.mkstemp(suffix=".json", dir=folder, text=True)
    os.close(number)
    file = open(name, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the claim stands
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(asdict(claim), file)
    file.flush()
    return file
