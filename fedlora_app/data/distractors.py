"""Wrong answers to rank a right one against, drawn where the data give none.

They are other facts' answers: of the same kind where the data say a kind, and of nearly the same
length. A sum of log-likelihoods prefers short answers and a mean per byte long ones, so among
candidates of unlike lengths a ranking is a test of length. Lengths are in UTF-8 bytes, which
unlike tokens are the same for every model.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from fedlora_app.data.records import Record
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.foundation.seeds import derive_seed

NUM_DRAWN = 3
KIND_END = re.compile(r"\s*[:/|：／｜]")


def kind_of(fact: str | None) -> str | None:
    """Return a fact's kind, as "fee" in "fee: a dog": what precedes a colon, slash or bar."""
    parts = KIND_END.split(fact or "", maxsplit=1)
    return parts[0] if len(parts) > 1 else None


class Distractors:
    """The answers of a set of records, each of which may be a wrong one for another fact."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._right: dict[str, set[str]] = defaultdict(set)
        by_kind: dict[str, set[str]] = defaultdict(set)
        for record in records:
            if record.fact:
                self._right[record.fact].add(normalise_answer(record.output))
            if kind := kind_of(record.fact):
                by_kind[kind].add(record.output)
        self._by_kind = {kind: _ByLength(texts) for kind, texts in by_kind.items()}
        self._all = _ByLength(record.output for record in records)

    def draw(self, record: Record) -> list[str]:
        """Return wrong answers for a record, the same ones whatever the order of the file."""
        rng = random.Random(derive_seed("distractors", record.instruction, record.input))
        right = self._right.get(record.fact or "", set()) | {normalise_answer(record.output)}
        length = len(record.output.encode())
        same_kind = self._by_kind.get(kind_of(record.fact) or "")
        drawn: dict[str, str] = {}
        for answers in filter(None, (same_kind, self._all)):
            for text in answers.nearest(length, rng):
                if len(drawn) == NUM_DRAWN:
                    break
                if (said := normalise_answer(text)) not in right:
                    drawn.setdefault(said, text)
        return list(drawn.values())


class _ByLength:
    """Distinct texts by their length in bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        pairs = sorted((len(text.encode()), text) for text in set(texts))
        self._lengths = [length for length, _ in pairs]
        self._texts = [text for _, text in pairs]

    def nearest(self, length: int, rng: random.Random) -> Iterator[str]:
        """Yield the texts from the nearest length to the farthest, begun anywhere among equals."""
        lengths, end = self._lengths, len(self._lengths)
        above = rng.randint(bisect_left(lengths, length), bisect_right(lengths, length))
        below = above - 1
        while below >= 0 or above < end:
            shorter = length - lengths[below] if below >= 0 else math.inf
            longer = lengths[above] - length if above < end else math.inf
            if shorter < longer or (shorter == longer and rng.random() < 0.5):
                yield self._texts[below]
                below -= 1
            else:
                yield self._texts[above]
                above += 1
