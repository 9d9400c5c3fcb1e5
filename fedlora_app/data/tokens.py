"""Records to examples: token ids, and which of them the loss is taken on.

Only the answer and the mark that ends it are trained on. Tokenised files are cached on disk,
because under a real deployment every message reaches a new process.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerBase

from fedlora_app.data.dialogue import encode_with_answers, find_marks, find_template
from fedlora_app.data.records import DataError, Record, RecordFile, format_question
from fedlora_app.foundation.files import make_private_dir, write_atomically

CACHE_FORMAT = 4


@dataclass(frozen=True)
class Example:
    """One training dialogue: token ids, of which those from ``answer_start`` are learnt.

    The ids are kept in four bytes each; in a list they would take some forty.
    """

    input_ids: Sequence[int]
    answer_start: int
    is_replayed: bool = False
    """A universal record among the local phase's."""
    is_public: bool = False
    """A record that the pair is held near the global adapter on, and whose answer is not learnt."""

    def __post_init__(self) -> None:  # noqa: D105
        if not isinstance(self.input_ids, array):
            object.__setattr__(self, "input_ids", array("i", self.input_ids))

    @property
    def is_own(self) -> bool:
        """Whether the phase is about it."""
        return not (self.is_replayed or self.is_public)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.input_ids) - self.answer_start


@dataclass(frozen=True)
class TokenizedFile:
    """The examples of one file, and what the length limit did to them."""

    examples: list[Example]
    num_truncated: int
    num_dropped: int


def encode_example(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, record: Record
) -> Example:
    """Return a whole training dialogue, of whatever length."""
    question = format_question(record)
    prompt_ids, (answer_ids,) = encode_with_answers(
        tokenizer, system_prompt, question, [record.output]
    )
    return Example(prompt_ids + answer_ids, answer_start=len(prompt_ids))


def tokenize_file(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    file: RecordFile,
    *,
    max_seq_length: int,
    skip_invalid: bool,
    cache_dir: Path,
) -> TokenizedFile:
    """Return a file's examples, from the cache where it holds them.

    Examples over ``max_seq_length`` tokens lose their end and are counted. One whose
    question alone is that long leaves nothing to learn: it raises, or is dropped and
    counted with ``skip_invalid``.
    """
    key = _cache_key(tokenizer, system_prompt, file)
    path = cache_dir / f"{key}.safetensors"
    examples = _load_cached(path)
    if examples is None:
        examples = _encode_records(tokenizer, system_prompt, file)
        _save_cached(examples, path)
    too_long = [n for n, ex in enumerate(examples, 1) if ex.answer_start >= max_seq_length]
    if too_long and not skip_invalid:
        raise DataError(
            f"{file.path}: in {len(too_long)} records, record {too_long[0]} the first, the "
            f"question alone fills training.max_seq_length = {max_seq_length} tokens. Shorten "
            "them, raise the limit, or set data.skip_invalid: true to drop and count them."
        )
    kept = [example for example in examples if example.answer_start < max_seq_length]
    if not kept:
        raise DataError(f"{file.path}: no record is shorter than {max_seq_length} tokens.")
    return TokenizedFile(
        [Example(ex.input_ids[:max_seq_length], ex.answer_start) for ex in kept],
        num_truncated=sum(len(ex.input_ids) > max_seq_length for ex in kept),
        num_dropped=len(too_long),
    )


def _encode_records(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, file: RecordFile
) -> list[Example]:
    examples = []
    for number, record in enumerate(file.records, start=1):
        try:
            examples.append(encode_example(tokenizer, system_prompt, record))
        except DataError as error:
            raise DataError(f"{file.path}, record {number}: {error}") from None
    return examples


def _cache_key(tokenizer: PreTrainedTokenizerBase, system_prompt: str, file: RecordFile) -> str:
    parts = [
        str(CACHE_FORMAT),
        file.sha256,
        str(file.num_skipped),
        system_prompt,
        find_template(tokenizer),
        type(tokenizer).__name__,
        _hash_vocabulary(tokenizer),
        str(tokenizer.eos_token),
        find_marks(tokenizer).pattern,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@lru_cache(maxsize=4)  # a quarter of a second with 150,000 tokens, for every file of a message
def _hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return hashlib.sha256(vocabulary).hexdigest()


def _load_cached(path: Path) -> list[Example] | None:
    """Return what a file holds, None if it cannot be read; a damaged one is named and removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        columns = load(content)
        if bytes(columns.pop("sha256")) != _hash_columns(columns):
            raise ValueError("it is not what was written")
        ids = array("i", columns["input_ids"].tobytes())
        bounds, starts = (columns[name].tolist() for name in ("bounds", "answer_starts"))
        return [
            Example(ids[begin:end], start)
            for (begin, end), start in zip(pairwise(bounds), starts, strict=True)
        ]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = error.args[0] if type(error) is ValueError else type(error).__name__
        print(f"The tokens in {path} are rebuilt: {reason}.", flush=True)
        with suppress(OSError):
            path.unlink()
        return None


def _save_cached(examples: list[Example], path: Path) -> None:
    """Keep examples for other processes; where that is impossible, say so."""
    lengths = [len(example.input_ids) for example in examples]
    columns = {
        "input_ids": np.frombuffer(b"".join(ex.input_ids for ex in examples), dtype=np.int32),
        "bounds": np.cumsum([0, *lengths], dtype=np.int64),
        "answer_starts": np.array([example.answer_start for example in examples], dtype=np.int32),
    }
    columns["sha256"] = np.frombuffer(_hash_columns(columns), dtype=np.uint8)
    try:
        make_private_dir(path.parent)
        write_atomically(path, save(columns))
    except OSError as error:  # a full disk, or a folder that cannot be written
        print(
            f"Note: the tokens of {len(examples)} records are not kept in {path.parent}: "
            f"{error.strerror}. Each process makes them anew.",
            flush=True,
        )


def _hash_columns(columns: dict[str, np.ndarray]) -> bytes:
    return hashlib.sha256(b"".join(columns[name].tobytes() for name in sorted(columns))).digest()
