"""Records to token ids: the chat template, and which tokens the loss is taken on.

A dialogue is the client's system prompt, the question and the answer, rendered by the
model's own chat template. Only the answer and the mark that ends it are trained on.
Tokenised files are cached on disk, because under a real deployment every message
reaches a new process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerBase

from fedlora_app.data.records import DataError, Record, RecordFile, format_question
from fedlora_app.foundation.files import make_private_dir, write_atomically
from fedlora_app.model.pretrained import ModelError

CACHE_FORMAT = 4
PROBE = "It is six months."  # an answer that shows where answers begin
PROBE_QUESTIONS = ("How long is the probation period?", "Who\nsays <so>, and why")
"""Unlike enough to show whether a template puts the same around every question."""

Turn = tuple[str, str]
"""A question of a conversation, and the answer that it got."""


@dataclass(frozen=True)
class Example:
    """One training dialogue: token ids, of which those from ``answer_start`` are learnt."""

    input_ids: list[int]
    answer_start: int
    is_replayed: bool = False
    """A universal record among the local phase's."""
    is_public: bool = False
    """A record that the pair is held near the global adapter on, and whose answer is not learnt."""

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


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    question: str,
    earlier: Sequence[Turn] = (),
) -> str:
    """Return the dialogue's text up to where the answer begins.

    Args:
        earlier: what was asked and answered before; nothing in training and evaluation.

    Raises:
        ModelError: the chat template fails, or does not repeat what was said.
    """
    messages = _messages(system_prompt, question, earlier)
    text = _render(tokenizer, messages, add_generation_prompt=True)
    text = _end_where_answers_begin(tokenizer, messages, text)
    for what, said in (("system prompt", system_prompt), ("question", question)):
        _require_said(what, said, text)
    return text


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    question: str,
    earlier: Sequence[Turn] = (),
) -> list[int]:
    """Return the token ids of ``render_prompt``."""
    text = render_prompt(tokenizer, system_prompt, question, earlier)
    said = [message["content"] for message in _messages(system_prompt, question, earlier)]
    (ids,) = _encode(tokenizer, [(text, said)])
    return ids


def find_prompt_frame(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> tuple[str, str]:
    """Return the text before and after the question in ``render_prompt``.

    Raises:
        ModelError: the chat template does not put the same around every question, or as
            ``render_prompt``.
    """
    first, second = PROBE_QUESTIONS
    before, _, after = render_prompt(tokenizer, system_prompt, first).rpartition(first)
    if render_prompt(tokenizer, system_prompt, second) != before + second + after:
        raise ModelError(
            "The model's chat template does not put the same text around every question, so "
            "prompts cannot be made without it. Use one of the ChatML kind."
        )
    return before, after


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str, answer: str
) -> list[int]:
    """Return the token ids of the answer with the template's end-of-turn mark.

    Raises:
        ModelError: as ``encode_with_answers``.
    """
    _, (ids,) = encode_with_answers(tokenizer, system_prompt, question, [answer])
    return ids


def encode_with_answers(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str, answers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of a prompt, and of each answer with the template's end-of-turn mark.

    Raises:
        ModelError: the chat template does not continue its own generation prompt, or as
            ``render_prompt``.
    """
    prompt = render_prompt(tokenizer, system_prompt, question)
    texts = [(prompt, [message["content"] for message in _messages(system_prompt, question)])]
    for answer in answers:
        text = _render_answer(tokenizer, system_prompt, question, prompt, answer)
        texts.append((text, [answer]))
    prompt_ids, *answer_ids = _encode(tokenizer, texts)
    return prompt_ids, answer_ids


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


def _end_where_answers_begin(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: str
) -> str:
    """Return a generation prompt that ends where the template puts an answer.

    Templates of reasoning models open a block for thoughts that an answered turn does not have
    (DeepSeek-R1), or put an empty one before the answer that the prompt lacks (Qwen3). Trained on
    as a part of the answer it would be generated, and no answer would equal the right one.
    """
    dialogue = _render(tokenizer, [*messages, {"role": "assistant", "content": PROBE}])
    num_shared = len(prompt)
    if not dialogue.startswith(prompt):
        pairs = zip(prompt, dialogue, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    before, found, _ = dialogue[num_shared:].partition(PROBE)
    if num_shared == len(prompt):
        return prompt + before if found and before.strip() else prompt
    return prompt[:num_shared] if found and not before else prompt


def _render_answer(
    tokenizer: PreTrainedTokenizerBase, system_prompt: str, question: str, prompt: str, answer: str
) -> str:
    """Return what stands behind a prompt: the answer and the mark that ends it.

    Raises:
        ModelError: the template does not continue its prompt with the answer, or changes it.
    """
    turn = {"role": "assistant", "content": answer}
    dialogue = _render(tokenizer, [*_messages(system_prompt, question), turn])
    if system_prompt and not dialogue.startswith(prompt):
        # Mistral's templates write a system prompt only while the user's turn is the last one.
        prompt = render_prompt(tokenizer, "", question)
        dialogue = _render(tokenizer, [*_messages("", question), turn])
    if not dialogue.startswith(prompt):
        raise ModelError(
            "The model's chat template does not continue its generation prompt with the answer, so "
            "it is unknown where the answer begins. Use a template of the ChatML kind in a copy of "
            "the model's folder."
        )
    text = dialogue[len(prompt) :]
    _require_said("answer", answer, text)
    text = text.rstrip("\n")
    said = answer.strip()
    if (text.partition(said)[2] if said else text).strip():
        return text
    if tokenizer.eos_token is None:
        raise ModelError(
            "The model's chat template puts no mark behind an answer, and its tokenizer has no "
            "eos_token, so no answer would ever end. Set eos_token in a copy of the model's folder."
        )
    return text + tokenizer.eos_token  # GLM-4's next turn would be the mark


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **settings: bool
) -> str:
    if "enable_thinking" in str(tokenizer.chat_template):
        settings["enable_thinking"] = False  # training data hold answers and no thoughts
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # whatever a template's expressions raise, beside jinja2's own
        # Not the error's text: a template can put into it what was said.
        raise ModelError(
            f"The model's chat template cannot write a prompt ({type(error).__name__}). If it "
            "knows no system prompts, leave system_prompt empty; otherwise use another model."
        ) from error


def _require_said(what: str, said: str, text: str) -> None:
    """Raise unless the text holds what was said, but for white space around it."""
    if said.strip() not in text:
        raise ModelError(
            f"The model's chat template leaves out or changes the {what}. Use a template that "
            "repeats what is said, such as one of the ChatML kind."
        )


def _messages(
    system_prompt: str, question: str, earlier: Sequence[Turn] = ()
) -> list[dict[str, str]]:
    said = [("system", system_prompt)] if system_prompt else []
    for asked, answered in earlier:
        said += [("user", asked), ("assistant", answered)]
    said.append(("user", question))
    return [{"role": role, "content": content} for role, content in said]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, Sequence[str]]]
) -> list[list[int]]:
    """Return the token ids of texts, each with what is said in it, in its order.

    What is said may speak of the template's own marks, and neither ends a turn nor begins one.
    """
    marks = _find_marks(tokenizer)
    plain = [text for text, said in texts if not any(map(marks.search, said))]
    ids = iter(tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else ())
    return [
        _encode_literally(tokenizer, text, said) if any(map(marks.search, said)) else next(ids)
        for text, said in texts
    ]


def _encode_literally(
    tokenizer: PreTrainedTokenizerBase, text: str, said: Sequence[str]
) -> list[int]:
    """Return a text's token ids, those of what is said without any special token.

    Raises:
        DataError: what is said is the same as what the template puts around it.
    """
    marked = [part.strip() for part in said if _find_marks(tokenizer).search(part)]
    longest_first = sorted(set(marked), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    if len(parts[1::2]) != len(marked):
        raise DataError(
            "A text holds nothing but marks of the model's chat template, such as the end of a "
            "turn, and cannot be told from them. Remove it."
        )
    return [
        token
        for number, part in enumerate(parts)
        for token in tokenizer(
            part, add_special_tokens=False, split_special_tokens=number % 2 == 1
        )["input_ids"]
    ]


@lru_cache(maxsize=4)
def _find_marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds a special token in a text."""
    marks = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")


def _cache_key(tokenizer: PreTrainedTokenizerBase, system_prompt: str, file: RecordFile) -> str:
    parts = [
        str(CACHE_FORMAT),
        file.sha256,
        str(file.num_skipped),
        system_prompt,
        str(tokenizer.chat_template),
        type(tokenizer).__name__,
        _hash_vocabulary(tokenizer),
        str(tokenizer.eos_token),
        _find_marks(tokenizer).pattern,
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
        ids, *others = (columns[name].tolist() for name in ("input_ids", "bounds", "answer_starts"))
        bounds, starts = others
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
        "input_ids": np.array([i for ex in examples for i in ex.input_ids], dtype=np.int32),
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
