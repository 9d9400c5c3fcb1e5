"""From somebody's data set to a folder of per-client Alpaca files with a data card.

Everything is a function of the data, the settings and their seed; nothing is written before all
of it is known to be right.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora_app.data.importing.data_card import (
    Holding,
    ImportResult,
    build_card,
)
from fedlora_app.data.importing.experiment import EXPERIMENT_FILE, Base, build_experiment
from fedlora_app.data.importing.folder import name_folder, refuse_taken, write_folder
from fedlora_app.data.importing.partitions import (
    partition_dirichlet,
    partition_growing,
    partition_iid,
    partition_labels,
    partition_sizes,
)
from fedlora_app.data.importing.remarks import describe_unread, find_warnings
from fedlora_app.data.importing.rows import (
    CONFLICT_FILES,
    ImportedRecord,
    Report,
    read_records,
)
from fedlora_app.data.importing.settings import GROWING, SPLITS, TEXT_FIELDS, ImportSettings
from fedlora_app.data.importing.source import load_source
from fedlora_app.data.importing.splits import (
    assign_splits,
    choose_taught,
    group_questions,
    join_groups,
    name_file,
)
from fedlora_app.data.keywords import split_words


def import_data(
    source: str,
    output_dir: Path,
    settings: ImportSettings,
    report: Report = lambda what, done, total: None,
    *,
    root: Path | None = None,
    model: str = "",
    gpu_bytes: int | None = None,
) -> ImportResult:
    """Read, check, divide and split a data set, and write it with its data card and experiment.

    Args:
        source: a file, a folder or a dataset on the hub; the card has it as it is given here.
        output_dir: a new or empty folder; only its owner will be able to read it.
        report: called with what is being done, how far it is, and of how much.
        root: the project that paths are relative to; the working directory by default.
        model: the experiment's base model; empty: what suits the device and the language.
        gpu_bytes: memory of this machine's GPU, None where there is none.

    Raises:
        DataError: the source or its records are wrong, or the folder is taken.
    """
    refuse_taken(output_dir)
    opened = load_source(
        source,
        split=settings.split,
        subset=settings.subset,
        revision=settings.revision,
        encoding=settings.encoding,
    )
    read = read_records(opened, settings, report)
    distinct = _drop_duplicates(read.records)
    records = _assign_clients(distinct, settings)
    groups = _group(read.records, records, report)
    contradictory = _find_contradictory_groups(records, groups, settings)
    facts = [_name_fact(record, settings) for record in records]
    splits = assign_splits(
        groups,
        [record.client for record in records],
        settings.shares,
        seed=settings.seed,
        train_only=choose_taught(groups, facts, contradictory, settings.seed),
        shared=settings.role == "universal",
    )
    files = _build_files(records, splits, settings)
    holdings = _count_holdings(records, splits, read.client_values)
    universal = holdings.pop("", None)
    result = ImportResult(
        output_dir=output_dir,
        files={path: len(content) for path, content in files.items()},
        clients=holdings,
        universal=universal,
        num_read=read.num_rows,
        num_invalid=read.num_invalid,
        num_duplicates=len(read.records) - len(distinct),
        num_unassigned=len(distinct) - len(records),
        num_shared=len(records) - sum(len(c) for p, c in files.items() if p not in CONFLICT_FILES),
        num_groups=_count_groups(records, groups),
        largest_group=max(Counter(groups).values()),
        num_contradictions=sum(contradictory.values()),
        sha256=read.sha256,
        notes=(*describe_unread(opened), *read.notes),
        experiment=build_experiment(
            list(holdings),
            files,
            name_folder(output_dir, root),
            Base(model, gpu_bytes, root or Path.cwd()),
        ),
    )
    result = replace(result, warnings=tuple(find_warnings(result, opened, settings)))
    texts = {
        "README.md": build_card(result, opened, settings),
        EXPERIMENT_FILE: result.experiment,
    }
    write_folder(output_dir, files, texts)
    return result


def _drop_duplicates(
    records: Iterable[ImportedRecord], *, across_clients: bool = False
) -> list[ImportedRecord]:
    """Keep the first of the records (of each client) with the same question and answer."""
    first: dict[tuple[str, str, str], ImportedRecord] = {}
    for record in records:
        client = "" if across_clients else record.client
        first.setdefault((client, record.question, record.answer), record)
    return list(first.values())


def _group(
    read: Sequence[ImportedRecord], records: Sequence[ImportedRecord], report: Report
) -> list[int]:
    """Return for every record the number of its group, which goes whole to one split.

    Args:
        read: the records before duplicates were dropped, which can connect conversations.
    """
    groups = group_questions([record.question for record in read], report)
    joined = join_groups(groups, [record.row for record in read])
    group_of = dict(zip((record.question for record in read), joined, strict=True))
    order: dict[int, int] = {}
    return [order.setdefault(group_of[r.question], len(order)) for r in records]


def _assign_clients(
    records: list[ImportedRecord], settings: ImportSettings
) -> list[ImportedRecord]:
    """Return the records with their clients, without those that a partition leaves over.

    The records of a row, which is a conversation then, stay together.
    """
    if settings.partition is None:
        return records
    label_of = {record.row: record.label for record in records}
    labels = list(label_of.values())
    number, seed = settings.num_clients or len(settings.sizes), settings.seed
    if settings.partition == "iid":
        owners = partition_iid(len(labels), number, seed)
    elif settings.partition == "sizes":
        owners = partition_sizes(len(labels), settings.sizes, seed)
    elif settings.partition == "label":
        owners = partition_labels(labels, number, settings.labels_per_client, seed)
    elif settings.partition in GROWING:
        owners = partition_growing(len(labels), number, settings.partition, seed)
    else:
        owners = partition_dirichlet(
            labels, number, settings.dirichlet_alpha, seed, min_records=len(settings.shares)
        )
    digits = len(str(number))
    owner_of = dict(zip(label_of, owners, strict=True))
    return [
        replace(record, client=f"client-{owner + 1:0{digits}}")
        for record in records
        if (owner := owner_of[record.row]) is not None
    ]


def _name_fact(record: ImportedRecord, settings: ImportSettings) -> tuple[str, str] | None:
    """Return whose fact a record is a wording of, and which; None where no column says so."""
    fact = record.fields.get("fact") if settings.fact_column is not None else None
    return (record.client, fact) if fact else None


def _find_contradictory_groups(
    records: Sequence[ImportedRecord], groups: Sequence[int], settings: ImportSettings
) -> Counter[int]:
    """Return groups with questions to which one file could hold several answers, and how many.

    With a partition, or where clients share their test, that is whoever gave the answers.
    """
    own = settings.client_column is not None and settings.role == "local"
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    group_of: dict[str, int] = {}
    for record, group in zip(records, groups, strict=True):
        answers[record.client if own else "", record.question].add(record.answer)
        group_of[record.question] = group
    return Counter(group_of[question] for (_, question), a in answers.items() if len(a) > 1)


def _build_files(
    records: Sequence[ImportedRecord], splits: Sequence[str], settings: ImportSettings
) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every file by its path, in the order of the source."""
    contents: dict[str, list[ImportedRecord]] = defaultdict(list)
    for record, split in zip(records, splits, strict=True):
        contents[name_file(record.client, split, settings.role)].append(record)
    files = {
        path: [r.fields for r in _drop_duplicates(contents[path], across_clients=True)]
        for path in sorted(contents)
    }
    if settings.client_column is not None and settings.role == "local":
        for split in SPLITS[1:]:
            held = (r for r, own in zip(records, splits, strict=True) if own == split)
            conflicts = _find_conflicts(held)
            files |= {f"conflict_{split}.json": conflicts} if conflicts else {}
    return files


def _find_conflicts(records: Iterable[ImportedRecord]) -> list[dict[str, Any]]:
    """Return the questions that clients answer differently, with fields that all agree on."""
    asked: dict[str, list[ImportedRecord]] = defaultdict(list)
    for record in records:
        if record.client:
            asked[record.question].append(record)
    return [_build_conflict(same) for same in asked.values() if len({r.answer for r in same}) > 1]


def _build_conflict(records: Sequence[ImportedRecord]) -> dict[str, Any]:
    first = records[0].fields
    answers = {record.client: record.fields["output"] for record in records}
    agreed = {
        name: value
        for name, value in first.items()
        if name not in TEXT_FIELDS and all(r.fields.get(name) == value for r in records)
    }
    question = {"instruction": first["instruction"], "input": first["input"]}
    return question | agreed | {"answers": dict(sorted(answers.items()))}


def _count_holdings(
    records: Sequence[ImportedRecord], splits: Sequence[str], values: Mapping[str, str]
) -> dict[str, Holding]:
    """Return what each client has, sorted by id, the universal records under the empty one."""
    held: dict[str, list[tuple[ImportedRecord, str]]] = defaultdict(list)
    for record, split in zip(records, splits, strict=True):
        held[record.client].append((record, split))
    return {
        client: Holding(
            value=values.get(client, ""),
            splits=dict(Counter(split for _, split in own)),
            num_questions=len({record.question for record, _ in own}),
            answer_words=statistics.fmean(len(split_words(r.fields["output"])) for r, _ in own),
            labels=dict(Counter(record.label for record, _ in own if record.label)),
        )
        for client, own in sorted(held.items())
    }


def _count_groups(records: Sequence[ImportedRecord], groups: Sequence[int]) -> int:
    questions: dict[int, set[str]] = defaultdict(set)
    for record, group in zip(records, groups, strict=True):
        questions[group].add(record.question)
    return sum(len(members) > 1 for members in questions.values())
