"""What is wrong with the question sets, told before any model is loaded.

Goes over a client's files once they are read: questions that were trained on, contradictions,
keywords that cannot do their work, and questions that can be answered without knowing anything.
An *error* makes a result wrong, a *warning* makes it worth less than it looks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora_app.config.schema import Config
from fedlora_app.data.linter.answers import (
    find_agreed_conflicts,
    find_empty_answers,
    find_missing_facts,
    find_right_distractors,
)
from fedlora_app.data.linter.coverage import (
    find_foreign_scripts,
    find_ignored_fields,
    find_missing_sets,
    find_silent_clients,
)
from fedlora_app.data.linter.giveaways import (
    find_telling_lengths,
    find_telling_prompts,
    find_telling_questions,
)
from fedlora_app.data.linter.keyword_checks import (
    find_keyword_clashes,
    find_low_keyword_ceilings,
    find_unknown_keyword_owners,
    keyword_ceiling,
)
from fedlora_app.data.linter.repeats import find_duplicates, find_repeated_questions
from fedlora_app.data.linter.subject import (
    Finding,
    LintedClient,
    collect_clients,
    format_count,
)
from fedlora_app.data.linter.support import find_small_sets, find_untrained_answers

if TYPE_CHECKING:
    from fedlora_app.data.client_files import ClientFiles

__all__ = [
    "CHECKS",
    "Finding",
    "describe_findings",
    "keyword_ceiling",
    "lint",
    "summarise_findings",
]

CHECKS: tuple[Callable[[LintedClient, Config], Iterator[Finding]], ...] = (
    find_missing_sets,
    find_missing_facts,
    find_untrained_answers,
    find_small_sets,
    find_silent_clients,
    find_agreed_conflicts,
    find_empty_answers,
    find_right_distractors,
    find_ignored_fields,
    find_foreign_scripts,
    find_repeated_questions,
    find_duplicates,
    find_keyword_clashes,
    find_unknown_keyword_owners,
    find_low_keyword_ceilings,
    find_telling_prompts,
    find_telling_questions,
    find_telling_lengths,
)
"""All that is looked for at every client; one more check is one more function here."""


def lint(
    config: Config, files: Mapping[str, ClientFiles], root: Path | None = None
) -> list[Finding]:
    """Return what is wrong with the clients' files, errors first, each finding once.

    Args:
        files: by client id; those of some clients only are enough.
        root: the project; files below it are named relative to it.
    """
    findings = (
        finding
        for client in collect_clients(config, files, root)
        for check in CHECKS
        for finding in check(client, config)
    )
    return sorted(
        dict.fromkeys(findings),
        key=lambda f: (f.severity != "error", f.file, f.record or 0, f.rule, f.text),
    )


def describe_findings(findings: Sequence[Finding], *, every: bool = False) -> str:
    """Return the findings for a terminal, and how many there are.

    Args:
        every: a line each, and not one of each kind as ``summarise_findings`` has it.
    """
    if not findings:
        return "No findings."
    lines = list(map(str, findings)) if every else summarise_findings(findings)
    counts = Counter(finding.severity for finding in findings)
    parts = (format_count(counts[name], name) for name in ("error", "warning") if counts[name])
    more = "" if len(lines) == len(findings) else "; fedlora check CONFIG --all lists each"
    return "\n".join([*lines, ", ".join(parts) + more])


def summarise_findings(findings: Sequence[Finding]) -> list[str]:
    """Return one line for each kind of finding: the first of it, and how many more there are."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.rule].append(finding)
    lines = []
    for (_, rule), (first, *rest) in groups.items():
        files = len({finding.file for finding in (first, *rest)})
        places = f" in {files} files" if files > 1 else ""
        lines.append(f"{first} And {len(rest)} more{places} ({rule})." if rest else str(first))
    return lines
