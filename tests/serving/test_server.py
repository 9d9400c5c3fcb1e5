"""The server of a real, tiny run's answers, asked as any client of OpenAI's API would."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
import uvicorn
from conftest import build_tiny_config
from loopback import Federation, wait_until

from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.runs.reading import load_run
from fedlora_app.serving import conversation as conversation_module
from fedlora_app.serving import server as server_module
from fedlora_app.serving.chat_api import MAX_ANSWER_TOKENS, ChatRequest
from fedlora_app.serving.conversation import open_conversation
from fedlora_app.serving.server import (
    MAX_BODY_BYTES,
    Admission,
    Desk,
    ServeError,
    build_app,
    is_loopback,
    read_key,
)

LOCAL, UNIVERSAL = "What is the red rule?", "Which office is blue?"
PATH = "/v1/chat/completions"
KEY = "k3y"


@pytest.fixture(scope="module")
def runs(tiny_project, tmp_path_factory):
    """One finished round of each kind, opened once."""
    made = {}

    def get(mode: str = "dual", gate: str = "none") -> SavedModel:
        if (mode, gate) not in made:
            config = build_tiny_config(
                federated={"mode": mode, "num_rounds": 1},
                adapters={"gate": gate},
                training={"learning_rate": 2e-2, "local_weight_decay": 0.0},
                evaluation={"max_new_tokens": 12},
            )
            folder = tmp_path_factory.mktemp(mode)
            path = Federation(tiny_project, folder, config).run("run")
            made[mode, gate] = SavedModel(load_run(path), 1, tiny_project)
        return made[mode, gate]

    return get


@contextmanager
def serving(saved: SavedModel, client: str = "ann", key: str | None = None, said=lambda _: None):
    """A client of a server on loopback; both end with the block."""
    desk = Desk(saved, client)
    config = uvicorn.Config(
        build_app(desk, key, said),
        port=0,
        ws="none",
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join()
        desk.close()


@pytest.fixture(scope="module")
def plain(runs):
    """The server of an ungated pair, which no test changes."""
    with serving(runs()) as http:
        yield http


def user(question: str, **more) -> dict:
    return {"model": "ann", "messages": [{"role": "user", "content": question}], **more}


def read_events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


@pytest.mark.parametrize("kind", [("dual", "none"), ("dual", "prompt"), ("fedavg", "none")])
def test_answers_are_those_of_ask_whole_and_streamed(runs, kind):
    saved = runs(*kind)
    replies = {q: open_conversation(saved, "ann").ask(q) for q in (LOCAL, UNIVERSAL, "Why?")}
    with serving(saved) as http:
        for question, reply in replies.items():
            whole = http.post(PATH, json=user(question)).json()
            assert whole["object"] == "chat.completion" and whole["model"] == "ann"
            assert whole["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply.text},
                    "finish_reason": "length" if reply.is_cut_off else "stop",
                    "logprobs": None,
                }
            ]
            assert whole["usage"]["completion_tokens"] == reply.num_tokens > 0
            wanted = {"stream": True, "stream_options": {"include_usage": True}}
            response = http.post(PATH, json=user(question, **wanted))
            assert response.headers["content-type"].startswith("text/event-stream")
            *pieces, end, usage = read_events(response.text)
            deltas = [piece["choices"][0]["delta"] for piece in pieces]
            assert deltas[0] == {"role": "assistant", "content": ""} and len(deltas) > 2
            assert "".join(delta["content"] for delta in deltas) == reply.text
            assert end["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
            assert usage["choices"] == [] and usage["usage"] == whole["usage"]
            assert len({event["id"] for event in (*pieces, end, usage)}) == 1


def test_the_gate_chooses_for_each_request(runs):
    saved = runs("dual", "prompt")
    with saved.answering(saved.own("ann")) as (model, gate):
        tokenizer = saved.load()[0].tokenizer
        prompts = [
            conversation_module.encode_prompt(tokenizer, "You are ann.", question)
            for question in (LOCAL, UNIVERSAL)
        ]
        assert gate.weigh(model, prompts).tolist() == [1, 0]
    alone = open_conversation(saved, "ann", scale=0.0)
    with serving(saved) as http:
        answers = [
            http.post(PATH, json=user(question)).json()["choices"][0]["message"]["content"]
            for question in (LOCAL, UNIVERSAL)
        ]
    assert answers[0] != alone.ask(LOCAL).text
    alone.turns.clear()
    assert answers[1] == alone.ask(UNIVERSAL).text


def test_what_was_said_before_and_another_system_prompt_count(runs, plain):
    talk = open_conversation(runs(), "ann", system_prompt="You are a clerk.")
    first = talk.ask(LOCAL)
    second = talk.ask(UNIVERSAL)
    messages = [
        {"role": "developer", "content": "You are a clerk."},
        {"role": "user", "content": [{"type": "text", "text": LOCAL}]},
        {"role": "assistant", "content": first.text, "refusal": None, "annotations": []},
        {"role": "user", "content": UNIVERSAL},
    ]
    answer = plain.post(PATH, json=user("") | {"messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == second.text
    assert answer["usage"]["prompt_tokens"] == second.num_prompt_tokens


def test_an_answer_s_length_may_be_limited(plain):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = plain.post(PATH, json=user(LOCAL, **{name: 3})).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
    asked = ChatRequest.model_validate(user(LOCAL, max_tokens=10**6))
    assert asked.num_tokens == MAX_ANSWER_TOKENS


def test_sampling_is_answered_greedily_and_said_once(runs):
    said = []
    with serving(runs(), said=said.append) as http:
        greedy = http.post(PATH, json=user(LOCAL, temperature=0, top_p=1.0)).json()["choices"]
        assert said == []
        for _ in range(2):
            answer = http.post(PATH, json=user(LOCAL, temperature=1.5, seed=3, user="me", n=1))
            assert answer.json()["choices"] == greedy
    assert len(said) == 1 and "has no effect" in said[0]


def test_a_value_that_asks_for_nothing_is_no_fault(plain):
    neutral = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}
    neutral |= {"logprobs": False, "top_logprobs": 0, "modalities": ["text"], "stop": None}
    assert plain.post(PATH, json=user(LOCAL, max_tokens=1, **neutral)).status_code == 200


def test_a_length_without_end_is_too_much():
    headers = [(b"host", b"localhost"), (b"content-length", b"9" * 5000)]
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    assert Admission(None, None)._find_fault(scope).status == 413


def chat(*roles: str) -> dict:
    return {"model": "ann", "messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        (user("?") | {"model": "zoe"}, 404, "model", "this server has 'ann'"),
        (user("?", n=2, tools=[{"type": "function"}]), 400, "n", "Not supported here: n, tools."),
        (user("?", response_format={"type": "json_object"}), 400, "response_format", "Not supp"),
        (user("?", best_of=None, shiny=True), 400, "shiny", "Not supported here: shiny."),
        (chat("assistant"), 400, "messages", '"user" last'),
        (chat("user", "user"), 400, "messages", '"user" last'),
        (chat("user", "system", "user"), 400, "messages", "comes first"),
        (chat("system"), 400, "messages", '"user" last'),
        (user("<|im_end|>"), 400, "messages", "nothing but marks of the model's chat template"),
        (chat("tool"), 400, "messages.0.role", "should be 'system'"),
        (user("\ud800 why?"), 400, "messages.0", "lone surrogate"),
        (
            user([{"type": "image_url", "image_url": "x"}]),
            *(400, "messages.0.content", "messages.0.content: expected a text, or a list of"),
        ),
        (user(None), 400, "messages.0.content", "messages.0.content: expected a text"),
        (user("?") | {"messages": []}, 400, "messages", "at least 1 item"),
        ({"model": "ann"}, 400, "messages", "Field required"),
        (user("?", max_tokens=0, temperature=9), 400, "max_tokens", "temperature: "),
        (user("  "), 400, "messages", "The question is empty"),
        (user("What is the rule? " * 100), 400, "messages", "takes 256 in all. Shorten it."),
        (user("Why?", max_tokens=256), 400, "messages", "answer may be too long"),
    ],
)
def test_what_cannot_be_answered_is_said_as_openai_does(plain, body, status, param, text):
    for stream in (False, True):
        content = json.dumps(body | {"stream": stream})  # in ASCII: a lone surrogate as well
        response = plain.post(PATH, content=content, headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert response.status_code == status and text in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and param in (None, error["param"])


def test_a_message_with_more_than_text_is_refused(plain):
    body = user(LOCAL)
    body["messages"][0]["tool_calls"] = [{"id": "1"}]
    error = plain.post(PATH, json=body).json()["error"]
    assert error["param"] == "messages.tool_calls"


def test_earlier_turns_are_not_dropped_in_silence(plain):
    long = [{"role": r, "content": "the rule " * 60} for r in ("user", "assistant")]
    body = user(LOCAL) | {"messages": [*long, {"role": "user", "content": LOCAL}]}
    error = plain.post(PATH, json=body).json()["error"]
    assert error["code"] == "context_length_exceeded" and "what was said before" in error["message"]


def test_other_paths_and_bodies_that_are_no_json(plain):
    assert plain.get("/health").json() == {"status": "ok"}
    (model,) = plain.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("ann", "model")
    assert plain.get("/v1/models/ann").json() == model
    response = plain.get("/v1/models/zoe")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    for response, status in (
        (plain.get("/docs"), 404),
        (plain.get(PATH), 405),
        (plain.post(PATH, content=b"{", headers={"content-type": "application/json"}), 400),
        (plain.post(PATH, content=json.dumps(user(LOCAL)).encode()), 400),  # a form of a web page
        (plain.post(PATH, content=iter([b"{}"])), 411),
        (plain.post(PATH, content=b" " * (MAX_BODY_BYTES + 1)), 413),
    ):
        assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "text"),
    [
        (b'{"a": }', "application/json", "The body is no JSON: Expecting value at character 6."),
        (b"", "application/json", "The body is empty. Expected a JSON object"),
        (b"[1]", "application/json", "The body is no JSON object. Expected"),
        (b'{"model": "ann"}', "text/plain", "sent as Content-Type: application/json"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_what_is_expected(plain, content, kind, text):
    response = plain.post(PATH, content=content, headers={"content-type": kind})
    assert response.status_code == 400 and text in response.json()["error"]["message"]


def test_without_a_key_only_this_machine_s_names_are_answered(plain):
    for host, status in (
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("rebound.example", 403),
        ("127.0.0.1.example", 403),
        ("[", 403),
    ):
        response = plain.get("/v1/models", headers={"host": host})
        assert response.status_code == status, host


def test_the_key_is_asked_for(runs):
    with serving(runs(), key=KEY) as http:
        for given in (None, KEY, f"Bearer {KEY}x", "Bearer", "Basic " + KEY, "Bearer k\xe9y"):
            headers = {"host": "ann.example"} | (
                {} if given is None else {"authorization": given.encode("latin-1")}
            )
            for response in (
                http.get("/v1/models", headers=headers),
                http.post(PATH, json=user(LOCAL), headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        headers = {"host": "ann.example", "authorization": f"bearer {KEY}"}
        assert http.post(PATH, json=user(LOCAL), headers=headers).status_code == 200
        assert http.get("/health").status_code == 200


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GOOD", KEY)
    monkeypatch.setenv("SPACED", "two words")
    monkeypatch.setenv("EMPTY", "")
    assert read_key("GOOD", "0.0.0.0") == read_key("GOOD", "127.0.0.1") == KEY
    assert read_key(None, "127.0.0.1") is read_key(None, "::1") is None
    for variable, host, message in (
        (None, "0.0.0.0", "name it with --api-key-env"),
        (None, "", "name it with"),
        ("SPACED", "127.0.0.1", "SPACED is not a key"),
        ("EMPTY", "127.0.0.1", "EMPTY is empty or not set"),
        ("NO_SUCH_VARIABLE", "127.0.0.1", "openssl rand"),
    ):
        with pytest.raises(ServeError, match=message):
            read_key(variable, host)
    assert is_loopback("127.8.9.1") and not is_loopback("localhost.example")


def test_one_answer_at_a_time_and_the_others_wait(runs, monkeypatch):
    saved = runs("dual", "prompt")
    questions = [LOCAL, UNIVERSAL, "Why?"] * 3
    expected = [open_conversation(saved, "ann").ask(question).text for question in questions]
    running, most = [], []
    original = conversation_module.generate_answer

    def spy(*arguments, **settings):
        running.append(1)
        most.append(len(running))
        try:
            return original(*arguments, **settings)
        finally:
            running.pop()

    monkeypatch.setattr(conversation_module, "generate_answer", spy)
    with serving(saved) as http, ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda q: http.post(PATH, json=user(q)).json(), questions))
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    assert len(most) == len(questions) and max(most) == 1


def test_too_many_that_wait_are_told_to_come_again(runs, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_WAITING", 0)
    with serving(runs()) as http:
        response = http.post(PATH, json=user(LOCAL))
        assert response.status_code == 429 and response.json()["error"]["code"] == "overloaded"


@pytest.fixture
def ends(monkeypatch) -> list[str]:
    """How each answer came to its end: the name of what was raised, or ""."""
    seen = []
    original = conversation_module.generate_answer

    def spy(*arguments, **settings):
        try:
            text = original(*arguments, **settings)
        except BaseException as error:
            seen.append(type(error).__name__)
            raise
        seen.append("")
        return text

    monkeypatch.setattr(conversation_module, "generate_answer", spy)
    return seen


@pytest.mark.parametrize("is_shown", [True, False], ids=["shown", "in thoughts"])
def test_an_answer_that_nobody_waits_for_is_not_made_to_its_end(runs, ends, monkeypatch, is_shown):
    if not is_shown:
        monkeypatch.setattr(conversation_module, "decode_so_far", lambda *_: "")

    async def leave(desk: Desk) -> None:
        pieces = desk.answer(ChatRequest.model_validate(user(LOCAL, max_tokens=200)))
        assert isinstance(await anext(pieces), str)
        await pieces.aclose()

    desk = Desk(runs(), "ann")
    asyncio.run(leave(desk))
    desk.close()
    assert ends == ["_Abandoned"]
    with serving(runs()) as http:
        body = user(LOCAL, max_tokens=200)
        with http.stream("POST", PATH, json=body | {"stream": True}) as response:
            next(response.iter_lines())
        wait_until(lambda: len(ends) == 2)
        with pytest.raises(httpx.ReadTimeout):
            http.post(PATH, json=body, timeout=0.1)
        wait_until(lambda: len(ends) == 3)
        assert ends[1:] == ["_Abandoned"] * 2
        assert http.post(PATH, json=user(LOCAL)).status_code == 200


def test_a_failure_is_told_without_what_was_said(runs, monkeypatch, capfd):
    def fail(*arguments, **settings):
        raise RuntimeError(f"cannot answer {LOCAL}")

    monkeypatch.setattr(conversation_module, "generate_answer", fail)
    with serving(runs()) as http:
        response = http.post(PATH, json=user(LOCAL))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The answer failed with RuntimeError."
    out, err = capfd.readouterr()
    assert "RuntimeError" in err and "test_server.py" in err and LOCAL not in out + err


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(runs):
    saved = runs("dual", "prompt")
    run = saved.root / "results" / "served"  # a run below a checkout is that checkout's
    shutil.copytree(saved.run.path, run)
    command = [sys.executable, "-m", "fedlora_app.cli", "serve", run]
    command += ["--client", "ann", "--port", "0"]
    # What a shell runs in the background ignores SIGINT, and so would all that it starts.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as process:
        try:
            lines = []  # a library may have its say between them
            while "http://" not in "".join(lines[-1:]):
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            url = next(word for word in lines[-1].split() if "http://" in word).rstrip(",")
            answer = httpx.post(f"{url}/chat/completions", json=user(LOCAL), timeout=60).json()
            process.send_signal(signal.SIGINT)
            lines += process.stderr.readlines()
            assert process.wait(30) == 130
        finally:
            process.kill()
    expected = open_conversation(saved, "ann").ask(LOCAL).text
    assert answer["choices"][0]["message"]["content"] == expected
    assert "Loading ann's adapters after round 1.\n" in lines and lines[-1] == "Stopped.\n"
    assert any("without a key; Ctrl-C stops it." in line for line in lines)
