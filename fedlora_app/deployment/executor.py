"""A site's one long-lived process that answers messages, beside a SuperNode that starts none.

``flower-supernode --isolation process`` hands its tasks out over its Runtime API on loopback. In
the place of ``flower-superexec``, which starts a ``flwr-clientapp`` for each message, this process
takes them one after another: it imports once and keeps the base model. It runs the *installed*
ClientApp, never code of the bundle that the coordinator has sent, and refuses a bundle whose code
is another one. What passes between it and the SuperNode are Flower's own calls.
"""

# ruff: noqa: E402

from __future__ import annotations

from fedlora_app.foundation.environment import prepare_environment

prepare_environment()  # before torch

import argparse
import os
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from flwr.app import Context, Message
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.object_ref import load_app
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import (
    pull_task_input,
    push_message,
    push_task_output,
)

from fedlora_app.deployment.endings import FAULTY, SPOILT, STOPPED_IN_TASK, UNUSABLE
from fedlora_app.deployment.happenings import BUNDLE_REFUSED
from fedlora_app.deployment.logs import READY
from fedlora_app.deployment.record import record
from fedlora_app.deployment.witness import hash_text, witness_received, witness_sent
from fedlora_app.federation.messages import build_error_reply, ends_worker
from fedlora_app.foundation.errors import UserError
from fedlora_app.foundation.files import keep_files_private
from fedlora_app.foundation.project import PACKAGE_DIR, hash_bundled_package, hash_package

CLIENT_APP = "fedlora_app.client_app:app"
"""What pyproject.toml names as the ClientApp, which an installed package has no file for."""
POLL_SECONDS = 0.1  # Flower's is a second, for a SuperLink that many poll
RECONNECT_SECONDS = 1.0
FORCED_EXIT_SECONDS = 10.0  # after which a stopped process ends wherever it is
REFUSALS, MOST_REFUSALS = (401, 403), 5
"""A single one may be of a clock that was set."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"

App = Callable[[Message, Context], Message]


class ExecutorError(UserError):
    """The executor cannot work here; the message says what to do."""


class Stopped(BaseException):
    """Somebody ends this process, or Flower has given up its task."""


def main() -> int:
    """Serve a SuperNode until a signal; return the exit status, of ``endings``."""
    arguments = _parse_arguments()
    keep_files_private()
    try:
        secret = load_superexec_auth_secret(arguments.superexec_auth_secret_file)
        app = load_app(CLIENT_APP, LoadClientAppError, PACKAGE_DIR.parent)
    except (ValueError, LoadClientAppError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return UNUSABLE
    executor = Executor(arguments.runtime_api_address, secret or b"", app, arguments.client_file)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        return executor.run()
    except Stopped:
        return STOPPED_IN_TASK if executor.has_failed_task else 0
    except ExecutorError as error:
        print(f"Error: {error}", file=sys.stderr)
        return UNUSABLE


@dataclass
class Executor:
    """Takes tasks of one SuperNode and answers them.

    Args:
        address: of the SuperNode's Runtime API, host:port.
        secret: what the SuperNode knows its executor by.
        app: answers a message.
        client_file: the site's own file, for its name in a refusal.
    """

    address: str
    secret: bytes
    app: App
    client_file: Path | None = None
    has_failed_task: bool = field(default=False, init=False)
    """Whether the last task ended because this process was stopped."""

    def run(self) -> int:
        """Answer messages until one spoils this process; return the exit status."""
        interceptors: list[ProtobufClientInterceptor] = []
        if self.secret:
            interceptors.append(
                SuperExecAuthHttpInterceptor(
                    master_secret=self.secret, protected_methods=frozenset({ACQUIRE})
                )
            )
        print(f"{READY}; code {hash_package()[:12]}.", flush=True)
        client = self._connect(interceptors, None)
        request = AcquireTaskRequest(supported_task_types=list(TaskType))
        num_failures = 0
        try:
            while True:
                try:
                    acquired = client.AcquireTask(request)
                except httpx.HTTPError as error:
                    num_failures += 1
                    self._explain(error, num_failures)
                    time.sleep(RECONNECT_SECONDS)
                    continue
                num_failures = 0
                if not (acquired.HasField("task") and acquired.token):
                    time.sleep(POLL_SECONDS)
                elif self._serve(acquired.token, acquired.task.type):
                    return SPOILT
        finally:
            client.close()

    def _explain(self, error: httpx.HTTPError, num_failures: int) -> None:
        """Say once that no task can be asked for; raise where it will stay so."""
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if status in REFUSALS and num_failures >= MOST_REFUSALS:
            raise ExecutorError(
                f"The SuperNode at {self.address} refuses this executor ({status}). Both must be "
                "given the same file by --superexec-auth-secret-file."
            )
        if num_failures == 1:
            print(f"No tasks from the SuperNode at {self.address} ({error}); waiting.", flush=True)

    def _serve(self, token: str, task_type: str) -> bool:
        """Answer the message of a task; return whether this process must end after it."""
        retry = make_simple_http_retry_invoker()
        client = self._connect([RuntimeTokenHttpInterceptor(token)], retry)
        message = context = reply = None
        status, details = SubStatus.FAILED, "The executor failed."
        try:
            with _heartbeats(client):
                try:
                    message, context, _, fab = pull_task_input(client)
                    if refusal := find_refusal(task_type, fab.content):
                        details = refusal
                        reply = self._refuse_task(message, context, refusal, fab.content)
                    else:
                        reply = self.app(message, context)
                        status, details = SubStatus.COMPLETED, ""
                except Stopped:
                    retry.max_tries = 1
                    self.has_failed_task = message is not None
                    details = "This client's executor was stopped in the middle of its work."
                    if message is not None and context is not None:
                        reply = self._refuse(message, context, details)
                    raise
                except httpx.HTTPError as error:  # the SuperNode has gone, and the task with it
                    details = f"The executor could not take its task: {error}"
                    print(details, flush=True)
                except Exception as error:
                    traceback.print_exc()
                    details = f"{type(error).__name__}; this client's log has the rest."
                    if message is not None and context is not None:
                        reply = self._refuse(message, context, details)
                finally:
                    is_spoilt = reply is not None and ends_worker(reply)
                    _report(client, reply, context, status, details)
        finally:
            client.close()
        return is_spoilt

    def _refuse_task(self, message: Message, context: Context, why: str, bundle: bytes) -> Message:
        """Refuse a task, and enter message and reply in the evidence as the app would."""
        witness_received(message, context.node_id)
        record(
            BUNDLE_REFUSED,
            bundle_package_sha256=hash_bundle(bundle),
            package_sha256=hash_package(),
            why_sha256=hash_text(why),
        )
        reply = self._refuse(message, context, why)
        witness_sent(message, reply, context.node_id)
        return reply

    def _refuse(self, message: Message, context: Context, why: str) -> Message:
        """Return a reply that says why the work was not done; the log has it too."""
        name = identify(context, self.client_file)
        print(f"{name}: {why}", flush=True)
        return build_error_reply(message, name, why)

    def _connect(
        self, interceptors: list[ProtobufClientInterceptor], retry: RetryInvoker | None
    ) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=True,  # it is this machine's loopback
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *interceptors],
            retry_invoker=retry,
        )


def find_refusal(task_type: str, bundle: bytes) -> str | None:
    """Return why a task is not done here: it is another kind of app, or another code."""
    if task_type != TaskType.CLIENT_APP:
        return f"This client runs its own ClientApp and nothing else; asked for was {task_type}."
    bundled = hash_bundle(bundle)
    if bundled is None:
        return "The app bundle is damaged."
    if bundled == hash_package():
        return None
    return (
        f"The app bundle's code is not what is installed here: its sha256 is {bundled}, that of "
        f"the installed package {hash_package()}. Nothing of the bundle was run. Install the same "
        "version of fedlora-app at the coordinator and here."
    )


def hash_bundle(bundle: bytes) -> str | None:
    """Return the sha256 of the package in an app bundle; None where the bundle is damaged."""
    try:
        return hash_bundled_package(bundle)
    except zipfile.BadZipFile:
        return None


def identify(context: Context, client_file: Path | None) -> str:
    """Return the client's id, of the node configuration or its own file, else the node's."""
    named = context.node_config.get("client-id")
    if named is None and client_file is not None:
        try:
            named = yaml.safe_load(client_file.read_text(encoding="utf-8")).get("id")
        except (OSError, ValueError, yaml.YAMLError, AttributeError):
            named = None  # what is wrong with it the app says
    return f"node {context.node_id}" if named is None else str(named)


@contextmanager
def _heartbeats(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the SuperNode throughout the block that its task is being worked on."""
    send = make_task_heartbeat_fn_http(client)

    def beat() -> bool:
        try:
            return send()
        except httpx.HTTPStatusError:  # a SuperNode that has restarted knows nothing of the task
            signal.raise_signal(signal.SIGINT)  # as Flower does where the task has been given up
            return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def _report(
    client: RuntimeHttpClient,
    reply: Message | None,
    context: Context | None,
    status: str,
    details: str,
) -> None:
    """Hand a reply to the SuperNode, and how its task ended."""
    try:
        if reply is not None and context is not None:
            push_message(client, reply, context)
    except (httpx.HTTPError, ValueError, RuntimeError) as error:
        status, details = SubStatus.FAILED, f"The reply could not be handed over: {error}"
        print(details, flush=True)
    push_task_output(client, context, status, details)


def _stop(number: int, _frame: object) -> None:
    """Leave whatever is being done; a second signal changes nothing."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    # Code that cannot be left, in a library, would otherwise keep this process for ever.
    timer = threading.Timer(FORCED_EXIT_SECONDS, os._exit, [FAULTY])
    timer.daemon = True
    timer.start()
    raise Stopped(signal.Signals(number).name)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fedlora_app.deployment.executor")
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT")
    parser.add_argument("--superexec-auth-secret-file", metavar="FILE")
    parser.add_argument("--client-file", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)  # all is handed over, and to take model and torch apart takes seconds
