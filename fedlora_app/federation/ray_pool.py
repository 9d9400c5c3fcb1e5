"""What a simulation needs when one of Ray's workers dies, hangs, never begins or is spoilt.

Flower puts the actor of a dead worker back into its pool, where every later client fails on
it, and waits without a limit for one that hangs or has no process yet. Here a dead actor is
replaced, as is one whose GPU context is beyond repair; a hung one can be stopped, and one that
never begins is given up. The pool is Flower's own and internal: where it looks otherwise,
Flower's behaviour remains, with a note. Deployments have no pool.
"""

from __future__ import annotations

import inspect
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedlora_app.federation.messages import ends_worker
from fedlora_app.foundation.errors import UserError

START_SECONDS = 300.0
LOST = "its worker process died (killed, out of memory or crashed)"
NEVER_BEGAN = (
    "Ray had no worker process for it within {seconds:g} seconds. The newest raylet.out and "
    "python-core-worker-*.log in {logs} say why; often something else uses the machine's memory "
    "or processors, or a firewall is between its own ports"
)
POOL_METHODS = {
    "submit": ["self", "actor_fn", "job"],
    "fetch_result_and_return_actor_to_pool": ["self", "future"],
    "add_actor_back_to_pool": ["self", "future"],
}

_pool: WatchedPool | None = None


@dataclass
class Job:
    """A message that an actor is working on."""

    app_fn: Any
    message: Message
    context: Any
    started_at: float
    begun: Any
    """Ray's promise of the actor's process."""
    is_lost: bool = False


def require_usable_environment() -> None:
    """Refuse a Python environment that Ray's workers would never start from.

    Raises:
        UserError: there is a space in its path.
    """
    if any(map(str.isspace, sys.executable)):
        raise UserError(
            f"The environment in {sys.prefix} cannot be used for a simulation: Ray starts its "
            "workers by a command that ends at the space in this path, and they would be waited "
            "for without end. Make an environment in a folder without one; the project may stay "
            "where it is."
        )


class WatchedPool:
    """Mixed into Flower's pool of actors: tracks their messages, and replaces lost actors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global _pool
        super().__init__(*args, **kwargs)
        self._jobs: dict[Any, Job] = {}
        self._jobs_lock = threading.Lock()
        _pool = self
        _print_workers_lines_as_they_are()

    def submit(self, actor_fn: Any, job: tuple) -> Any:
        """Give a message to an idle actor."""
        app_fn, message, _, context = job
        with self._jobs_lock:
            begun = self.pool[-1].__ray_ready__.remote()  # of the actor that is taken now
            future = super().submit(actor_fn, job)
            self._jobs[future] = Job(app_fn, message, context, time.monotonic(), begun)
        return future

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Message, Any]:
        """Return a client's reply; an error says so if its worker was lost."""
        import ray  # only a simulation needs it
        from ray.exceptions import RayError, RayTaskError

        job = self._jobs[future]
        if not ray.wait([job.begun], timeout=START_SECONDS)[0]:
            self.add_actor_back_to_pool(future)  # a new one would not begin either
            return _fail(job, NEVER_BEGAN.format(seconds=START_SECONDS, logs=_find_logs()))
        try:
            _, reply, context = ray.get(future)  # as Flower does, but for the look at the reply
            job.is_lost |= ends_worker(reply)
        except RayError as error:
            if isinstance(error, RayTaskError):  # raised by the client; its worker lives
                raise
            job.is_lost = True
            reply, context = _fail(job, LOST)
        self.add_actor_back_to_pool(future)
        return reply, context

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Return an actor to the pool, or a new one in its place."""
        with self._jobs_lock:
            job = self._jobs.pop(future)
        if job.is_lost:
            self._future_to_actor[future] = self._replace(self._future_to_actor[future], job)
        super().add_actor_back_to_pool(future)

    def started_at(self, message_id: str) -> float | None:
        """Return when an actor got the message, by the monotonic clock; None if none has it."""
        with self._jobs_lock:
            jobs = list(self._jobs.values())
        starts = (job.started_at for job in jobs if job.message.metadata.message_id == message_id)
        return next(starts, None)

    def stop(self, message_id: str) -> bool:
        """Kill the worker that deals with the message; return whether there was one."""
        import ray

        with self._jobs_lock:
            for future, job in self._jobs.items():
                if job.message.metadata.message_id == message_id:
                    job.is_lost = True  # also where its reply comes in this moment
                    ray.kill(self._future_to_actor[future])
                    return True
        return False

    def _replace(self, lost: Any, job: Job) -> Any:
        """Return a new actor once it has imported the app, which no client's timeout includes."""
        import ray

        try:
            ray.kill(lost)  # it may only be out of reach, and keep what the new one needs
            actor = self.create_actor_fn()
            ready = actor.__ray_call__.remote(_import_app, job.app_fn)
            ray.get(ready, timeout=START_SECONDS)
            return actor
        except Exception as error:  # the next client fails with Flower's own message
            _note(f"a lost worker could not be replaced ({type(error).__name__}: {error})")
            return lost


def watch_workers() -> None:
    """Have Flower build its pool as a ``WatchedPool``; call it before the pool is built."""
    try:
        from flwr.server.superlink.fleet.vce.backend import raybackend

        pool = raybackend.BasicActorPool
        for name, parameters in POOL_METHODS.items():
            if list(inspect.signature(getattr(pool, name)).parameters) != parameters:
                raise AttributeError(f"{pool.__name__}.{name}")
    except (ImportError, AttributeError) as error:
        _note(f"this Flower's pool of workers is another one ({error})")
        return
    if not issubclass(pool, WatchedPool):
        raybackend.BasicActorPool = type("WatchedActorPool", (WatchedPool, pool), {})


def current_pool() -> WatchedPool | None:
    """Return the pool of the simulation in this process, once it is built."""
    return _pool


def _print_workers_lines_as_they_are() -> None:
    """Leave out Ray's prefix (class and process id); our lines already name their client."""
    try:
        from ray._private import ray_logging, worker

        dispatcher = ray_logging.global_worker_stdstream_dispatcher
        if any(name == "ray_print_logs" for name, _ in dispatcher.handlers):
            dispatcher.remove_handler("ray_print_logs")
            plain = partial(worker.print_to_stdstream, ignore_prefix=True)
            dispatcher.add_handler("ray_print_logs", plain)
    except (ImportError, AttributeError):  # another Ray: the lines keep their prefix
        return


def _fail(job: Job, why: str) -> tuple[Message, Any]:
    return Message(Error(ErrorCode.UNKNOWN, why), reply_to=job.message), job.context


def _find_logs() -> str:
    """Return the folder of Ray's logs."""
    try:
        from ray._private.worker import global_worker

        return global_worker.node.get_logs_dir_path()
    except (ImportError, AttributeError):  # another Ray
        return "/tmp/ray/session_latest/logs"


def _import_app(actor: Any, app_fn: Any) -> None:
    app_fn()


def _note(what: str) -> None:
    print(
        f"Note: {what}. A client that hangs or whose worker dies then takes the others with it.",
        file=sys.stderr,
        flush=True,
    )
