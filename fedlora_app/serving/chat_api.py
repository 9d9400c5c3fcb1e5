"""OpenAI's chat completions, as far as a greedy, single answer of one client goes.

What a request may hold, what it means for a conversation, and the objects that answer it. The
shapes are those of https://platform.openai.com/docs/api-reference/chat; no server is in here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedlora_app.data.dialogue import Turn
from fedlora_app.serving.conversation import Reply

MAX_ANSWER_TOKENS = 2048
"""Of one answer, however many are asked for."""
NO_EFFECT = {
    *("seed", "user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"),
    "parallel_tool_calls",
}
"""Parameters that cannot change a greedy answer without tools, or who gets it."""
NEUTRAL = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "stop": [],
    "store": False,
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
}
"""Parameters that are not supported, and the value that asks for nothing."""


EXPECTED = "Expected a JSON object with model and messages, sent as Content-Type: application/json."
TEXT_ALONE = 'expected a text, or a list of {"type": "text", "text": ...}; nothing else is read'


class ApiError(Exception):
    """What a request is refused with."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI words it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def require_model(name: str, model: str) -> None:
    """Raise ``ApiError`` if another model is asked for than there is."""
    if name != model:
        text = f"The model {name!r:.100} does not exist; this server has {model!r}."
        raise ApiError(404, text, "model", "model_not_found")


def describe_faults(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return what is wrong with a body, from pydantic's faults in it."""
    first = faults[0]
    if first["type"] == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", first["msg"])
        return ApiError(400, f"The body is no JSON: {reason} at character {first['loc'][-1]}.")
    if len(first["loc"]) < 2:  # nothing of it could be read
        what = "empty" if first["type"] == "missing" else "no JSON object"
        return ApiError(400, f"The body is {what}. {EXPECTED}")
    texts: dict[str, str] = {}
    for fault in faults:
        place = [str(part) for part in fault["loc"][1:]]
        is_content = place[0] == "messages" and place[2:3] == ["content"] and place[3:]
        at = ".".join(place[:3] if is_content else place)
        texts.setdefault(at, TEXT_ALONE if is_content else fault["msg"])
    said = "; ".join(f"{at}: {text}" for at, text in texts.items())
    return ApiError(400, said, next(iter(texts)))


class TextPart(BaseModel):
    """A piece of a message that is text."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn's half, or the system prompt."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="after")
    def _require_utf8(self) -> Self:
        if any("\ud800" <= character <= "\udfff" for character in self.text):
            raise ValueError("it holds a lone surrogate, which no UTF-8 text can")
        return self

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request for a chat completion."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)

    @property
    def num_tokens(self) -> int | None:
        """How long the answer may be, None as the run evaluates."""
        asked = self.max_completion_tokens or self.max_tokens
        return None if asked is None else min(asked, MAX_ANSWER_TOKENS)

    @property
    def wants_sampling(self) -> bool:
        """Whether it asks for something else than the likeliest answer."""
        return bool(self.temperature)

    def check(self, model: str) -> None:
        """Raise ``ApiError`` if it asks for another model or for what there is not."""
        require_model(self.model, model)
        unsupported = [
            name
            for name, value in sorted((self.model_extra or {}).items())
            if value is not None
            and name not in NO_EFFECT
            and (name not in NEUTRAL or value != NEUTRAL[name])
        ]
        unsupported += sorted(
            {
                f"messages.{name}"
                for message in self.messages
                for name, value in (message.model_extra or {}).items()
                if value  # clients repeat an answer with all its empty fields
            }
        )
        if unsupported:
            names = ", ".join(f"{name:.50}" for name in unsupported)
            raise ApiError(
                400,
                f"Not supported here: {names}. Leave that out.",
                unsupported[0],
                "unsupported_parameter",
            )

    def read_dialogue(self) -> tuple[str | None, list[Turn], str]:
        """Return the system prompt, None if there is none, the earlier turns, and the question.

        Raises:
            ApiError: they are not in that order.
        """
        said = list(self.messages)
        system = said.pop(0).text if said[0].role in ("system", "developer") else None
        roles = [message.role for message in said]
        if roles != ["user", "assistant"] * (len(said) // 2) + ["user"]:
            raise ApiError(
                400,
                'Expected at most one "system" message, which comes first, and then "user" and '
                '"assistant" in turn, with "user" last.',
                "messages",
            )
        texts = [message.text for message in said]
        turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
        return system, turns, texts[-1]


@dataclass(frozen=True)
class Completion:
    """An answer on its way: what all objects that tell of it have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        message = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": message, "finish_reason": _finish(reply), "logprobs": None}
        return self._object("chat.completion", [choice]) | {"usage": _usage(reply)}

    def piece(self, text: str, **more: str) -> dict[str, Any]:
        """Return some of an answer's text; ``more`` is the role, in the first piece."""
        return self._chunk({**more, "content": text}, None)

    def end(self, reply: Reply) -> dict[str, Any]:
        """Return what follows the last piece."""
        return self._chunk({}, _finish(reply))

    def usage(self, reply: Reply) -> dict[str, Any]:
        """Return what a stream closes with if it is asked to."""
        return self._object("chat.completion.chunk", []) | {"usage": _usage(reply)}

    def _chunk(self, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return about | {"choices": choices}


def describe_model(name: str, created: int) -> dict[str, Any]:
    """Return an entry of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "fedlora"}


def _finish(reply: Reply) -> str:
    return "length" if reply.is_cut_off else "stop"


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.num_prompt_tokens,
        "completion_tokens": reply.num_tokens,
        "total_tokens": reply.num_prompt_tokens + reply.num_tokens,
    }
