"""Flower's client side: which client this node is, and its three kinds of messages.

*query*: register; *train*: the phase before the average; *evaluate*: personalise against
the new global adapter and evaluate.
"""

# ruff: noqa: E402

from __future__ import annotations

from fedlora_app.foundation.environment import prepare_environment

prepare_environment()  # before torch; Flower imports this module before it starts Ray

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from fedlora_app.client import Client
from fedlora_app.config.schema import FEEDBACK, Config, ConfigError
from fedlora_app.config.sharing import keeps_feedback, of_factors, travelling_factors
from fedlora_app.data.records import DataError
from fedlora_app.deployment.client_file import ConfidentialError, OwnSettings, find_own_settings
from fedlora_app.deployment.evidence import EvidenceError
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.policy import Asked, Guard, Policy, PolicyError, load_policy
from fedlora_app.deployment.record import record
from fedlora_app.deployment.witness import witness_received, witness_sent
from fedlora_app.evaluation.room import EvaluationError
from fedlora_app.federation.messages import (
    ADAPTER_RECORD,
    OWN_SETTINGS,
    REGISTRATION_ROUND,
    Kept,
    MessageError,
    Task,
    build_error_reply,
    build_need_reply,
    build_reply,
    is_probe,
    read_task,
)
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.federation.ray_pool import watch_workers
from fedlora_app.foundation.files import keep_files_private
from fedlora_app.foundation.project import (
    PACKAGE_DIR,
    ProjectNotFoundError,
    find_project_root,
    hash_package,
    is_unpacked_bundle,
)
from fedlora_app.model.adapter_state import AdapterError, AdapterState
from fedlora_app.model.base import ModelError, choose_device, compute_fingerprint
from fedlora_app.model.cards import CardError
from fedlora_app.model.device import (
    compute_reproducibly,
    has_spoilt_process,
    is_out_of_memory,
)
from fedlora_app.runs.client_folder import LostGlobalError
from fedlora_app.runs.own_spending import OwnRelease, describe_release
from fedlora_app.runs.paths import RunDirectoryError, check_run_name
from fedlora_app.training.attention import PackingError
from fedlora_app.training.clipping import ClippingError
from fedlora_app.training.phase import TrainingError

if "flwr.simulation.app" in sys.modules:
    watch_workers()  # Flower imports this module before it starts them
if "flwr.simulation.app" in sys.modules and is_unpacked_bundle(PACKAGE_DIR.parent):
    # Ray's workers look for modules in the folder that Flower's process works in, before
    # anywhere else. From here they load the bundle that is run, and not another checkout.
    os.chdir(PACKAGE_DIR.parent)

app = ClientApp()

PACKAGE_SHA256 = hash_package()  # of the code that this process runs, even if the files change
EXPLAINED_ERRORS = (
    AdapterError,
    CardError,
    ClippingError,
    ConfigError,
    DataError,
    EvaluationError,
    MessageError,
    ModelError,
    PackingError,
    ProjectNotFoundError,
    RunDirectoryError,
    TrainingError,
)


@dataclass(frozen=True)
class Outcome:
    """What a client would send: figures, facts, and after training an update.

    ``shapes`` are those that the update must have, and ``release`` is what it spends of privacy.
    """

    metrics: dict[str, Any]
    facts: dict[str, str]
    update: AdapterState | None = None
    update_dtype: str = "float32"
    shapes: dict[str, torch.Size] | None = None
    release: OwnRelease | None = None


Handler = Callable[[Client, Task, Message], Outcome]


@app.query()
def query(message: Message, context: Context) -> Message:
    """Register: say which client this node is, after checking its data or what it has kept."""
    if is_probe(message):
        return Message(message.content, reply_to=message)
    return _answer(message, context, _register)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train before the average and send the update of the global adapter."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Personalise against the new global adapter, evaluate, and send the metrics."""
    return _answer(message, context, _personalise)


def _register(client: Client, task: Task, message: Message) -> Outcome:
    if task.is_final:
        client.keep_final(task.from_kept)
        counts, facts = {}, {}
    elif task.client_id:
        counts, facts = {}, client.verify(task.from_kept)
        if ADAPTER_RECORD in message.content.array_records:
            client.folder.enter_run(task.run_id)
            state = _received_state(client, task, message)
            facts["global_adapter"] = client.keep_global(state)
    else:
        counts, facts = client.register(resumes=task.resumes)
    return Outcome(counts, facts)


def _train(client: Client, task: Task, message: Message) -> Outcome:
    client.folder.enter_run(task.run_id)
    state = _received_state(client, task, message)
    update, metrics, facts = client.train(task.server_round, state, task.from_kept)
    release = describe_release(
        client.config, client.client_id, task.server_round, update, client.count_examples
    )
    upload_dtype = client.config.federated.upload_dtype
    if keeps_feedback(client.config):
        update, facts[FEEDBACK] = client.folder.feedback.settle(
            update,
            client.learning_shapes(),
            upload_dtype,
            task.server_round,
            task.from_kept.get(FEEDBACK, Kept()),
        )
    shapes = client.update_shapes(task.server_round)
    return Outcome(metrics, facts, update, upload_dtype, shapes, release)


def _personalise(client: Client, task: Task, message: Message) -> Outcome:
    client.folder.enter_run(task.run_id)
    state = _received_state(client, task, message)
    metrics, facts = client.personalise(task.server_round, state, task.from_kept)
    return Outcome(metrics, facts)


def _answer(message: Message, context: Context, handle: Handler) -> Message:
    """Answer a message; a deployment keeps evidence of both, or nothing is done or sent."""
    try:
        witness_received(message, context.node_id)
        reply = _handle(message, context, handle)
        witness_sent(message, reply, context.node_id)
    except (OSError, EvidenceError) as error:
        print(f"Nothing is sent without evidence of it. {error}", flush=True)
        why = "its evidence cannot be written; its own log has the rest"
        return build_error_reply(message, f"node {context.node_id}", why)
    return reply


def _handle(message: Message, context: Context, handle: Handler) -> Message:
    """Run a handler; an error becomes a reply that names it, and the log has the rest."""
    client_id, own = f"node {context.node_id}", None
    try:
        task = read_task(message)
        own = find_own_settings(context.node_config)
        config = task.config
        client_id = identify_client(context, config) if own is None else own.client_id
        _check_package(task)
        if task.client_id not in ("", client_id):
            raise MessageError(f"This message is for {task.client_id} and reached {client_id}.")
        if own is not None:
            config = own.merge(config)
        elif config.entry(client_id).is_bare and is_first_contact(task):
            return build_need_reply(message, client_id, task.server_round, OWN_SETTINGS)
        return _work(message, context, task, client_id, config, own, handle)
    except ConfidentialError as error:
        print(f"{client_id}: {error}", flush=True)
        if isinstance(error, PolicyError):
            record("refused", client=client_id, round=task.server_round, rules=error.refused)
        return build_error_reply(message, client_id, error.told)
    except LostGlobalError as error:
        print(f"{client_id}: asking for the global adapter again. {error}", flush=True)
        return build_need_reply(message, client_id, task.server_round)
    except EXPLAINED_ERRORS as error:
        is_spoilt, why = has_spoilt_process(error), _tell(client_id, str(error), own)
        return build_error_reply(message, client_id, why, process_is_spoilt=is_spoilt)
    except OSError as error:
        what = f"{error.strerror or type(error).__name__}: {error.filename or 'a file'}"
        return build_error_reply(message, client_id, _tell(client_id, what, own))
    except Exception as error:
        if is_out_of_memory(error):
            why = "out of memory outside of training. Lower evaluation.batch_size, or see fedlora "
            return build_error_reply(message, client_id, why + "plan")
        traceback.print_exc()  # here and not in the reply: its text may hold anything
        why = f"{type(error).__name__} in {type(error).__module__}; this client's log has the rest"
        is_spoilt = has_spoilt_process(error)
        if is_spoilt:
            why += ". CUDA is lost to this process, so the next client gets a new one"
        return build_error_reply(message, client_id, why, process_is_spoilt=is_spoilt)


def _work(
    message: Message,
    context: Context,
    task: Task,
    client_id: str,
    config: Config,
    own: OwnSettings | None,
    handle: Handler,
) -> Message:
    """Return the reply to a message that this client's policy permits, as far as it permits it.

    Args:
        config: the experiment as it is carried out here.
    """
    _set_up_process(config)
    root, output_dir = _folders(task, context, own)
    guard = build_guard(own)
    run_dir = root / output_dir / check_run_name(task.run_name)
    hide = str if own is None else own.hide
    client = Client(
        config, client_id, run_dir, root, task.date, hide=hide, watch=guard.require_time
    )
    asked = Asked(
        client_id,
        task.server_round,
        config,
        SiteFolder(root).root_certificate,
        lambda: compute_fingerprint(config.model, root),
        client.count_examples,
    )
    guard.require_permitted(asked)
    guard.require_steps(client.count_steps, asked)
    client.folder.require_own()
    if task.resumes or not is_first_contact(task):  # else the registration looks for any folder
        client.folder.require_run(task.run_id)
    # By Flower's number too: this machine may have two runs of one name in two projects.
    run = f"{task.run_name}, flwr's {message.metadata.run_id}"
    choose_device(run, may_share=config.federated.share_gpu)
    done = handle(client, task, message)
    metrics = guard.withhold(done.metrics)
    guard.require_sendable(metrics, done.facts, done.update, done.update_dtype)
    if done.release is not None:
        spending = client.folder.spending
        spending.require_within(done.release, config.privacy)
        guard.require_spendable(partial(spending.compute, done.release))
        spending.note(done.release)
    return build_reply(
        message,
        client_id,
        task.server_round,
        metrics,
        done.facts,
        update=done.update,
        update_dtype=done.update_dtype,
        shapes=done.shapes,
    )


def identify_client(context: Context, config: Config) -> str:
    """Return the ``client-id`` of the node configuration, else the client at its partition.

    Raises:
        ConfigError: the node has neither, or the experiment does not know the client.
    """
    named = context.node_config.get("client-id")
    if named is not None:
        return config.entry(str(named)).id
    partition = context.node_config.get("partition-id")
    clients = config.federated.clients
    if partition is None:
        raise ConfigError(
            "This node does not say which client it is. Start its SuperNode with --node-config "
            "'client-file=\"/path/to/client.yaml\"' or 'client-id=\"<id>\"'."
        )
    if int(partition) >= len(clients):
        raise ConfigError(
            f"This is node {int(partition) + 1} and the experiment has {len(clients)} clients."
        )
    return clients[int(partition)].id


def is_first_contact(task: Task) -> bool:
    """Return whether the server asks who this node is."""
    return task.server_round == REGISTRATION_ROUND and not task.client_id


def build_guard(own: OwnSettings | None) -> Guard:
    """Return what holds this message against the client's policy; without one all is permitted.

    Raises:
        ConfidentialError: it cannot be read, or a site that has joined a deployment has none.
    """
    path = None if own is None else own.policy_path
    if path is None and own is not None and SiteFolder(own.folder).package_facts.exists():
        raise ConfidentialError(
            f"{SiteFolder(own.folder).policy} is missing, and this site has joined a deployment. "
            "To permit everything, put a file there that holds {}.",
            "its policy is missing; its log says more",
        )
    return Guard(Policy() if path is None else load_policy(path))


def _tell(client_id: str, why: str, own: OwnSettings | None) -> str:
    """Return a reason as the server may know it; what is left out of it is printed here."""
    told = why if own is None else own.hide(why)
    if told != why:
        print(f"{client_id}: {why}", flush=True)
    return told


def _is_simulated() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _folders(task: Task, context: Context, own: OwnSettings | None) -> tuple[Path, str]:
    """Return this client's project and output folder; a remote server cannot choose them."""
    if own is not None:
        return own.folder, str(own.store)
    if _is_simulated():  # on the server's own disk
        return Path(task.project_dir), task.output_dir
    root = find_project_root(project_dir=str(context.node_config.get("project-dir", "")))
    return root, str(context.node_config.get("output-dir", "results"))


def _received_state(client: Client, task: Task, message: Message) -> AdapterState:
    """Return the global adapter that a message is about, unless this client refuses it."""
    is_before_average = message.metadata.message_type == MessageType.TRAIN
    averaged = task.server_round - is_before_average
    return client.accept_global(_read_state(client, task, message), averaged)


def _read_state(client: Client, task: Task, message: Message) -> AdapterState:
    """Return the global adapter that came with the message, or was kept, or both in parts."""
    arrays = message.content.array_records.get(ADAPTER_RECORD)
    if arrays is None and task.global_sha256:
        return client.kept_global(task.global_sha256)
    if arrays is None:
        raise MessageError("The server sent no global adapter and named none.")
    shapes = client.global_shapes()
    if not task.base_sha256:
        return unpack_state(arrays, shapes, "The server")
    changed = of_factors(shapes, travelling_factors(client.config, task.server_round))
    return client.kept_global(task.base_sha256) | unpack_state(arrays, changed, "The server")


def _check_package(task: Task) -> None:
    """Refuse to work with a server that runs other code."""
    if task.package_sha256 != PACKAGE_SHA256:
        raise MessageError(
            f"The server runs other code than this client, whose package is in {PACKAGE_DIR}. "
            "Stop the SuperLink daemon (and SuperNodes) that an older version has started, and "
            "run again."
        )


def _set_up_process(config: Config) -> None:
    """Use the whole machine, deterministically; simulated clients share it, a few at a time."""
    keep_files_private()
    compute_reproducibly(config.federated.at_once if _is_simulated() else 1)
    transformers.utils.logging.disable_progress_bar()
