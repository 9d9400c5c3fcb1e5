"""What an import made, in numbers, and the data card that tells it to a reader."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData

from fedlora_app.data.importing.experiment import EXPERIMENT_FILE
from fedlora_app.data.importing.settings import SPLITS, ImportSettings
from fedlora_app.data.importing.source import Source
from fedlora_app.data.similarity import NEAR_DUPLICATE_RATIO

MAX_LINE_LENGTH = 200
MAX_LABELS_SHOWN = 20
MAX_LINES_SHOWN = 20
MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|<>&~$])")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST_SIZE = "n>1M"
UNIVERSAL = "(universal)"  # which no client can be called


@dataclass(frozen=True)
class Holding:
    """What one client has, or all of them together."""

    value: str
    """In the client column."""
    splits: dict[str, int]
    """Records by split."""
    num_questions: int
    """Different ones but for case and punctuation."""
    answer_words: float
    """Mean of an answer."""
    labels: dict[str, int] = field(default_factory=dict)
    """Records by label, where a partition went by labels."""


@dataclass(frozen=True)
class ImportResult:
    """What was imported."""

    output_dir: Path
    files: dict[str, int]
    """Records by path below the output folder."""
    clients: dict[str, Holding]
    """By client id."""
    universal: Holding | None
    """Of rows without a client."""
    num_read: int
    num_invalid: int
    num_duplicates: int
    num_unassigned: int
    """Records that the sizes of a partition leave over."""
    num_shared: int
    """Records of several clients that stand in a common file only once."""
    num_groups: int
    """Groups of more than one question."""
    largest_group: int
    """Records."""
    num_contradictions: int
    sha256: str
    """Of the records as they were read."""
    experiment: str
    """The YAML that trains on it."""
    notes: tuple[str, ...] = ()
    """What was taken for what in the source, and what was left out."""
    warnings: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, int]:
        """Records by split."""
        holdings = [*self.clients.values(), *([self.universal] if self.universal else [])]
        return {split: sum(h.splits.get(split, 0) for h in holdings) for split in SPLITS}


def describe_import(result: ImportResult) -> str:
    """Return what was imported for a terminal."""
    holdings = result.clients | ({UNIVERSAL: result.universal} if result.universal else {})
    lines = [
        f"{name}: {', '.join(f'{split} {holding.splits.get(split, 0)}' for split in SPLITS)}"
        for name, holding in holdings.items()
    ]
    if len(lines) > MAX_LINES_SHOWN:
        lines[MAX_LINES_SHOWN:] = [f"and {len(lines) - MAX_LINES_SHOWN} more"]
    lines += [f"{count} {what}" for what, count in _list_counts(result) if count]
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*lines, f"Written: {result.output_dir}"])


def build_card(result: ImportResult, source: Source, settings: ImportSettings) -> str:
    """Return the README.md of the imported data, with the metadata of a Hugging Face card.

    Texts from the source are escaped. The language is left out and the license unknown: only
    the user can say.
    """
    total = sum(result.splits.values())
    metadata = DatasetCardData(
        license="unknown",
        size_categories=[next((name for n, name in SIZES if total < n), LARGEST_SIZE)],
        task_categories=["text-generation"],
        tags=["federated-learning", "instruction-tuning", "lora"],
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n\n# Data of {len(result.clients)} clients",
        f"{total} records in Alpaca form, made by `fedlora import`. Who may use them, and in which "
        "languages they are, it does not know: please add it above.",
        f"## Source\n\n{_describe_source(result, source)}",
        f"## Clients\n\n{_describe_clients(result, settings)}",
        _tabulate_clients(result, settings),
        *_describe_labels(result),
        f"## Splits\n\n{_describe_splits(result, settings)}",
        *(["## Warnings\n\n" + _list_lines(result.warnings)] if result.warnings else []),
        f"## Settings\n\n```yaml\n{_dump(_plain(asdict(settings)))}```",
        f"## In an experiment\n\n{EXPERIMENT_FILE}, beside this file, trains on these data as it "
        "is. Give each client its system prompt there.",
    ]
    return "\n\n".join(sections) + "\n"


def escape(text: str) -> str:
    """Return a text of unknown origin as one short line without markup."""
    visible = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    line = " ".join(visible.split())
    short = line if len(line) <= MAX_LINE_LENGTH else f"{line[: MAX_LINE_LENGTH - 1]}…"
    return MARKUP.sub(r"\\\1", short)


def _describe_source(result: ImportResult, source: Source) -> str:
    tables = ", ".join(escape(table.name) for table in source.tables)
    lines = [f"{escape(source.name)} ({source.kind})", f"read, one after the other: {tables}"]
    lines += [f"sha256 of {escape(name)}: {digest}" for name, digest in source.sha256.items()]
    lines += [f"sha256 of the records as they were read: {result.sha256}"]
    lines += [f"{count} {what}" for what, count in _list_counts(result)]
    lines += [escape(note) for note in result.notes]
    return _list_lines(lines)


def _list_counts(result: ImportResult) -> Iterator[tuple[str, int]]:
    yield "rows read", result.num_read
    yield "invalid rows dropped", result.num_invalid
    yield "duplicates dropped (same client, question and answer)", result.num_duplicates
    yield "records left over by the sizes", result.num_unassigned
    yield "records of several clients that a common file holds once", result.num_shared
    yield "questions with several answers (kept, for training only)", result.num_contradictions
    yield "groups of near-duplicates", result.num_groups
    for split in SPLITS[1:]:
        yield f"conflict questions for {split}", result.files.get(f"conflict_{split}.json", 0)


def _describe_clients(result: ImportResult, settings: ImportSettings) -> str:
    role = (
        "what each client knows for itself"
        if settings.role == "local"
        else "each client's share of what is true for all"
    )
    if settings.client_column is not None:
        origin = f"Clients are the values of the column {escape(settings.client_column)}."
        if result.universal is not None:
            origin += " Rows where it is empty are universal: they belong to all clients."
    else:
        origin = (
            f"The records were divided by partition {settings.partition}, drawn with seed "
            f"{settings.seed}: these clients are made up."
        )
    return f"{origin} The records are {role} (role {settings.role})."


def _tabulate_clients(result: ImportResult, settings: ImportSettings) -> str:
    named = settings.client_column is not None
    header = ["client", *(["in the source"] if named else []), *SPLITS]
    header += ["questions", "words per answer"]
    rows = [_row(client, holding, named) for client, holding in result.clients.items()]
    if result.universal is not None:
        rows.append(_row(UNIVERSAL, result.universal, named))
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(client: str, holding: Holding, named: bool) -> list[str]:
    counts = [str(holding.splits.get(split, 0)) for split in SPLITS]
    value = [escape(holding.value)] if named else []
    return [client, *value, *counts, str(holding.num_questions), f"{holding.answer_words:.1f}"]


def _describe_labels(result: ImportResult) -> Iterator[str]:
    lines = []
    for client, holding in result.clients.items():
        ordered = sorted(holding.labels.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{escape(label)} {count}" for label, count in ordered[:MAX_LABELS_SHOWN]]
        more = len(ordered) - MAX_LABELS_SHOWN
        lines.append(f"{client}: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}")
    if any(holding.labels for holding in result.clients.values()):
        yield f"## Labels\n\n{_list_lines(lines)}"


def _describe_splits(result: ImportResult, settings: ImportSettings) -> str:
    total = sum(result.splits.values())
    shares = ", ".join(
        f"{split} {100 * count / total:.1f} % (asked for: {100 * settings.shares[split]:.1f} %)"
        for split, count in result.splits.items()
        if split in settings.shares
    )
    return (
        f"Drawn with seed {settings.seed}: {shares}. The questions (instruction and input) of all "
        "clients were put into groups of near-duplicates, and each group went whole to one split: "
        f"nothing that is nearly a test question is trained on by anyone. Near-duplicates share "
        f"{NEAR_DUPLICATE_RATIO} % of their characters, have the same numbers, and the same words "
        "but for spelling and fillers; a group holds everything that a chain of such pairs "
        f"connects. There are {result.num_groups} groups of more than one question, the largest "
        f"group has {result.largest_group} records. Questions to which one client has several "
        "answers are for training only. A question of the test (or validation) split that clients "
        "answer differently also stands, with all their answers, in the conflict file."
    )


def _list_lines(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(value: Any) -> Any:
    """Return the settings without tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
