"""``fedlora serve``: a client's adapters behind OpenAI's chat completions.

The answers are those of a conversation, made by one thread, one after the other. Requests and
answers are written nowhere.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from fedlora_app.data.records import DataError
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.base import ModelError
from fedlora_app.serving.chat_api import (
    ApiError,
    ChatRequest,
    Completion,
    describe_faults,
    describe_model,
    require_model,
)
from fedlora_app.serving.conversation import (
    QuestionError,
    Reply,
    TooLongError,
    open_conversation,
)

MAX_WAITING = 32  # requests, with the one that is being answered
MAX_BODY_BYTES = 1 << 20
MAX_LENGTH_DIGITS = 20
GRACE_SECONDS = 5  # that answers have to come to their end once the server is to stop

Report = Callable[[str], None]


class ServeError(UserError):
    """The server cannot be started as it was asked to."""


class _Abandoned(Exception):
    """Nobody waits for this answer any more."""


class Desk:
    """One client's adapters, and the one thread that they answer in."""

    def __init__(self, saved: SavedModel, client: str, scale: float = 1.0) -> None:
        self.saved, self.client, self.scale = saved, client, scale
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._num_waiting = 0

    def load(self) -> None:
        """Load the base model, the adapters and the gate, so that what is wrong shows at once."""
        with self.saved.answering(self.saved.own(self.client, self.scale)):
            pass

    def close(self) -> None:
        """Wait for the answer that is being made, and make no other."""
        self._thread.shutdown(cancel_futures=True)

    async def answer(self, request: ChatRequest) -> AsyncIterator[str | Reply]:
        """Yield the answer's pieces as they come, "" while it thinks, and the reply at the end.

        An answer whose iterator is closed is not made to its end.

        Raises:
            ApiError: too many are waiting, or it cannot be answered.
        """
        system_prompt, turns, question = request.read_dialogue()
        talk = open_conversation(
            self.saved, self.client, self.scale, system_prompt, request.num_tokens
        )
        talk.turns, talk.may_forget = turns, False
        if self._num_waiting >= MAX_WAITING:
            raise ApiError(429, "Too many requests are waiting. Try again.", code="overloaded")
        loop, is_gone = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[str | Reply | Exception] = asyncio.Queue()

        def tell(event: str | Reply | Exception) -> None:
            if is_gone.is_set():
                raise _Abandoned
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            with suppress(_Abandoned):
                try:
                    tell(talk.ask(question, tell))
                except (QuestionError, DataError, ModelError) as error:
                    code = "context_length_exceeded" if isinstance(error, TooLongError) else None
                    tell(ApiError(400, str(error), "messages", code))
                except _Abandoned:
                    raise
                except Exception as error:
                    _note(error)
                    tell(ApiError(500, f"The answer failed with {type(error).__name__}."))

        self._num_waiting += 1
        future = self._thread.submit(work)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Reply):
                    return
        finally:
            self._num_waiting -= 1
            is_gone.set()
            future.cancel()


class Admission:
    """Lets requests through that have the key, or none is asked for and they mean this machine."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "http" and (error := self._find_fault(scope)) is not None:
            await _respond(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _find_fault(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.key is None and not is_loopback(_host_name(headers.get("host", ""))):
            # Else a page in a browser whose name is made to mean this machine could ask.
            return ApiError(
                403, "Without a key only requests to localhost are answered.", code="wrong_host"
            )
        if self.key is not None and scope["path"] != "/health":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_known = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not is_known:
                return ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")
        if scope["method"] == "POST":
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return ApiError(411, "The request must have a Content-Length.")
            if len(length) > MAX_LENGTH_DIGITS or int(length) > MAX_BODY_BYTES:
                return ApiError(413, f"The request has more than {MAX_BODY_BYTES} bytes.")
        return None


def build_app(desk: Desk, key: str | None = None, report: Report = lambda _: None) -> FastAPI:
    """Return the server of one client's answers, whose one model has the client's name.

    Args:
        report: is told, once, that answers are greedy whatever temperature is asked for.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Admission, key=key)
    model = describe_model(desk.client, int(time.time()))
    told: set[str] = set()

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return _respond(error)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        return _respond(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _respond(describe_faults(error.errors()))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        require_model(name, desk.client)
        return model

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Any:
        body.check(desk.client)
        if body.wants_sampling and not told:
            told.add("temperature")
            report("A request has a temperature; it has no effect: answers are greedy.")
        completion = Completion(desk.client)
        pieces = desk.answer(body)
        if body.stream:
            first = await anext(pieces)  # what is wrong is said before a stream begins
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _stream(completion, first, pieces, include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Reply):
                    return completion.whole(piece)
                if await request.is_disconnected():
                    break
        return _respond(ApiError(499, "Nobody waits for the answer."))  # and nobody reads this

    return app


def serve(
    saved: SavedModel,
    client: str,
    scale: float,
    host: str,
    port: int,
    key: str | None,
    report: Report,
) -> None:
    """Answer requests until the process is interrupted.

    Args:
        key: see ``read_key``.
        report: is told where it is served.

    Raises:
        ServeError: the address cannot be used.
        UserError: the base model or the adapters cannot be loaded.
    """
    saved.own(client, scale)  # raises where there is none
    desk = Desk(saved, client, scale)
    try:
        with _bind(host, port) as listening:
            report(f"Loading {client}'s adapters after round {saved.server_round}.")
            desk.load()
            at = f"[{host}]" if ":" in host else host
            report(
                f"Serving http://{at}:{listening.getsockname()[1]}/v1, model {client}, "
                f"{'with' if key else 'without'} a key; Ctrl-C stops it."
            )
            config = uvicorn.Config(
                build_app(desk, key, report),
                ws="none",
                access_log=False,
                log_level="critical",  # faults are noted above, without what was said
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
            uvicorn.Server(config).run(sockets=[listening])
    finally:
        desk.close()


def read_key(variable: str | None, host: str) -> str | None:
    """Return the key from an environment variable; None: no key is asked for.

    Raises:
        ServeError: the variable is empty or no key, or the address needs one.
    """
    if variable is None:
        if not is_loopback(host):
            raise ServeError(
                f"--host {host} can be reached from other machines, and whoever reaches it can ask "
                "for the client's private answers. Set a key in an environment variable and name "
                "it with --api-key-env, or serve 127.0.0.1."
            )
        return None
    key = os.environ.get(variable, "")
    if not key or not all("!" <= character <= "~" for character in key):
        raise ServeError(
            f"The environment variable {variable} is {'not a key' if key else 'empty or not set'}. "
            "Expected printable ASCII characters without spaces, for instance of: "
            "openssl rand -hex 32"
        )
    return key


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only mean this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


async def _stream(
    completion: Completion,
    first: str | Reply,
    pieces: AsyncIterator[str | Reply],
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events."""
    yield _event(completion.piece("", role="assistant"))
    async with aclosing(pieces):
        try:
            piece = first
            while not isinstance(piece, Reply):
                if piece:
                    yield _event(completion.piece(piece))
                piece = await anext(pieces)
            yield _event(completion.end(piece))
            if include_usage:
                yield _event(completion.usage(piece))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _respond(error: ApiError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body, error.status, headers)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ServeError(
            f"{host}, port {port}, cannot be served: {error.strerror}. Choose another --host or "
            "--port."
        ) from None


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _note(error: Exception) -> None:
    """Say where an answer failed, and not with which words, which may be the question's."""
    print(f"An answer failed with {type(error).__name__}:", file=sys.stderr)
    print("".join(traceback.format_tb(error.__traceback__)), file=sys.stderr, flush=True)
