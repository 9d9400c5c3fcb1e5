"""Asking a client's adapters: a conversation with one of them, or one question to all.

Input: a saved round and who is to answer. Output: greedy answers, streamed. The first
question of a conversation is put in exactly the prompt that the client was trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.dialogue import Turn, encode_prompt
from fedlora_app.data.records import DataError
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.decoding import decode, decode_so_far
from fedlora_app.evaluation.generation import find_ends, find_stop_ids, generate_answer
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.pretrained import read_context

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
"""Of the global adapter alone where the clients' own prompts differ."""
GLOBAL_ALONE = "global alone"
UNFINISHED = "\ufffd"  # what a character decodes to whose last bytes are still to come


class QuestionError(UserError):
    """A question cannot be asked; the message says why."""


class TooLongError(QuestionError):
    """There is no room for it, or for what was said before it, in the model's context."""


@dataclass(frozen=True)
class Reply:
    """An answer, and what happened to it."""

    text: str
    is_cut_off: bool = False
    """It ends at ``max_new_tokens`` and not by itself."""
    num_dropped: int = 0
    """Oldest turns that were left out of this prompt and the following ones for want of room."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    """Of the answer, with the mark that ends it."""


@dataclass
class Conversation:
    """Questions to the same adapters, each with what was said before it."""

    saved: SavedModel
    who: Answering
    system_prompt: str
    max_new_tokens: int
    turns: list[Turn] = field(default_factory=list)
    may_forget: bool = True
    """The oldest turns make room for a question; otherwise that is an error."""

    def ask(self, question: str, on_text: Callable[[str], None] = lambda _: None) -> Reply:
        """Return the greedy answer to a question, and remember both.

        A turn that is interrupted is not remembered.

        Args:
            on_text: gets the answer piece by piece as it is made; the pieces are the answer. It
                gets "" for a token that shows nothing, as in thoughts, and may end it by raising.

        Raises:
            QuestionError: it is empty, not UTF-8, nothing but marks of the chat template, or too
                long, even without what may be forgotten.
            DataError: what combines the adapters is not there, nor are the data that it takes.
        """
        if not question.strip():
            raise QuestionError("The question is empty.")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise QuestionError("The question holds bytes that are not UTF-8. Ask it in UTF-8.")
        with self.saved.answering(self.who) as (model, combiner):
            tokenizer = self.saved.load()[0].tokenizer
            turns, prompt_ids = self._fit(model.get_base_model(), tokenizer, question)
            ends = find_ends(model.get_base_model(), find_stop_ids(tokenizer))
            pieces = _Pieces(tokenizer, on_text, ends)
            text = generate_answer(
                model,
                tokenizer,
                prompt_ids,
                max_new_tokens=self.max_new_tokens,
                combiner=combiner,
                # It knows single questions under the client's own system prompt.
                judged_ids=combiner and combiner.encode(tokenizer, question),
                streamer=pieces,
            )
        num_dropped = len(self.turns) - len(turns)
        self.turns = [*turns, (question, text)]
        num_tokens = len(pieces.ids or ())
        return Reply(text, not pieces.has_ended, num_dropped, len(prompt_ids), num_tokens)

    def _fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str
    ) -> tuple[list[Turn], list[int]]:
        """Return the newest turns for which there is room, and the prompt with them."""
        limit = read_context(model.config)
        for start in range(len(self.turns) + 1 if self.may_forget else 1):
            turns = self.turns[start:]
            try:
                prompt_ids = encode_prompt(tokenizer, self.system_prompt, question, turns)
            except DataError as error:
                raise QuestionError(str(error)) from None
            if limit is None or len(prompt_ids) + self.max_new_tokens <= limit:
                return turns, prompt_ids
        before = " and what was said before" if turns else ""
        room = limit - len(prompt_ids)
        what, advice = (
            ("question is too long", "Shorten it")
            if room < 1
            else ("answer may be too long", f"Allow {room} tokens at the most, or ask less")
        )
        raise TooLongError(
            f"The {what}: with the system prompt{before} the question takes {len(prompt_ids)} "
            f"tokens, and {self.max_new_tokens} are kept for the answer; the model takes {limit} "
            f"in all. {advice}."
        )


@dataclass(frozen=True)
class Side:
    """One of several answers to the same question."""

    system_prompt: str
    reply: Reply


def open_conversation(
    saved: SavedModel,
    client_id: str,
    scale: float = 1.0,
    system_prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> Conversation:
    """Return a conversation with a client's pair, or whatever it answers with in the run's mode.

    Args:
        scale: of the local adapter (lambda).
        system_prompt: None: the client's own; "": none.
        max_new_tokens: None: as in the run's evaluation.

    Raises:
        ConfigError: there is no such client, or the scale is impossible or has no effect.
    """
    who, config = saved.own(client_id, scale), saved.run.config
    if system_prompt is None:
        system_prompt = config.client(client_id).system_prompt
    limit = config.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
    return Conversation(saved, who, system_prompt, limit)


def answer_side_by_side(
    saved: SavedModel,
    question: str,
    scale: float = 1.0,
    system_prompt: str | None = None,
    max_new_tokens: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Side]:
    """Return every client's answer by its id, and that of the global adapter alone, if any.

    Args:
        system_prompt: of all; None: each client's own, and for the global adapter alone theirs
            if they have one in common, else ``DEFAULT_SYSTEM_PROMPT``.
        report: is told who answers next.

    Raises:
        QuestionError, ConfigError: as a conversation.
    """
    clients = saved.run.config.client_ids
    asked = {
        client: open_conversation(saved, client, scale, system_prompt, max_new_tokens)
        for client in clients
    }
    first = asked[clients[0]]
    if GLOBAL in saved.trained and not saved.has_own_globals:
        prompts = {conversation.system_prompt for conversation in asked.values()}
        shared = first.system_prompt if len(prompts) == 1 else DEFAULT_SYSTEM_PROMPT
        who = Answering(with_global=True)
        asked[GLOBAL_ALONE] = Conversation(saved, who, shared, first.max_new_tokens)
    replies: dict[tuple[Answering, str], Reply] = {}  # without local adapters many are the same
    sides = {}
    for label, conversation in asked.items():
        report(label)
        key = (conversation.who, conversation.system_prompt)
        if key not in replies:
            replies[key] = conversation.ask(question)
        sides[label] = Side(conversation.system_prompt, replies[key])
    return sides


def tabulate_sides(sides: dict[str, Side]) -> Table:
    """Return a table of who answers what, and of who answers the same.

    The system prompts are a column where they differ.
    """
    prompts = {side.system_prompt for side in sides.values()}
    texts = [side.reply.text for side in sides.values()]
    first = {text: label for label, text in reversed(list(zip(sides, texts, strict=True)))}
    columns = {"who": list(sides)}
    if len(prompts) > 1:
        columns["system prompt"] = [side.system_prompt for side in sides.values()]
    columns["answer"] = [
        side.reply.text + (" [cut off]" if side.reply.is_cut_off else "") for side in sides.values()
    ]
    if len(first) < len(texts):
        columns["same as"] = [
            first[text] if first[text] != label else ""
            for label, text in zip(sides, texts, strict=True)
        ]
    table = Table(show_lines=True)
    for heading in columns:
        table.add_column(heading, overflow="fold", no_wrap=False)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))  # an answer's brackets are not markup
    if len(prompts) == 1:
        table.caption = Text(f"System prompt: {prompts.pop() or 'none'}")
    return table


class _Pieces(BaseStreamer):
    """Streams an answer's text as far as later tokens cannot change it.

    All tokens are decoded together each time: tokenizers of the SentencePiece kind drop a
    leading space from whatever they are given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        ends: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ends = ends
        self.ids: list[int] | None = None  # None: the prompt is still to come
        self.shown = ""

    @property
    def has_ended(self) -> bool:
        """Whether the answer's last token marks its end."""
        return bool(self.ids) and self.ids[-1] in self.ends

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self._show(decode_so_far(self.tokenizer, self.ids).rstrip(UNFINISHED).rstrip())

    def end(self) -> None:
        self._show(decode_so_far(self.tokenizer, self.ids) or decode(self.tokenizer, self.ids))

    def _show(self, text: str) -> None:
        new = text[len(self.shown) :] if text.startswith(self.shown) else ""
        self.shown += new
        self.on_text(new)
