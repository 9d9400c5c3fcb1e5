"""What an import tells its user beside the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from fedlora_app.data.importing.data_card import ImportResult
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
from fedlora_app.data.importing.settings import ImportSettings
from fedlora_app.data.importing.source import FILE, HUB, Source
from fedlora_app.data.importing.splits import TRAIN, name_file

MAX_NAMES_SHOWN = 10
MANY_CLIENTS, FEW_RECORDS = 12, 20
MAX_SHARE_GAP = 0.05  # between a split's realised and its asked-for share


def find_warnings(result: ImportResult, source: Source, settings: ImportSettings) -> Iterator[str]:
    """Yield what an import could not do as asked, and what looks odd."""
    idle = [*settings.idle]
    idle += [n for n in ("subset", "revision") if getattr(settings, n) and source.kind != HUB]
    idle += ["split"] if settings.split and source.kind == FILE else []
    yield from (f"{name} has no effect here." for name in idle)
    total = sum(result.splits.values())
    num_holders = len(result.clients) + (result.universal is not None)
    why = "their groups of near-duplicates were needed in other splits."
    if settings.fact_column is not None:
        why = "too few facts have a second wording."
    for split, share in settings.shares.items():
        found, gap = result.splits[split] / total, abs(result.splits[split] - share * total)
        if found and gap > max(MAX_SHARE_GAP * total, num_holders):  # each is rounded by itself
            yield (
                f"{split} has {100 * found:.0f} % of the records and not {100 * share:.0f} %: too "
                "few groups of near-duplicates could be moved."
            )
        without = [
            holder
            for holder, path in _expected_files(result, split, settings.role)
            if path not in result.files
        ]
        if without:
            more = len(without) - MAX_NAMES_SHOWN
            yield (
                f"{split} has no records of {', '.join(without[:MAX_NAMES_SHOWN])}"
                f"{f' and {more} more' if more > 0 else ''}: {why}"
            )
    if result.universal is None and settings.role == "local":
        yield (
            "There are no universal records here, so nothing is shared. Leave the client cell of "
            "rows empty that hold for all clients; or import such records into another folder with "
            f"--role universal, and name their files in {EXPERIMENT_FILE}."
        )
    if settings.role == "universal":
        yield (
            "There are no local records here. Import what each client knows for itself into "
            f"another folder, and name its files in {EXPERIMENT_FILE}."
        )
    yield from _find_odd_clients(result, settings)


def describe_unread(source: Source) -> Iterator[str]:
    """Yield what of a folder was not read."""
    if source.unread:
        more = len(source.unread) - MAX_NAMES_SHOWN
        yield (
            f"Not read in the folder: {', '.join(source.unread[:MAX_NAMES_SHOWN])}"
            f"{f' and {more} more' if more > 0 else ''}. Import them by themselves."
        )


def _find_odd_clients(result: ImportResult, settings: ImportSettings) -> Iterator[str]:
    """Remark a column that is likely not whose a row is."""
    trained = [holding.splits.get(TRAIN, 0) for holding in result.clients.values()]
    if settings.client_column is None or len(trained) <= MANY_CLIENTS:
        return
    if (typical := statistics.median(trained)) < FEW_RECORDS:
        yield (
            f'the column "{settings.client_column}" makes {len(trained)} clients, most with '
            f"{typical:g} training records or fewer. Each is an organisation that trains by "
            "itself: is another column meant?"
        )


def _expected_files(result: ImportResult, split: str, role: str) -> Iterator[tuple[str, str]]:
    """Yield whose files of a split there should be, and their paths."""
    if role == "universal" and split != TRAIN:
        yield "all clients", name_file("", split, role)
        return
    for client in result.clients:
        yield client, name_file(client, split, role)
    if result.universal is not None:
        yield "universal data", name_file("", split, role)
