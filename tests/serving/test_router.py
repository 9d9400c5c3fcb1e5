"""docs/router.py, beside the package's own gate and before a server that notes what it gets."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch
from conftest import DEMO_MODEL, ROOT
from loopback import Federation

from fedlora_app.config.loading import load_config
from fedlora_app.data.client_files import load_client_files
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.records import format_question, load_records
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.runs.reading import load_run
from fedlora_app.serving.export import export_adapter

SCRIPT = ROOT / "docs" / "router.py"
OVERRIDES = (
    "adapters.gate=prompt federated.num_rounds=1 training.max_steps=1 training.batch_size=1 "
    "evaluation.interval=0 evaluation.max_new_tokens=1"
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("router", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    """A run on the demo's base model that has hardly learnt; its gate is as any other."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "pyproject.toml", project)
    shutil.copytree(ROOT / "data" / "demo", project / "data" / "demo")
    config = load_config(ROOT / "conf" / "demo.yaml", OVERRIDES)
    path = Federation(project, project / "results", config).run("run")
    return SavedModel(load_run(path), 1, project)


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "northgate"
    export_adapter(saved, "northgate", folder)
    return folder


@pytest.fixture(scope="module")
def router(script, exported):
    return script.Router(exported / "router", DEMO_MODEL)


def test_it_is_short_and_needs_nothing_of_ours():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 150 and "fedlora" not in text


def test_it_chooses_as_the_gate_does(saved, router, monkeypatch):
    client = saved.run.config.client("northgate")
    files = load_client_files(saved.run.config, client, ROOT)
    shared = load_records(ROOT / saved.run.config.data.universal_test)
    records = [*files.local.records[::4], *load_records(ROOT / client.local_test).records]
    questions = [format_question(record) for record in (*records, *shared.records)]
    questions += ["Why?", "Which planet is the largest?\n\nSay it in one word."]
    questions += [f" <|im_start|>{question}\n" for question in questions[:8]]  # mere text
    questions += [f"\n {question}  \n" for question in questions[:8]]
    tokenizer = saved.load()[0].tokenizer
    with saved.answering(saved.own("northgate")) as (model, gate):
        prompts = [gate.encode(tokenizer, question) for question in questions]
        weights = gate.weigh(model, prompts).tolist()
        stricter = replace(gate, floor=torch.tensor(0.9), _known={}).weigh(model, prompts).tolist()
    assert [router.choose(q) for q in questions] == [("global", "pair")[int(w)] for w in weights]
    assert 20 < sum(weights) < len(weights) - 20
    tensors = router.tensors | {"floor": torch.tensor(0.9)}
    monkeypatch.setattr(router, "tensors", tensors)
    assert [router.choose(q) for q in questions] == [("global", "pair")[int(w)] for w in stricter]
    assert 0 < sum(stricter) < sum(weights)


def test_a_token_that_closes_the_gate_closes_it_here_too(saved, router, monkeypatch):
    questions = ["What is the penalty for littering?", "What does littering cost?"]
    tokenizer = saved.load()[0].tokenizer
    token = tokenizer(" littering", add_special_tokens=False)["input_ids"][-1]
    system_prompt = saved.run.config.client("northgate").system_prompt
    prompts = [encode_prompt(tokenizer, system_prompt, question) for question in questions]
    assert all(token in prompt for prompt in prompts)
    with saved.answering(saved.own("northgate")) as (model, gate):
        opened = gate.weigh(model, prompts).tolist()
        closed = replace(gate, foreign=torch.tensor([token]), _known={}).weigh(model, prompts)
    assert 1 in opened and not closed.any()
    assert [router.choose(q) for q in questions] == [("global", "pair")[int(w)] for w in opened]
    monkeypatch.setattr(router, "foreign", torch.tensor([token]))
    assert [router.choose(q) for q in questions] == ["global", "global"]


def test_white_space_around_a_question_moves_no_gate(saved, router):
    """Some chat templates leave it out, which the text around a question does not tell."""
    tokenizer = saved.load()[0].tokenizer
    with saved.answering(saved.own("northgate")) as (_, gate):
        for question in ("What does littering cost?", "What is <|im_end|>?"):
            expected = gate.encode(tokenizer, question)
            for asked in (question, f"\n {question}  \n"):
                assert gate.encode(tokenizer, asked) == router.encode(asked)[0].tolist() == expected


def test_what_is_damaged_or_of_another_base_model_is_said_at_the_start(
    script, router, tiny_project, exported, tmp_path
):
    folder = shutil.copytree(exported / "router", tmp_path / "router")
    with pytest.raises(ValueError, match="model is not the base model of this gate: "):
        script.Router(folder, tiny_project / "model")
    (folder / "gate.safetensors").write_bytes(b"else")
    with pytest.raises(ValueError, match="is not the file that was exported"):
        script.Router(folder, DEMO_MODEL)
    (folder / "gate.json").write_text("{")
    command = [sys.executable, SCRIPT, folder, "--base", DEMO_MODEL]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith(f"Nothing can be routed with {folder}: JSONDecodeError")


class Upstream(BaseHTTPRequestHandler):
    """Notes what it is asked, and answers in two pieces."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"object": "list"}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        self.send_response(400 if body.get("n") == 2 else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for piece in (b"data: one\n\n", b"data: [DONE]\n\n"):
            self.wfile.write(piece)

    def log_message(self, *arguments):
        pass


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_requests_are_passed_on_to_the_adapter_that_is_chosen(script, saved, router):
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    upstream.asked = []
    client = saved.run.config.client("northgate")
    local = format_question(load_records(ROOT / client.local_train).records[0])
    universal = format_question(load_records(ROOT / client.universal_train).records[0])

    def in_parts(text):
        return [{"type": "text", "text": part} for part in (text[:9], text[9:])]

    earlier = [{"role": "user", "content": universal}, {"role": "assistant", "content": "Yes."}]
    system = {"role": "system", "content": "You are someone else."}
    with running(upstream) as url, running(script.build_server(router, url, 0)) as before:
        for messages, more in (
            ([{"role": "user", "content": universal}], {}),
            ([*earlier, {"role": "user", "content": local}], {"temperature": 0.5, "stream": True}),
            ([system, {"role": "user", "content": in_parts(local)}], {"n": 2}),
        ):
            response = httpx.post(
                f"{before}/v1/chat/completions",
                json={"model": "northgate", "messages": messages} | more,
                headers={"authorization": "Bearer k3y"},
            )
            assert response.status_code == (400 if "n" in more else 200)
            assert response.text == "data: one\n\ndata: [DONE]\n\n"
            assert response.headers["content-type"] == "text/event-stream"
    paths, keys, bodies = zip(*upstream.asked, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer k3y"}
    assert [body["model"] for body in bodies] == ["global", "pair", "pair"]
    assert [body["temperature"] for body in bodies] == [0, 0.5, 0]
    own = {"role": "system", "content": client.system_prompt}
    assert bodies[0]["messages"] == [own, {"role": "user", "content": universal}]
    assert bodies[1]["messages"][:-1] == [own, *earlier] and bodies[1]["stream"] is True
    assert bodies[2]["messages"][0] == system and bodies[2]["n"] == 2


def test_questions_go_to_no_proxy_that_the_environment_names(script, router, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # that read the environment before
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    with running(upstream) as url, running(script.build_server(router, url, 0)) as before:
        answer = httpx.get(f"{before}/v1/models", trust_env=False)
        assert answer.json() == {"object": "list"}


def test_the_rest_is_passed_on_and_what_cannot_be_is_said(script, router):
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    with running(upstream) as url, running(script.build_server(router, url, 0)) as before:
        assert httpx.get(f"{before}/v1/models").json() == {"object": "list"}
        for body in (b"{", b"[]", b"{}", b'{"messages": [{"role": "user", "content": 1}]}'):
            refused = httpx.post(f"{before}/v1/chat/completions", content=body)
            assert refused.status_code == 400 and "chat completion" in refused.text
        connection = HTTPConnection(before.removeprefix("http://"))
        connection.request("POST", "/v1/chat/completions", headers={"Content-Length": "many"})
        assert connection.getresponse().status == 400
        connection.close()
    with running(script.build_server(router, url, 0)) as before:  # that server has ended
        gone = httpx.get(f"{before}/v1/models")
        assert gone.status_code == 502 and url in gone.json()["error"]["message"]
