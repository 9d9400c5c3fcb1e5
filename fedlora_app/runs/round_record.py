"""One round as the run records it: the adapters it wrote, who failed, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fedlora_app.federation.replies import RoundError
from fedlora_app.runs.directory import SERVER, RunDirectory
from fedlora_app.runs.manifest import WEIGHTS


class RoundRecord:
    """What happens in one round, until it is complete.

    Args:
        server_round: the round's number in the run.
        report: called with one line for every client that fails.
    """

    def __init__(
        self, run: RunDirectory, server_round: int, report: Callable[[str], None] = print
    ) -> None:
        self.server_round = server_round
        self.failures: dict[str, str] = {}
        """Each client that returned no valid results, and why."""
        self.adapters: dict[str, str] = {}
        """Sha256 of the adapters that the round wrote: "global", and "local:" with a client."""
        self.weights: dict[str, int] = {}
        """How much each update counted that is kept."""
        self.add_metrics = partial(run.add_metrics, server_round)
        self._run = run
        self._report = report
        self._started = time.monotonic()

    def log(self, event: str, **fields: Any) -> None:
        """Append one event of this round to the run's log."""
        self._run.log_event(event, round=self.server_round, **fields)

    def tell(self, event: str, client: str, why: str) -> None:
        """Record a reply that does not count; a "failure" is reported and kept with its reason."""
        if event != "failure":
            self.log(event, client=client)
            return
        self.failures[client] = why
        self._run.add_failure(self.server_round, client, why)
        self._report(f"round {self.server_round}: {why}")

    def require_valid(self, num_valid: int, required: int, num_asked: int) -> None:
        """Raise ``RoundError`` if too few clients returned valid results."""
        if num_valid < required:
            reasons = "\n".join(f"  {reason}" for reason in self.failures.values())
            raise RoundError(
                f"Round {self.server_round}: {num_valid} of {num_asked} clients returned valid "
                f"results and {required} are required (federated.min_clients).\n{reasons}\n"
                f"The last complete round in {self._run.path} is untouched."
            )

    def complete(self, traffic: dict[str, dict[str, int]], metrics: dict[str, Any]) -> float:
        """Enter the round in the manifest and return how long it took, in seconds.

        Args:
            traffic: bytes to and from each client, by kind.
            metrics: what the server has measured of the average.
        """
        for client, counts in sorted(traffic.items()):
            self.add_metrics(client, "traffic", counts)
        seconds = time.monotonic() - self._started
        self.add_metrics(SERVER, "aggregate", metrics | {"round_seconds": seconds})
        facts: dict[str, Any] = {"seconds": round(seconds, 3)}
        if self.weights:
            facts[WEIGHTS] = dict(self.weights)
        if self.failures:
            facts["failures"] = dict(self.failures)
        self._run.complete_round(self.server_round, dict(self.adapters), **facts)
        return seconds
