"""Flower's own pool of actors, watched; Ray itself is replaced. The kill tests have it real."""

from __future__ import annotations

import threading

import pytest
import ray
from flwr.app import Message, RecordDict
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport import ray_actor
from flwr.supercore.task_identity import TaskIdentity
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from fedlora_app.federation import ray_pool as workers
from fedlora_app.federation.grid import build_message
from fedlora_app.federation.messages import MessageError, build_error_reply
from fedlora_app.federation.replies import read_reply
from fedlora_app.foundation.errors import UserError


class Actor:
    """An actor of Ray, or one of its methods, as far as the pool uses it."""

    def __init__(self) -> None:
        self.is_dead = threading.Event()

    @property
    def __ray_call__(self):
        return self

    @property
    def __ray_ready__(self):
        return self

    def remote(self, function=lambda *_: None, app_fn=None):
        function(self, app_fn)
        return ("ready", None)


@pytest.fixture
def pool(monkeypatch):
    """A pool of one actor that answers what ``pool.answer`` holds."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    monkeypatch.setattr(raybackend, "BasicActorPool", ray_actor.BasicActorPool)
    monkeypatch.setattr(ray_actor, "pool_size_from_resources", lambda resources: 1)
    monkeypatch.setattr(workers, "_pool", None)
    workers.watch_workers()
    workers.watch_workers()  # again, as in a worker that imports the module
    pool = raybackend.BasicActorPool(None, {}, {})
    assert workers.current_pool() is pool
    pool.create_actor_fn = Actor
    pool.add_actors_to_pool(1)

    def get(future, timeout=None):
        name, actor = future
        if name == "ready":
            return None
        if isinstance(pool.answer, BaseException):
            raise pool.answer
        if pool.answer == "hang":
            assert actor.is_dead.wait(20)
            raise ActorDiedError()
        return "0", *pool.answer

    pool.begins = True
    monkeypatch.setattr(ray, "wait", lambda promises, timeout: (promises[: pool.begins], []))
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor: actor.is_dead.set())
    return pool


def submit(pool):
    message = build_message(RecordDict(), "train", 7)
    message.metadata.__dict__["_message_id"] = "m0"
    job = (list, message, "0", "context")
    return message, pool.submit(lambda actor, *_: ("run", actor), job)


def test_a_reply_passes_and_its_actor_is_used_again(pool):
    [actor] = pool.pool
    message, future = submit(pool)
    assert pool.started_at("m0") > 0 and pool.started_at("other") is None
    pool.answer = (Message(RecordDict(), reply_to=message), "new context")
    assert pool.fetch_result_and_return_actor_to_pool(future) == pool.answer
    assert pool.pool == [actor] and pool.started_at("m0") is None
    assert not pool.stop("m0") and not actor.is_dead.is_set()


def test_a_dead_workers_actor_is_replaced_and_its_client_said_to_have_failed(pool):
    [actor] = pool.pool
    _, future = submit(pool)
    pool.answer = ActorDiedError()
    reply, context = pool.fetch_result_and_return_actor_to_pool(future)
    assert reply.error.reason == workers.LOST and context == "context"
    assert reply.metadata.reply_to_message_id == "m0"
    assert len(pool.pool) == 1 and pool.pool != [actor] and not pool._future_to_actor


def test_a_hung_workers_actor_is_killed_and_replaced(pool):
    [actor] = pool.pool
    _, future = submit(pool)
    pool.answer = "hang"
    threading.Timer(0.1, pool.stop, ["m0"]).start()
    reply, _ = pool.fetch_result_and_return_actor_to_pool(future)
    assert reply.has_error() and actor.is_dead.is_set()
    assert len(pool.pool) == 1 and pool.pool != [actor]


def test_an_actor_that_answers_while_it_is_killed_does_not_come_back(pool):
    [actor] = pool.pool
    message, future = submit(pool)
    pool.answer = (Message(RecordDict(), reply_to=message), "new context")
    assert pool.stop("m0")
    pool.fetch_result_and_return_actor_to_pool(future)
    assert pool.pool != [actor]


def test_a_worker_whose_gpu_context_is_lost_gets_no_other_message(pool):
    [actor] = pool.pool
    message, future = submit(pool)
    reply = build_error_reply(message, "strict", "AcceleratorError", process_is_spoilt=True)
    pool.answer = (reply, "new context")
    assert pool.fetch_result_and_return_actor_to_pool(future) == pool.answer
    assert actor.is_dead.is_set() and len(pool.pool) == 1 and pool.pool != [actor]
    with pytest.raises(MessageError, match="strict: AcceleratorError"):
        read_reply(reply, "strict", 1)


def test_a_worker_that_never_begins_is_given_up_and_the_logs_are_named(pool):
    [actor] = pool.pool
    _, future = submit(pool)
    pool.begins = False
    reply, context = pool.fetch_result_and_return_actor_to_pool(future)
    assert "Ray had no worker process for it within 300 seconds" in reply.error.reason
    assert "logs say why" in reply.error.reason and context == "context"
    assert pool.pool == [actor] and pool.started_at("m0") is None


def test_an_exception_of_the_client_is_flowers_matter(pool):
    [actor] = pool.pool
    _, future = submit(pool)
    pool.answer = RayTaskError("run", "traceback", ValueError("of the client"))
    with pytest.raises(RayTaskError):
        pool.fetch_result_and_return_actor_to_pool(future)
    pool.add_actor_back_to_pool(future)  # as its backend does
    assert pool.pool == [actor]


def test_where_no_new_actor_starts_the_note_says_so(pool, capsys):
    def fail():
        raise GetTimeoutError("no room")

    [actor] = pool.pool
    _, future = submit(pool)
    pool.answer, pool.create_actor_fn = ActorDiedError(), fail
    assert pool.fetch_result_and_return_actor_to_pool(future)[0].has_error()
    assert pool.pool == [actor]
    note = "Note: a lost worker could not be replaced (GetTimeoutError: no room). A client that"
    assert note in capsys.readouterr().err


def test_another_pool_than_the_known_one_is_left_alone(monkeypatch, capsys):
    class Other(ray_actor.BasicActorPool):
        def submit(self, job):
            return None

    monkeypatch.setattr(raybackend, "BasicActorPool", Other)
    workers.watch_workers()
    assert raybackend.BasicActorPool is Other
    assert "pool of workers is another one (Other.submit)" in capsys.readouterr().err
    monkeypatch.delattr(raybackend, "BasicActorPool")
    workers.watch_workers()
    assert "no attribute 'BasicActorPool'" in capsys.readouterr().err


def test_an_environment_that_no_worker_starts_from_is_refused(monkeypatch):
    workers.require_usable_environment()
    monkeypatch.setattr("sys.executable", "/home/ann/my project/.venv/bin/python")
    with pytest.raises(UserError, match="ends at the space in this path"):
        workers.require_usable_environment()
