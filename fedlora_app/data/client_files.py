"""A client's own files: training examples and question sets, read on its machine only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import ClientConfig, Config, DataConfig
from fedlora_app.data.questions import (
    CONFLICT,
    LOCAL_SET,
    PUBLIC,
    UNIVERSAL,
    Question,
    build_conflict_questions,
    build_questions,
)
from fedlora_app.data.records import DataError, RecordFile, load_conflicts, load_records
from fedlora_app.data.tokens import TokenizedFile, tokenize_file
from fedlora_app.foundation.nearest import describe_nearest

CACHE_DIR = Path(".cache", "tokens")


@dataclass(frozen=True)
class ClientFiles:
    """A client's data files after checking: what it trains on, and its question sets by name."""

    universal: RecordFile
    local: RecordFile
    tests: dict[str, RecordFile]
    validations: dict[str, RecordFile] = field(default_factory=dict)
    public: RecordFile | None = None

    @property
    def all(self) -> dict[str, RecordFile]:
        """Every file under the name of its role."""
        validations = {f"{name}_validation": file for name, file in self.validations.items()}
        named = {"universal_train": self.universal, "local_train": self.local}
        return named | self.tests | validations | self.extra

    @property
    def extra(self) -> dict[str, RecordFile]:
        """What else its training uses."""
        return _present({PUBLIC: self.public})

    @property
    def hashes(self) -> dict[str, str]:
        """Every file's sha256 as a fact, under the name of its role."""
        return {f"sha256/{name}": file.sha256 for name, file in self.all.items()}


@dataclass(frozen=True)
class ClientExamples:
    """A client's tokenised training data."""

    universal: TokenizedFile
    local: TokenizedFile
    public: TokenizedFile | None = None


def load_client_files(config: Config, client: ClientConfig, root: Path) -> ClientFiles:
    """Read and check all of a client's files.

    Raises:
        DataError: with the faults of every file together.
    """
    files, faults = _load_files(config, client, root)
    if files is None:
        raise DataError("\n".join(faults))
    return files


def load_all_files(config: Config, root: Path) -> dict[str, ClientFiles]:
    """Read and check every client's files, where one machine holds them all.

    Raises:
        ConfigError: naming the clients whose own settings are not here.
        DataError: with the faults of every client together; what a missing file may have been
            meant to be is named, which a client never tells a server.
    """
    config.require_clients()
    all_faults: dict[str, None] = {}
    found: dict[str, ClientFiles] = {}
    for client_id in config.client_ids:
        files, faults = _load_files(config, config.client(client_id), root, names_nearest=True)
        all_faults |= dict.fromkeys(faults)
        if files is not None:
            found[client_id] = files
    if all_faults:
        raise DataError("\n".join(all_faults))
    return found


def _load_files(
    config: Config, client: ClientConfig, root: Path, *, names_nearest: bool = False
) -> tuple[ClientFiles | None, list[str]]:
    """Return a client's files, None where there are faults, and what is wrong with each."""
    faults: list[str] = []
    data, skip = config.data, config.data.skip_invalid

    def load_own_conflicts(path: Path, skip_invalid: bool) -> RecordFile:
        return load_conflicts(path, config.conflict_ids, skip_invalid=skip_invalid)

    def read(section: DataConfig | ClientConfig, key: str, load=load_records) -> RecordFile | None:
        if (name := getattr(section, key)) is None:
            return None
        try:
            return load(root / name, skip_invalid=skip)
        except DataError as error:
            place = "data" if section is data else f"federated.clients.{client.id}"
            nearest = describe_nearest(root / name) if names_nearest else ""
            faults.append(f"{place}.{key}: {error}{nearest}")
            return None

    universal = read(client if client.universal_train else data, "universal_train")
    local = read(client, "local_train")
    tests = {
        UNIVERSAL: read(data, "universal_test"),
        LOCAL_SET: read(client, "local_test"),
        CONFLICT: read(data, "conflict_test", load_own_conflicts),
    }
    validations = {
        UNIVERSAL: read(data, "universal_validation"),
        LOCAL_SET: read(client, "local_validation"),
        CONFLICT: read(data, "conflict_validation", load_own_conflicts),
    }
    public = read(data, "public")
    if faults or universal is None or local is None:
        return None, faults
    return ClientFiles(universal, local, _present(tests), _present(validations), public), []


def tokenize_client_files(
    config: Config,
    client: ClientConfig,
    files: ClientFiles,
    tokenizer: PreTrainedTokenizerBase,
    root: Path,
) -> ClientExamples:
    """Tokenise a client's training files, or read them from the cache."""
    named = {"universal": files.universal, "local": files.local, "public": files.public}
    return ClientExamples(
        **{
            name: tokenize_file(
                tokenizer,
                client.system_prompt,
                file,
                max_seq_length=config.training.max_seq_length,
                skip_invalid=config.data.skip_invalid,
                cache_dir=root / CACHE_DIR,
            )
            for name, file in _present(named).items()
        }
    )


def build_question_sets(
    client: ClientConfig, files: ClientFiles, *, validation: bool = False
) -> dict[str, list[Question]]:
    """Return the client's test (or validation) questions by set; empty ones are left out."""
    trained_facts = frozenset(record.fact for record in files.universal.records if record.fact)
    sets: dict[str, list[Question]] = {}
    for name, file in (files.validations if validation else files.tests).items():
        if name == CONFLICT:
            sets[name] = build_conflict_questions(file.records, client.id)
        else:
            facts = trained_facts if name == UNIVERSAL else None
            sets[name] = build_questions(file.records, facts, client.id)
    return {name: questions for name, questions in sets.items() if questions}


def count_unscored_conflicts(client: ClientConfig, files: ClientFiles) -> int:
    """Return how many conflict records hold no answer of this client."""
    file = files.tests.get(CONFLICT)
    return sum(client.id not in record.answers for record in file.records) if file else 0


def _present(files: dict[str, RecordFile | None]) -> dict[str, RecordFile]:
    return {name: file for name, file in files.items() if file is not None}
