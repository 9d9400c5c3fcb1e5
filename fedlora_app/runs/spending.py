"""What a run spends of its clients' privacy, round after round.

The server's own releases are kept in a list of their own, beside the secret of their noise, which a
rewind leaves alone: what has been told cannot be taken back. One that is made again from the same
updates has the same noise, so it is the same release; a round that is repeated with others counts
twice.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fedlora_app.config.schema import Config
from fedlora_app.federation.accountant import (
    compute_epsilon,
    most_rounds,
    noise_multiplier_for,
    record_epsilon,
)
from fedlora_app.federation.privacy import Release
from fedlora_app.federation.replies import RoundError
from fedlora_app.foundation.files import extend_atomically
from fedlora_app.runs.directory import SERVER
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.runs.round_record import RoundRecord

PRIVACY = "privacy"
"""What the history calls the phase of these entries."""
BUDGET_SLACK = 1e-6


class Spending:
    """The privacy that has been spent in a run, and the budget that it must stay in.

    Args:
        paths: of the run; the list of releases is the server's.
    """

    def __init__(self, config: Config, paths: RunPaths) -> None:
        self._config = config
        self._paths = paths

    def note(self, release: Release) -> None:
        """Enter what is about to be told to everybody.

        Raises:
            RoundError: it would spend more than ``privacy.epsilon``; nothing is entered.
        """
        releases = _read_releases(self._paths)
        if release in releases:
            return
        budget, spent = self._config.privacy.epsilon, self._compute([*releases, release])
        if budget is not None and spent > budget * (1 + BUDGET_SLACK):
            raise RoundError(
                f"Round {release.server_round}: with its average a client would have spent epsilon "
                f"{spent:.3g}, and privacy.epsilon is {budget:g}. Earlier rounds were repeated "
                "with other updates, which told more than was planned. Nothing of this round was "
                f"sent. The last complete round in {self._paths.folder} is untouched; use that, "
                "or start a new run."
            )
        extend_atomically(self._paths.releases, _write_line(release))

    def enter(self, record: RoundRecord, reports: dict[str, dict[str, Any]]) -> None:
        """Enter in the history what has been spent until the end of a round.

        Args:
            reports: what each client said when it registered.
        """
        privacy = self._config.privacy
        if privacy.unit == "none" or record.server_round == 0:
            return
        if privacy.unit == "client":
            record.add_metrics(SERVER, PRIVACY, self._describe_clients(record.server_round))
            return
        for client, report in sorted(reports.items()):
            figures = self._describe_records(client, report, record.server_round)
            record.add_metrics(client, PRIVACY, figures)

    def _describe_clients(self, server_round: int) -> dict[str, Any]:
        privacy = self._config.privacy
        multiplier = noise_multiplier_for(self._config)
        if multiplier is None or privacy.delta is None:
            return {"unit": privacy.unit}
        if privacy.noise == "server":
            epsilon = self._compute(_read_releases(self._paths))
        else:  # whoever is asked has to be taken for having answered
            rounds = most_rounds(self._config, server_round)
            epsilon = compute_epsilon(privacy.delta, [(multiplier, rounds)])
        return _figures(self._config, epsilon, multiplier)

    def _describe_records(
        self, client: str, report: dict[str, Any], server_round: int
    ) -> dict[str, Any]:
        counts = (report["universal_examples"], report["local_examples"])
        epsilon = record_epsilon(self._config, client, counts, server_round)
        if epsilon is None:
            return {"unit": self._config.privacy.unit}
        return _figures(self._config, epsilon, noise_multiplier_for(self._config, client, counts))

    def _compute(self, releases: list[Release]) -> float:
        """Return the epsilon of the client of which releases tell most."""
        delta = self._config.privacy.delta
        assert delta is not None, "noise without a delta was refused"
        of_client: dict[str, Counter[float]] = {}
        for release in releases:
            for client in release.clients:
                of_client.setdefault(client, Counter())[release.noise_multiplier] += 1
        kinds = {tuple(sorted(counts.items())) for counts in of_client.values()}
        return max((compute_epsilon(delta, kind) for kind in kinds), default=0.0)


def _figures(config: Config, epsilon: float, multiplier: float | None) -> dict[str, Any]:
    return {
        "unit": config.privacy.unit,
        "epsilon": epsilon,
        "delta": config.privacy.delta,
        "noise_multiplier": multiplier,
    }


def _write_line(release: Release) -> str:
    return json.dumps(vars(release)) + "\n"


def _read_releases(paths: RunPaths) -> list[Release]:
    """Return what has been told so far.

    Raises:
        RunDirectoryError: the list is damaged.
    """
    try:
        text = paths.releases.read_text(encoding="utf-8") if paths.releases.exists() else ""
        entries = [json.loads(line) for line in text.splitlines()]
        return [Release(**entry | {"clients": tuple(entry["clients"])}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunDirectoryError(
            f"{paths.releases} cannot be read ({type(error).__name__}). Expected what the run has "
            "spent of its clients' privacy. Restore it, or start a new run."
        ) from None
