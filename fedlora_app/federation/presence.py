"""Which nodes are gone, and for how long they are waited for.

Flower drops a message when its reply is asked for while its node is offline, which it is a minute
after its last sign of life, and refuses the reply that comes later. As long as nobody asks, the
message waits in the SuperLink, and so does the reply of a node that was only cut off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from flwr.serverapp import Grid


class Presence:
    """Knows since when nodes are gone.

    Args:
        reconnect_seconds: a node that is gone is waited for so long, once.
        tell: is given a node that was seen to be gone.
    """

    def __init__(self, grid: Grid, reconnect_seconds: float, tell: Callable[[int], None]) -> None:
        self._grid = grid
        self._reconnect_seconds = reconnect_seconds
        self._tell = tell
        self._gone_since: dict[int, float] = {}

    def find_awaited(self, nodes: Collection[int]) -> set[int]:
        """Return which of the nodes are gone, and are not given up yet."""
        if not self._reconnect_seconds:
            return set()
        now, online = time.monotonic(), set(self._grid.get_node_ids())
        self._gone_since = {n: t for n, t in self._gone_since.items() if n not in online}
        gone = set(nodes) - online
        for node in sorted(gone - self._gone_since.keys()):
            self._gone_since[node] = now
            self._tell(node)
        return {n for n in gone if now - self._gone_since[n] < self._reconnect_seconds}
