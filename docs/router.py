"""The router of an export, before a server of its two adapters: python router.py EXPORT/router.

It needs transformers and safetensors. For every chat completion it makes the two features that
gate.json names of the last question, with the base model, compares them and passes the request on
to the model "global" or "pair". A request without a system prompt gets the client's own.
"""

import argparse
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer


class Router:
    """Chooses between two adapters by the last question alone."""

    def __init__(self, folder, base):
        self.about = json.loads((Path(folder) / "gate.json").read_text(encoding="utf-8"))
        content = (Path(folder) / "gate.safetensors").read_bytes()
        if self.about.get("sha256", found := hashlib.sha256(content).hexdigest()) != found:
            raise ValueError(f"{folder}/gate.safetensors is not the file that was exported")
        tensors = load(content)
        self.is_local, self.foreign = tensors.pop("is_local"), tensors.pop("foreign")
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.marks = [t for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
        try:
            self.choose("")
        except (LookupError, RuntimeError) as error:
            raise ValueError(f"{base} is not the base model of this gate: {error}") from None

    def encode(self, question):
        """Return the prompt's tokens; marks of the chat template in a question are mere text."""
        before, after = self.about["text_before_question"], self.about["text_after_question"]
        parts = ((before, False), (said := question.strip(), True), (after, False))
        if not any(mark.content in said for mark in self.marks):
            parts = ((before + said + after, False),)
        ids = []
        for text, is_said in parts:
            as_text = {"add_special_tokens": False, "split_special_tokens": is_said}
            ids += self.tokenizer(text, **as_text)["input_ids"]
        return torch.tensor([ids])

    @torch.inference_mode()
    def compute_features(self, ids):
        """Return the mean of the middle layer's states, and the last token's last state."""
        states = self.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        middle = states[self.about["middle_layer"]][0].double().mean(0)
        return {"middle": middle, "last": states[-1][0, -1].double()}

    def choose(self, question):
        """Return "pair" where the question is one of the client's own, else "global"."""
        ids, similarities = self.encode(question), []
        if torch.isin(ids, self.foreign).any():
            return "global"
        for name, feature in self.compute_features(ids).items():
            centred, basis = feature - self.tensors[f"{name}.centre"], self.tensors[f"{name}.basis"]
            spread = centred + basis @ (basis.T @ centred * self.tensors[f"{name}.gains"])
            similarities.append(self.tensors[f"{name}.means"] @ (spread / spread.norm()))
        nearest = sum(similarities) / len(similarities)
        local, universal = nearest[self.is_local].max(), nearest[~self.is_local].max()
        odds = torch.stack([local, universal, local**0]) @ self.tensors["coefficients"]
        return "pair" if odds > 0 and local >= self.tensors["floor"] else "global"

    def rewrite(self, body):
        """Return a chat completion's request for the adapter that is to answer it, greedily."""
        messages, own = body["messages"], self.about["system_prompt"]
        asked = messages[-1]["content"]
        if not isinstance(asked, str):
            asked = "".join(part["text"] for part in asked)
        if own and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": own}, *messages]
        defaults = {"temperature": 0, "chat_template_kwargs": {"enable_thinking": False}}
        return defaults | body | {"messages": messages, "model": self.choose(asked)}


class Handler(BaseHTTPRequestHandler):
    """Stands before the server of both adapters."""

    def do_GET(self):
        """Pass on what is no completion, the list of models for instance."""
        self.pass_on(None)

    def do_POST(self):
        """Pass a chat completion on, and its answer back as it comes."""
        try:
            asked = self.rfile.read(max(0, int(self.headers["Content-Length"] or 0)))
            body = self.server.router.rewrite(json.loads(asked))
        except (ValueError, LookupError, TypeError, AttributeError):
            self.refuse(400, "Expected the JSON of a chat completion whose last message is text.")
        else:
            self.pass_on(json.dumps(body).encode())

    def pass_on(self, body):
        """Send a request to the server of both adapters, and its answer back."""
        request = Request(self.server.upstream + self.path, body)
        for name in ("Authorization", "Content-Type"):
            request.add_header(name, self.headers.get(name, ""))
        try:
            answer = build_opener(ProxyHandler({})).open(request)  # by no proxy
        except HTTPError as error:  # is an answer, too
            answer = error
        except OSError as error:
            self.refuse(502, f"{self.server.upstream} does not answer: {error}")
            return
        with answer:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            while piece := answer.read1():
                self.wfile.write(piece)

    def refuse(self, status, message):
        """Answer with an error as OpenAI words it."""
        body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}})
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())


def build_server(router, upstream, port):
    """Return a server on loopback before the one that has the adapters."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.router, server.upstream = router, upstream
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--base", required=True, help="the base model, at the hub or a folder")
    parser.add_argument("--upstream", default="http://127.0.0.1:8001", help="has the adapters")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    try:
        router = Router(given.folder, given.base)
    except (OSError, ValueError, LookupError) as error:
        why = f"{type(error).__name__}: {error}"
        raise SystemExit(f"Nothing can be routed with {given.folder}: {why}") from None
    build_server(router, given.upstream, given.port).serve_forever()
