"""A question and its answer as the model's own chat template writes them, and their token ids.

A dialogue is the client's system prompt, the question and the answer. A prompt ends where the
answer begins; behind it stand the answer and the mark that ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedlora_app.data.records import DataError
from fedlora_app.model.pretrained import ModelError

PROBE = "It is six months."  # an answer that shows where answers begin
PROBE_QUESTIONS = ("How long is the probation period?", "Who\nsays <so>, and why")
"""Unlike enough to show whether a template puts the same around every question."""

PROBE_SYSTEM = "You answer for the office of Riverton."
DATED = re.compile(r"strftime_now\(\s*(['\"])(?P<format>[^'\"]*)\1\s*\)")
"""How a template asks which day it is."""
UNTRIMMED = "{{ '' }}"
"""Between a jinja tag and text, whose white space the tag would otherwise take away."""

Turn = tuple[str, str]
"""A question of a conversation, and the answer that it got."""


def pin_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Have the tokenizer's chat template take a day (YYYY-MM-DD) for today; "": the real one.

    Llama 3's templates, for one, write it into every prompt, which would be another one on the day
    after.
    """
    tokenizer.fedlora_date = date


def find_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that prompts are written with, with the day that is pinned in it."""
    template, date = tokenizer.get_chat_template(), getattr(tokenizer, "fedlora_date", "")
    return _write_date(template, date) if date else template


@lru_cache(maxsize=4)
def _write_date(template: str, date: str) -> str:
    day = datetime.fromisoformat(date)
    return DATED.sub(lambda call: json.dumps(day.strftime(call["format"])), template)


def write_served_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that writes the prompts of ``render_prompt`` without this module.

    That is the tokenizer's own one where it does so already; else the pinned day stands in it, it
    opens no thoughts, and its prompts end where answers begin.

    Raises:
        ModelError: as ``render_prompt``.
    """
    template = find_template(tokenizer)
    if "enable_thinking" in template:
        template = f"{{% set enable_thinking = false %}}{UNTRIMMED}{template}"
    messages = _messages("", PROBE_QUESTIONS[0])
    text = _render(tokenizer, messages, add_generation_prompt=True)
    wanted = _end_where_answers_begin(tokenizer, messages, text)
    if text == wanted:
        return template
    end = f"[:{len(wanted) - len(text)}]" if len(wanted) < len(text) else ""
    end += f" ~ {json.dumps(wanted[len(text) :], ensure_ascii=False)}"  # "" where it is cut
    return (
        f"{{% set written %}}{UNTRIMMED}{template.removesuffix(chr(10))}{UNTRIMMED}{{% endset %}}"
        f"{{{{ written{end} if add_generation_prompt else written }}}}"
    )


def knows_system_prompts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes what a system prompt says."""
    try:
        render_prompt(tokenizer, PROBE_SYSTEM, PROBE_QUESTIONS[0])
    except ModelError:
        return False
    return True


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


@lru_cache(maxsize=4)
def find_marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds a special token in a text."""
    marks = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")


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
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **settings: Any
) -> str:
    if "enable_thinking" in str(tokenizer.chat_template):
        settings["enable_thinking"] = False  # training data hold answers and no thoughts
    if getattr(tokenizer, "fedlora_date", ""):
        settings["chat_template"] = find_template(tokenizer)
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
    marks = find_marks(tokenizer)
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
    marked = [part.strip() for part in said if find_marks(tokenizer).search(part)]
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
