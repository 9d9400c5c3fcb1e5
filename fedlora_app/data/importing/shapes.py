"""Where a row has its question and its answer: in columns of its own, or in a conversation.

Known names are taken as what they mean, and told: nothing of a row is left out without a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora_app.data.importing.settings import TEXT_FIELDS, ImportSettings, Turns
from fedlora_app.data.importing.source import suggest
from fedlora_app.data.records import UNTAUGHT, refuse_repeated_keys

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {
    **dict.fromkeys((USER, "human", "prompter"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
}
"""By what OpenAI's, ShareGPT's and other formats call them."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns of conversations, where the settings name none."""
ALIASES = {
    "instruction": ("question", "prompt", "query"),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
}
"""Columns that are taken where the usual one is missing and just one of them is there."""
HISTORY = "history"
"""The turns before a row's question, as Alpaca's and LLaMA-Factory's files have them."""


@dataclass(frozen=True)
class Shape:
    """The column of each text by its field, and what a reader should know of the choice."""

    columns: dict[str, str]
    """By ``instruction``, ``input``, ``output`` and ``history``, or ``messages`` alone."""
    notes: tuple[str, ...] = ()

    @property
    def conversation(self) -> str | None:
        """The column of conversations, if that is what the rows are."""
        return self.columns.get("messages")


def choose_shape(known: Sequence[str], settings: ImportSettings) -> tuple[Shape, list[str]]:
    """Return where texts are, and what is missing: by setting, why.

    Args:
        known: the source's columns.
    """
    conversation = _find_conversation(known, settings)
    taken = {*settings.keep_columns, settings.client_column, settings.label_column}
    taken.add(settings.fact_column)
    columns: dict[str, str] = {"messages": conversation} if conversation else {}
    notes, faults = [], []
    if settings.messages_column not in (CONVERSATIONS[0], *known):
        column = settings.messages_column
        faults.append(f'  messages_column: there is no column "{column}".{suggest(column, known)}')
    for name in () if conversation else TEXT_FIELDS:
        column = getattr(settings, f"{name}_column")
        is_usual = column == name
        others = [a for a in ALIASES[name] if a in known and a not in taken] if is_usual else []
        if column in known:
            columns[name] = column
        elif len(others) == 1:
            columns[name] = others[0]
            notes.append(f'"{others[0]}" is read as {name}.')
        elif is_usual and (name == "input" or (name == "instruction" and "input" in known)):
            continue  # one of the two is enough
        else:
            choice = f" It may be {' or '.join(others)}." if others else suggest(column, known)
            faults.append(f'  {name}_column: there is no column "{column}".{choice}')
    if not conversation and HISTORY in known and HISTORY not in settings.keep_columns:
        columns[HISTORY] = HISTORY
    used = taken | set(columns.values())
    notes += _describe_unused([column for column in known if column not in used])
    return Shape(columns, tuple(notes)), faults


def read_exchanges(row: Mapping[str, Any], shape: Shape, turns: Turns) -> list[dict[str, Any]]:
    """Return the row's questions and answers as fields of Alpaca records, one as a rule.

    Raises:
        ValueError: what is wrong with the row.
    """
    if shape.conversation:
        return _choose(_pair(_read_turns(row.get(shape.conversation))), turns)
    values = {name: row.get(column) for name, column in shape.columns.items()}
    question, further, answer = map(values.get, TEXT_FIELDS)
    if _is_blank(question) and not _is_blank(further):
        question, further = further, ""
    if _is_messages(question):
        answers = _read_turns(answer) if _is_messages(answer) else [(ASSISTANT, answer)]
        asked = _pair([*_read_turns(question), *answers])
    else:
        asked = [(question, answer)]
    exchanges = _choose([*_read_history(values.get(HISTORY)), *asked], turns)
    exchanges[-1]["input"] = further or ""
    return exchanges


def describe_left_out(rows: Sequence[Any], shape: Shape) -> Iterator[str]:
    """Yield what conversations hold beside what users and assistants say."""
    of_turns = ("messages", "instruction", "output")
    columns = [shape.columns[name] for name in of_turns if name in shape.columns]
    told, keys = 0, dict[str, None]()
    for row in rows:
        found = [row.get(column) for column in columns] if isinstance(row, dict) else []
        turns = [turn for value in found if _is_messages(value) for turn in value]
        told += SYSTEM in map(_role, turns)
        keys |= dict.fromkeys(key for turn in turns for key in turn if _is_left_out(turn, key))
    if told:
        yield f"System messages of {told} conversations are left out: {UNTAUGHT[SYSTEM]}."
    if keys:
        yield f"Left out of turns: {', '.join(map(_quote, keys))}."


def _find_conversation(known: Sequence[str], settings: ImportSettings) -> str | None:
    if settings.messages_column != CONVERSATIONS[0] and settings.messages_column in known:
        return settings.messages_column
    if settings.instruction_column != "instruction" or "instruction" in known:
        return None
    return next((name for name in CONVERSATIONS if name in known), None)


def _describe_unused(columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        if column in UNTAUGHT:
            yield f'"{column}" is left out: {UNTAUGHT[column]}.'
    rest = [_quote(column) for column in columns if column not in UNTAUGHT]
    if rest:
        yield f"Left out: {', '.join(rest)}. --keep COLUMN keeps one in the records."


def _choose(exchanges: Sequence[tuple[Any, Any]], turns: Turns) -> list[dict[str, Any]]:
    """Return the exchanges that become records, each with those before it in its question."""
    if len(exchanges) > 1 and turns == "refuse":
        raise ValueError(
            f"is a conversation of {len(exchanges)} questions. Expected one; --turns last takes "
            "the last and --turns split each of them, with what was said before it."
        )
    said = [text for exchange in exchanges for text in exchange]
    if len(exchanges) > 1 and not all(isinstance(text, str) and text.strip() for text in said):
        raise ValueError("has an earlier question or answer without text.")
    first = len(exchanges) - 1 if turns == "last" else 0
    return [
        {
            "instruction": _tell(exchanges[:index], exchanges[index][0]),
            "input": "",
            "output": exchanges[index][1],
        }
        for index in range(first, len(exchanges))
    ]


def _tell(earlier: Sequence[tuple[Any, Any]], question: Any) -> Any:
    """Return a question below what was said before it."""
    if not earlier:
        return question
    lines = [f"User: {asked}\nAssistant: {answered}" for asked, answered in earlier]
    return "\n".join([*lines, f"User: {question}"])


def _pair(turns: Sequence[tuple[str, Any]]) -> list[tuple[Any, Any]]:
    said = [turn for turn in turns if turn[0] != SYSTEM]
    roles = [role for role, _ in said]
    if not roles or roles != [USER, ASSISTANT] * (len(roles) // 2):
        raise ValueError(
            f"is a conversation of {', '.join(roles) or 'no turns'}. Expected turns of user and "
            "assistant that alternate, the last one an answer."
        )
    texts = [text for _, text in said]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def _read_turns(messages: Any) -> list[tuple[str, Any]]:
    if not _is_messages(messages):
        raise ValueError(
            "its messages are not a list of {role, content}, nor of ShareGPT's {from, value}."
        )
    for turn in messages:
        refuse_repeated_keys(turn, turn)
        if turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError("has a turn that calls a tool. The use of tools is not trained here.")
    return [(_role(turn), _read_content(turn)) for turn in messages]


def _is_left_out(turn: Mapping[str, Any], key: str) -> bool:
    """Return whether a turn's entry says something and is not read; Arrow fills keys with None."""
    return key not in ("role", "from", "content", "value") and turn[key] not in (None, "", [], {})


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _quote(name: str) -> str:
    return '"' + str(name).encode("utf-8", "backslashreplace").decode() + '"'


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role") or turn.get("from"))
    return ROLES.get(role.lower(), role)


def _read_content(turn: Mapping[str, Any]) -> Any:
    """Return what is said in a turn, the texts of its parts together."""
    content, value = turn.get("content"), turn.get("value")
    if content is not None and value is not None:
        raise ValueError("has a turn with both content and value. Expected one of them.")
    content = value if content is None else content
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a turn has parts that are not text. Only text is trained on here.")
    return "".join(parts)


def _read_history(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            value = [value]
    pairs = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f'"{HISTORY}" is not a list of [question, answer].')
    return [(asked, answered) for asked, answered in pairs]
