"""What is wrong with the question sets, told before any model is loaded.

Goes over a client's files once they are read: questions that were trained on, contradictions,
keywords that cannot do their work, and questions that can be answered without knowing anything.
An *error* makes a result wrong, a *warning* makes it worth less than it looks.
"""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scipy import stats

from fedlora_app.config.schema import ClientConfig, Config
from fedlora_app.data.keywords import passes_keyword_rule
from fedlora_app.data.questions import (
    CONFLICT,
    LOCAL_SET,
    UNIVERSAL,
    Question,
    build_conflict_questions,
    build_questions,
)
from fedlora_app.data.records import ConflictRecord, Record, RecordFile, format_question
from fedlora_app.data.similarity import (
    SHORT_HAN_TEXT,
    content_words,
    dominant_script,
    match_nearly,
    most_common,
    normalise_question,
)

if TYPE_CHECKING:
    from fedlora_app.data.client_files import ClientFiles

Severity = Literal["error", "warning"]

MIN_KEYWORD_CEILING = 0.9
MIN_PROMPT_SHARE = 0.05
LENGTH_P_VALUE = 0.001
MIN_LENGTH_CLUSTERS = 10
MAX_SCRIPT_SHARE = 0.1
MAX_WORDS_SHOWN = 5
MAX_LINES_PER_RULE = 20  # of one file; further findings are counted only


@dataclass(frozen=True)
class Finding:
    """One thing to fix or to know. ``record`` counts from 1, None for a whole file."""

    severity: Severity
    rule: str
    file: str
    record: int | None
    text: str

    def __str__(self) -> str:
        """Return the finding on one line."""
        place = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{self.severity}: {place}: {self.text}"


@dataclass(frozen=True, eq=False)
class _File:
    """A data file as the rules see it."""

    name: str
    kind: str
    source: RecordFile

    @property
    def records(self) -> list[Record | ConflictRecord]:
        return self.source.records

    @cached_property
    def questions(self) -> list[str]:
        """The normalised questions in the order of the records."""
        return [normalise_question(format_question(record)) for record in self.records]

    @cached_property
    def first_positions(self) -> dict[str, int]:
        """Where each question stands first."""
        positions: dict[str, int] = {}
        for position, question in enumerate(self.questions):
            positions.setdefault(question, position)
        return positions

    def finding(self, severity: Severity, rule: str, position: int | None, text: str) -> Finding:
        if position is None:
            return Finding(severity, rule, self.name, None, text)
        return Finding(severity, rule, self.name, position + 1, f"{text}{self._numbering}")

    def place(self, position: int) -> str:
        return f"{self.name}, record {position + 1}{self._numbering}"

    @property
    def _numbering(self) -> str:
        skipped = self.source.num_skipped
        return f" (counted without the {skipped} invalid ones of this file)" if skipped else ""


@dataclass(frozen=True)
class _Client:
    """A client with its files by what they are for."""

    config: ClientConfig
    training: list[_File]
    tests: list[_File]
    validations: list[_File]

    @property
    def question_files(self) -> list[_File]:
        return [*self.tests, *self.validations]

    def build_questions(self, file: _File) -> list[Question]:
        if file.kind == CONFLICT:
            return build_conflict_questions(file.records, self.config.id)
        return build_questions(file.records, client_id=self.config.id)


def lint(
    config: Config, files: Mapping[str, ClientFiles], root: Path | None = None
) -> list[Finding]:
    """Return what is wrong with the clients' files, errors first, each finding once.

    Args:
        files: by client id; those of some clients only are enough.
        root: the project; files below it are named relative to it.
    """
    clients = _collect(config, files, root)
    findings = [*find_missing_sets(config, clients)]
    for client in clients:
        findings += find_repeated_questions(client)
        findings += find_foreign_scripts(client)
        for file in client.training:
            findings += find_duplicates(file, contradiction="warning")
        for file in client.question_files:
            findings += find_duplicates(file, contradiction="error")
            findings += find_keyword_clashes(file)
            findings += find_unknown_keyword_owners(file, config.client_ids)
            findings += find_low_keyword_ceiling(file, client.config.id)
            questions = client.build_questions(file)
            findings += find_telling_prompt(file, questions, client.config)
            findings += find_telling_questions(file, questions, client.config.id)
            findings += find_telling_lengths(file, questions, client.config.id)
    return sorted(
        dict.fromkeys(findings),
        key=lambda f: (f.severity != "error", f.file, f.record or 0, f.rule, f.text),
    )


def describe_findings(findings: Sequence[Finding]) -> str:
    """Return the findings for a terminal, one line each, and how many there are."""
    if not findings:
        return "No findings."
    groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.file, finding.rule].append(finding)
    lines = []
    for (severity, file, rule), group in groups.items():
        lines += map(str, group[:MAX_LINES_PER_RULE])
        if len(group) > MAX_LINES_PER_RULE:
            more = len(group) - MAX_LINES_PER_RULE
            lines.append(f"{severity}: {file}: {more} more of this kind ({rule}).")
    counts = Counter(finding.severity for finding in findings)
    parts = (_count(counts[name], name) for name in ("error", "warning") if counts[name])
    return "\n".join([*lines, ", ".join(parts)])


def keyword_ceiling(
    records: Sequence[Record | ConflictRecord], client_id: str | None, plain: bool = False
) -> tuple[int, int]:
    """Return how many gold answers pass the keyword rule, and how many there are.

    An answer of which the record does not say whose it is passes if it does so for one of the
    clients. Records without keywords, or without an answer, do not count.

    Args:
        client_id: whose answers; None for those of all clients.
        plain: apply the bare substring rule.
    """
    outcomes = [
        any(_passes(record, gold, owner, plain) for owner in owners)
        for record in records
        for gold, owners in _gold_answers(record, client_id)
    ]
    return sum(outcomes), len(outcomes)


def find_repeated_questions(client: _Client) -> Iterator[Finding]:
    """Find test and validation questions that were trained on or chosen on."""
    for trained in client.training:
        for file in client.tests:
            yield from _compare(file, trained, "test-in-training", "error")
        for file in client.validations:
            yield from _compare(file, trained, "validation-in-training", "error")
    for file in client.tests:
        for chosen in client.validations:
            yield from _compare(file, chosen, "test-in-validation", "warning")


def find_duplicates(file: _File, contradiction: Severity) -> Iterator[Finding]:
    """Find questions that a file asks twice, with one answer or with two.

    Args:
        contradiction: how bad two answers are; instruction data may well have several.
    """
    for position, question in enumerate(file.questions):
        first = file.first_positions[question]
        if first == position:
            continue
        if _answers(file.records[first]) == _answers(file.records[position]):
            text = f"asks the same as record {first + 1} and has the same answer. Remove one."
            yield file.finding("warning", "duplicate", position, text)
            continue
        severity = "warning" if file.kind == CONFLICT else contradiction
        text = f"asks the same as record {first + 1} but has another answer. Keep the right one."
        yield file.finding(severity, "contradiction", position, text)


def find_keyword_clashes(file: _File) -> Iterator[Finding]:
    """Find keywords that are, or hold, another client's keyword of the same record."""
    clashes: dict[tuple[Severity, str], list[int]] = defaultdict(list)
    for position, record in enumerate(file.records):
        for (one, one_words), (other, other_words) in combinations(record.keywords.items(), 2):
            for clash in _clashes(one, one_words, other, other_words):
                clashes[clash].append(position)
    for (severity, text), positions in clashes.items():
        found = len(set(positions))
        more = f" So in {found} records." if found > 1 else ""
        yield file.finding(severity, "keyword-clash", positions[0], text + more)


def find_unknown_keyword_owners(file: _File, client_ids: Sequence[str]) -> Iterator[Finding]:
    """Find keywords of somebody who is no client."""
    owners: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(file.records):
        for owner in set(record.keywords) - set(client_ids):
            owners[owner].append(position)
    for owner, positions in owners.items():
        text = (
            f'has keywords of "{owner}", which is no client (so in {_count(len(positions))}). '
            f"Clients: {', '.join(client_ids)}."
        )
        yield file.finding("warning", "keyword-owner", positions[0], text)


def find_low_keyword_ceiling(file: _File, client_id: str) -> Iterator[Finding]:
    """Find files whose gold answers themselves fail the keyword rule too often."""
    owner, by_client = client_id, {}
    if file.kind == CONFLICT:
        owner = None
        ids = sorted({client for record in file.records for client in record.answers})
        by_client = {client: keyword_ceiling(file.records, client) for client in ids}
    passed, n = keyword_ceiling(file.records, owner)
    lowest = min((p / m for p, m in [(passed, n), *by_client.values()] if m), default=1.0)
    if lowest >= MIN_KEYWORD_CEILING:
        return
    whose = "" if owner is None else f" of client {owner}"
    each = ", ".join(f"{client} {p} of {m}" for client, (p, m) in by_client.items() if m)
    plain, _ = keyword_ceiling(file.records, owner, plain=True)
    text = (
        f"only {passed} of {n} gold answers{whose} pass the keyword rule "
        f"({_percent(passed, n)}{f'; {each}' if each else ''}), and {plain} of {n} the plain "
        f"substring rule ({_percent(plain, n)}). No model can be told to do better; fix the "
        "keywords, or give the records answers and distractors."
    )
    yield file.finding("warning", "keyword-ceiling", None, text)


def find_telling_prompt(
    file: _File, questions: Sequence[Question], client: ClientConfig
) -> Iterator[Finding]:
    """Find words of the right answers that the client's system prompt already says."""
    prompt = content_words(client.system_prompt)
    words: Counter[str] = Counter()
    num_told = 0
    for question in questions:
        right, *wrong = _candidate_words(question)
        telling = (right & prompt) - content_words(question.text)
        telling -= set.intersection(set(right), *wrong)
        words.update(telling)
        num_told += bool(telling)
    if not num_told or num_told < MIN_PROMPT_SHARE * len(questions):
        return
    text = (
        f"the system prompt of client {client.id} says {_list_words(words)}, which tells the right "
        f"answer from others in {num_told} of {len(questions)} questions "
        f"({_percent(num_told, len(questions))}). Take it out of the prompt, so that the "
        "answers come from what was trained."
    )
    yield file.finding("warning", "telling-prompt", None, text)


def find_telling_questions(
    file: _File, questions: Sequence[Question], client_id: str
) -> Iterator[Finding]:
    """Find questions with a word that only the right candidate has."""
    words: Counter[str] = Counter()
    positions = []
    for question in questions:
        right, *wrong = _candidate_words(question)
        telling = (right & content_words(question.text)) - set().union(*wrong)
        if wrong and telling:
            words.update(telling)
            positions.append(question.record)
    if not positions:
        return
    text = (
        f"{len(positions)} of {len(questions)} questions{_for_client(file, client_id)} hold a word "
        f"that of all candidates only the right one has: {_list_words(words)}. Give these records "
        "distractors on the same matter."
    )
    yield file.finding("warning", "telling-question", positions[0], text)


def find_telling_lengths(
    file: _File, questions: Sequence[Question], client_id: str
) -> Iterator[Finding]:
    """Find question sets in which the length of an answer says too often that it is right.

    Paraphrases of one fact share their answers, so each fact counts once in the test.
    """
    asked = [question for question in questions if len(question.candidates) > 1]
    num_clusters = len({question.cluster for question in asked})
    if num_clusters < MIN_LENGTH_CLUSTERS:
        return
    for name, extreme in (("longest", max), ("shortest", min)):
        hits = _cluster_means(asked, [_share_of_extreme(q.candidates, extreme) for q in asked])
        chances = _cluster_means(asked, [1 / len(question.candidates) for question in asked])
        chance = statistics.fmean(chances)
        num_right = math.floor(sum(hits) + 1e-9)
        test = stats.binomtest(num_right, num_clusters, chance, alternative="greater")
        if test.pvalue < LENGTH_P_VALUE:
            text = (
                f'"pick the {name} candidate"{_for_client(file, client_id)} is right for '
                f"{100 * statistics.fmean(hits):.0f} % of {num_clusters} facts (n = {len(asked)} "
                f"questions), against {100 * chance:.0f} % by chance. Give the records "
                "distractors of the same length."
            )
            yield file.finding("warning", "telling-length", None, text)


def find_missing_sets(config: Config, clients: Sequence[_Client]) -> Iterator[Finding]:
    """Find clients, and halves of the method, about which nothing would be asked."""
    for client in clients:
        kinds = {file.kind for file in client.tests if client.build_questions(file)}
        if not kinds & {LOCAL_SET, CONFLICT}:
            text = (
                f"client {client.config.id} has no local question: no local_test, and no answer "
                "or keyword in a conflict file. Whether its local adapter works stays unknown."
            )
            yield Finding("warning", "missing-questions", "federated.clients", None, text)
        if UNIVERSAL not in kinds:
            text = "is not set. Whether the global adapter works stays unknown."
            yield Finding("warning", "missing-questions", "data.universal_test", None, text)
    for file in dict.fromkeys(file for client in clients for file in client.question_files):
        if file.kind == CONFLICT:
            yield from _find_silent_clients(file, config.client_ids)


def find_foreign_scripts(client: _Client) -> Iterator[Finding]:
    """Find answers in another script than those of the training, or than their questions."""
    for file in client.question_files:
        whose = _for_client(file, client.config.id)
        answers = [_gold(record, client.config.id) for record in file.records]
        trained = _trained_script(client, UNIVERSAL if file.kind == UNIVERSAL else LOCAL_SET)
        asked = [dominant_script(format_question(record)) for record in file.records]
        for expected, what in (
            ([trained] * len(answers), f"the training answers, which are mostly {trained}"),
            (asked, "their questions"),
        ):
            different = _find_mismatches(answers, expected)
            if len(different) > MAX_SCRIPT_SHARE * len(answers):
                counts = Counter(dominant_script(answers[position]) for position in different)
                listed = ", ".join(f"{n} in {script}" for script, n in counts.most_common())
                text = (
                    f"{len(different)} of {len(answers)} answers{whose} are in another script "
                    f"than {what}: {listed}."
                )
                yield file.finding("warning", "script", different[0], text)


def _collect(config: Config, files: Mapping[str, ClientFiles], root: Path | None) -> list[_Client]:
    known: dict[tuple[Path, str], _File] = {}

    def wrap(kind: str, source: RecordFile) -> _File:
        return known.setdefault(
            (source.path, kind), _File(_relative(source.path, root), kind, source)
        )

    def wrap_all(sources: Mapping[str, RecordFile]) -> list[_File]:
        return [wrap(kind, source) for kind, source in sources.items()]

    return [
        _Client(
            config.client(client_id),
            wrap_all({UNIVERSAL: own.universal, LOCAL_SET: own.local}),
            wrap_all(own.tests),
            wrap_all(getattr(own, "validations", {})),
        )
        for client_id, own in files.items()
    ]


def _relative(path: Path, root: Path | None) -> str:
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return str(path)


def _compare(file: _File, other: _File, rule: str, severity: Severity) -> Iterator[Finding]:
    rest: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(file.questions):
        found = other.first_positions.get(question)
        if found is None:
            rest[question].append(position)
            continue
        text = f"the question also stands in {other.place(found)}. Remove one of the two."
        yield file.finding(severity, rule, position, text)
    for question, twin in match_nearly(list(rest), list(other.first_positions)):
        place = other.place(other.first_positions[twin])
        for position in rest[question]:
            text = f"nearly the same question stands in {place}. Remove one of the two."
            yield file.finding("warning", f"near-{rule}", position, text)


def _answers(record: Record | ConflictRecord) -> dict[str, str]:
    answers = {"": record.output, **getattr(record, "answers", {})}
    return {client: normalise_question(answer) for client, answer in answers.items()}


def _gold(record: Record | ConflictRecord, client_id: str) -> str:
    answers = getattr(record, "answers", {})
    return answers.get(client_id, "") if answers else record.output


def _gold_answers(
    record: Record | ConflictRecord, client_id: str | None
) -> list[tuple[str, list[str]]]:
    """Return gold answers, each with the clients by one of whose keywords it must pass."""
    owners = [client for client, words in record.keywords.items() if words]
    if not owners or (client_id is not None and client_id not in owners):
        return []
    answers = getattr(record, "answers", {})
    if answers:
        wanted = [c for c in owners if c in answers and client_id in (None, c)]
        return [(answers[client], [client]) for client in wanted]
    if isinstance(record, Record) and client_id is not None:
        owners = [client_id]
    return [(record.output, owners)] if record.output else []


def _passes(record: Record | ConflictRecord, gold: str, owner: str, plain: bool) -> bool:
    others = [w for client, words in record.keywords.items() if client != owner for w in words]
    return passes_keyword_rule(gold, record.keywords[owner], others, plain=plain)


def _clashes(
    one: str, one_words: Iterable[str], other: str, other_words: Iterable[str]
) -> Iterator[tuple[Severity, str]]:
    for word in dict.fromkeys(one_words):
        for rival in dict.fromkeys(other_words):
            ours, theirs = _fold(word), _fold(rival)
            if ours == theirs:
                text = f'"{word}" is a keyword of both {one} and {other}, so an answer with it '
                yield "error", text + "passes for neither. Give each its own."
            elif ours in theirs or theirs in ours:
                inner, outer = sorted([(word, one), (rival, other)], key=lambda pair: len(pair[0]))
                text = (
                    f'keyword "{inner[0]}" of {inner[1]} stands inside "{outer[0]}" of {outer[1]}'
                )
                text += "; a plain substring rule counts both. Prefer keywords that share nothing."
                yield "warning", text


def _fold(keyword: str) -> str:
    return unicodedata.normalize("NFKC", keyword).casefold().strip()


def _candidate_words(question: Question) -> list[frozenset[str]]:
    """Return the content words of each candidate; of the keywords where there are none."""
    if question.candidates:
        return [content_words(candidate) for candidate in question.candidates]
    return [
        frozenset().union(*map(content_words, keywords))
        for keywords in (question.own_keywords, question.other_keywords)
    ]


def _share_of_extreme(candidates: Sequence[str], extreme: Callable[[list[int]], int]) -> float:
    """Return the right answer's chance among the longest (or shortest), which may be several."""
    sizes = [len(candidate.encode()) for candidate in candidates]
    best = extreme(sizes)
    return 1 / sizes.count(best) if sizes[0] == best else 0.0


def _cluster_means(questions: Sequence[Question], values: Sequence[float]) -> list[float]:
    clusters: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        clusters[question.cluster].append(value)
    return [sum(members) / len(members) for members in clusters.values()]


def _find_silent_clients(file: _File, client_ids: Sequence[str]) -> Iterator[Finding]:
    for client_id in client_ids:
        if not build_conflict_questions(file.records, client_id):
            text = (
                f"client {client_id} has neither an answer nor a keyword in any of "
                f"{_count(len(file.records))}, so no conflict question can pass for all clients."
            )
            yield file.finding("warning", "silent-client", None, text)


def _trained_script(client: _Client, kind: str) -> str | None:
    files = [file for file in client.training if file.kind == kind]
    return most_common(dominant_script(record.output) for f in files for record in f.records)


def _find_mismatches(answers: Sequence[str], expected: Sequence[str | None]) -> list[int]:
    """Return the positions of answers in another script; where one is unknown, none differs."""
    found = []
    for position, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        own = dominant_script(answer)
        is_japanese_term = {own, other} == {"Han", "Kana"} and len(answer) <= SHORT_HAN_TEXT
        if own is not None and other is not None and own != other and not is_japanese_term:
            found.append(position)
    return found


def _for_client(file: _File, client_id: str) -> str:
    return "" if file.kind == UNIVERSAL else f" (client {client_id})"


def _list_words(words: Counter[str]) -> str:
    ordered = sorted(words, key=lambda word: (-words[word], word))
    more = len(ordered) - MAX_WORDS_SHOWN
    listed = ", ".join(f'"{word}"' for word in ordered[:MAX_WORDS_SHOWN])
    return f"{listed} and {more} more" if more > 0 else listed


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _count(number: int, noun: str = "record") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
