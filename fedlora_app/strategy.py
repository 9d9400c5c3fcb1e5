"""The server's side of a round: FedAvg over the global adapter, and nothing else.

``FedAvg.start`` drives the rounds. *Train* messages bring updates, which are checked and
folded in as they come; *evaluate* messages make every client personalise against the new
global adapter and report. A round is entered in the manifest when both are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora_app.config.rounds import plan_round, training_clients
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.evaluation.reported import describe_round
from fedlora_app.federation.aggregation_error import AggregationErrorObserver, ProductSketch
from fedlora_app.federation.grid import PacedGrid, build_message
from fedlora_app.federation.messages import (
    REGISTRATION_ROUND,
    MessageError,
    Reply,
    Task,
    Traffic,
    build_task_content,
    pack_state,
    read_reply,
    unpack_state,
)
from fedlora_app.federation.registration import collect_faults
from fedlora_app.federation.replies import require_examples, require_facts, require_update
from fedlora_app.federation.rules import build_rule
from fedlora_app.federation.rules.fedavg import FedAvg as FedAvgRule
from fedlora_app.federation.weighted_mean import RejectedUpdateError
from fedlora_app.foundation.progress import client_lines
from fedlora_app.model.adapter_files import save_adapter
from fedlora_app.model.adapters import AdaptedModel, AdapterError, AdapterState, state_shapes
from fedlora_app.model.fingerprint import COVERS, explain_fingerprint
from fedlora_app.runs.directory import SERVER, RunDirectory, describe_missing_finals
from fedlora_app.runs.resuming import (
    DATA_HASH,
    describe_changed_data,
    find_changed_data,
    suggest_earlier,
)

NO_LOCAL = (-1, "")  # the round of a client's local adapter, and its sha256
EVALUATION_PREFIXES = (
    *("base/", "global/", "local/", "global+local/"),
    *("evaluation_seconds", "peak_memory_bytes"),
)


class RoundError(RuntimeError):
    """Too few clients returned valid results; the last complete round is untouched."""


class GlobalAdapterFedAvg(FedAvg):
    """Averages the global adapter, weighted by the examples of the global phase.

    Args:
        nodes: node id of every client.
        task: what every message carries; client and rounds are filled in.
        model: the base on the meta device with its adapters, for shapes and file headers.
        run: where adapters and metrics are kept.
        report: called with one line per round, and now and then between.
    """

    def __init__(
        self,
        config: Config,
        nodes: dict[str, int],
        task: Task,
        model: AdaptedModel,
        run: RunDirectory,
        report: Callable[[str], None] = print,
    ) -> None:
        num_clients = len(config.federated.clients)
        super().__init__(
            min_train_nodes=num_clients,
            min_evaluate_nodes=num_clients,
            min_available_nodes=num_clients,
        )
        self.config = config
        self.nodes = nodes
        self.serving_order = config.client_ids
        self._clients_by_node = {node: client for client, node in nodes.items()}
        self._task = task
        self._model = model
        self._shapes = state_shapes(model, GLOBAL)
        self._rule = build_rule(config.federated.aggregation)
        self._sketch = ProductSketch(self._shapes, config.experiment.seed)
        self._run = run
        self._report = report
        self._global_state: AdapterState = {}
        self._global_sha256 = ""
        self._held: dict[str, str] = {}  # sha256 of the global adapter that a client has kept
        self._rounds_before = 0  # that an earlier process has completed
        self._locals: dict[str, tuple[int, str]] = dict.fromkeys(nodes, NO_LOCAL)
        self._adapter_hashes: dict[str, str] = {}
        self._base_models: dict[str, str] = {}
        self._round_seconds: list[float] = []
        self._begin_round()

    def summary(self) -> None:
        """Say nothing: the run's start block has said it."""

    def save_initial(self, state: AdapterState) -> ArrayRecord:
        """Keep the initial global adapter as that of round 0 and return it as arrays."""
        self._global_state = state
        self._global_sha256 = self._save_global(0)
        self._adapter_hashes = {GLOBAL: self._global_sha256}
        return pack_state(state)

    def restore(
        self,
        state: AdapterState,
        sha256: str,
        after_round: int,
        local_adapters: dict[str, tuple[int, str]],
    ) -> ArrayRecord:
        """Go on after a complete round, with its adapters; returns the global one as arrays.

        Flower counts the rounds that follow from 1 again; here they keep their own numbers.
        """
        self._global_state, self._global_sha256 = state, sha256
        self._rounds_before = after_round
        self._locals |= local_adapters
        return pack_state(state)

    def verify_clients(self, grid: Grid, arrays: ArrayRecord | None, holders: set[str]) -> None:
        """Have every client check what it has kept, before anything is trained.

        Args:
            holders: who had kept the global adapter, and gets it again, whatever has become of it.

        Raises:
            RoundError: with what every client found wrong, together.
        """
        task = replace(self._task, server_round=REGISTRATION_ROUND)
        messages = (
            message
            for client in self.serving_order
            for message in self._messages(
                task, arrays if client in holders else None, MessageType.QUERY, [client]
            )
        )

        def read(message: Message) -> None:
            client = self._clients_by_node.get(message.metadata.src_node_id, "an unknown node")
            reply = read_reply(message, client, REGISTRATION_ROUND)
            require_facts(["base_model"], reply)
            try:
                self._require_same_base({client: reply.facts["base_model"]})
            except RoundError as error:
                raise MessageError(str(error)) from None
            self._held[client] = reply.facts.get("global_adapter", "")

        faults = collect_faults(grid, messages, read)
        if faults:
            listing = "\n".join(faults)
            hint = suggest_earlier(self._run.path, self._rounds_before)
            raise RoundError(f"The run cannot resume:\n{listing}{hint}")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per training client, made when its turn comes."""
        server_round += self._rounds_before
        absent = set(self._failures)
        self._begin_round()
        if absent:
            self._find_returned(grid, absent)
        self._global_state = unpack_state(arrays, self._shapes, "The server")
        self._adapter_hashes = {}
        if plan_round(self.config, server_round).train is None:
            return iter(())
        clients = training_clients(self.config)
        order = [client for client in self.serving_order if client in clients]
        task = replace(self._task, server_round=server_round)
        self._ask_again = partial(self._send_to_who_lost_it, grid, task, MessageType.TRAIN)
        return self._messages(task, arrays, MessageType.TRAIN, order)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the updates in as they come and return the new global adapter.

        Raises:
            RoundError: fewer than ``federated.min_clients`` sent a valid update.
        """
        server_round += self._rounds_before
        plan = plan_round(self.config, server_round)
        phase = plan.train
        if phase is not None:
            self._rule.begin(self._global_state)
            observer = AggregationErrorObserver(self._sketch)
            count = self._count_clients(server_round, "train", len(training_clients(self.config)))
            expected = ["local_adapter"] if LOCAL in phase.trainable else []
            fold = self._fold_into(observer, expected)
            for reply in self._valid_replies(server_round, replies, count, fold):
                self._run.add_metrics(server_round, reply.client_id, phase.name, reply.metrics)
                if expected:
                    self._note_local(reply, server_round, is_last=plan.personalise is None)
            self._require(self._rule.num_updates, len(training_clients(self.config)), server_round)
            started = time.monotonic()
            self._global_state = self._rule.result()
            self._log_aggregation_error(server_round, observer)
            self._aggregation_seconds += time.monotonic() - started
            self._aggregation_metrics["aggregation_seconds"] = self._aggregation_seconds
        self._global_sha256 = self._save_global(server_round)
        self._adapter_hashes[GLOBAL] = self._global_sha256
        return pack_state(self._global_state), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per client, with the new global adapter."""
        task = replace(self._task, server_round=server_round + self._rounds_before)
        self._ask_again = partial(self._send_to_who_lost_it, grid, task, MessageType.EVALUATE)
        return self._messages(task, arrays, MessageType.EVALUATE, self.serving_order)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Collect what the clients report and complete the round.

        Raises:
            RoundError: fewer than ``federated.min_clients`` answered, or they do not share
                one base model.
        """
        server_round += self._rounds_before
        plan = plan_round(self.config, server_round)
        expected = ["base_model"]
        expected += ["local_adapter"] if LOCAL in plan.evaluated else []
        expected += ["global_adapter"] if server_round < self.config.federated.num_rounds else []
        reports: dict[str, dict[str, Any]] = {}
        count = self._count_clients(server_round, "evaluate", len(self.nodes))
        fold = partial(require_facts, expected)
        for reply in self._valid_replies(server_round, replies, count, fold):
            client = reply.client_id
            reports[client] = reply.metrics
            evaluation, training = _split_evaluation(reply.metrics)
            if training and plan.personalise is not None:
                self._run.add_metrics(server_round, client, plan.personalise.name, training)
            self._run.add_metrics(server_round, client, "evaluate", evaluation)
            if "local_adapter" in expected:
                self._note_local(reply, server_round, is_last=True)
            self._held[client] = reply.facts.get("global_adapter", "")
            self._base_models[client] = reply.facts["base_model"]
            facts = {k: v for k, v in reply.facts.items() if not k.startswith(DATA_HASH)}
            self._run.log_event("facts", round=server_round, client=client, **facts)
        self._require(len(reports), len(self.nodes), server_round)
        self._require_same_base(self._base_models)
        self._complete_round(server_round, reports)
        return None

    def evaluate_base(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Evaluate the base model at every client and complete round 0."""
        self._begin_round()
        messages = self.configure_evaluate(0, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(0, grid.send_and_receive(messages))

    def _note_local(self, reply: Reply, server_round: int, is_last: bool) -> None:
        """Remember the local adapter that a client says it has written.

        Args:
            is_last: the round writes no other in its place, which may be there and its hash lost.
        """
        sha256 = reply.facts["local_adapter"]
        self._locals[reply.client_id] = (server_round, sha256)
        if is_last:
            self._adapter_hashes[f"{LOCAL}:{reply.client_id}"] = sha256

    def _require_same_data(self, reply: Reply) -> None:
        recorded = self._run.manifest["clients"].get(reply.client_id, {})
        if changed := find_changed_data(recorded, reply.facts):
            raise MessageError(describe_changed_data(self.config, reply.client_id, changed))

    def _require_same_base(self, base_models: dict[str, str]) -> None:
        """Enter the clients' base model in the manifest, or raise where it is not one."""
        recorded = self._run.manifest["base_model"]
        found = dict(base_models)
        if "fingerprint" in recorded:
            found["the run"] = recorded["fingerprint"]
        if len(set(found.values())) > 1:
            listing = ", ".join(f"{c}: {f[:12]}" for c, f in sorted(found.items()))
            raise RoundError(
                f"The clients do not hold the same base model ({listing}). Compare model.name, "
                "model.revision and the model's files: weights, config.json, tokenizer, chat "
                f"template.{explain_fingerprint(recorded)}"
            )
        for fingerprint in found.values():
            recorded |= {"fingerprint": fingerprint, "fingerprint_covers": COVERS}

    def save_final(self) -> None:
        """Keep the last global adapter where users look for it, and say who has no local one."""
        self._save_global(None)
        for sentence in describe_missing_finals(self._run.manifest):
            self._report(sentence)

    def _begin_round(self) -> None:
        self._round_started = time.monotonic()
        self._traffic = Traffic()
        self._failures: dict[str, str] = {}
        self._aggregation_seconds = 0.0
        self._aggregation_metrics: dict[str, float] = {}
        self._ask_again: Callable[[list[str]], Iterable[Message]] = lambda clients: ()

    def _complete_round(self, server_round: int, reports: dict[str, dict[str, Any]]) -> None:
        """Add what the server itself has measured, enter the round and report it."""
        for client, counts in sorted(self._traffic.by_client.items()):
            self._run.add_metrics(server_round, client, "traffic", counts)
        seconds = time.monotonic() - self._round_started
        metrics = self._aggregation_metrics | {"round_seconds": seconds}
        self._run.add_metrics(server_round, SERVER, "aggregate", metrics)
        facts: dict[str, Any] = {"seconds": round(seconds, 3)}
        if self._failures:
            facts["failures"] = dict(self._failures)
        self._run.complete_round(server_round, dict(self._adapter_hashes), **facts)
        if self.config.federated.keep_rounds is not None:
            self._run.thin(self.config.federated.keep_rounds)
        num_rounds, left = self.config.federated.num_rounds, None
        if server_round > 0:  # round 0 trains nothing
            self._round_seconds.append(seconds)
            mean = sum(self._round_seconds) / len(self._round_seconds)
            left = mean * (num_rounds - server_round)
        self._report(describe_round(server_round, num_rounds, reports, seconds, left))

    def _log_aggregation_error(self, server_round: int, observer: AggregationErrorObserver) -> None:
        if not isinstance(self._rule, FedAvgRule):
            return  # the figure is about averaging A and B
        by_module, error = observer.relative_errors(self._rule, self._global_state)
        self._run.log_event("aggregation", round=server_round, relative_error=by_module)
        if error is not None:
            self._aggregation_metrics["aggregation_error"] = error

    def _count_clients(self, server_round: int, what: str, total: int) -> Callable[[int], None]:
        label = f"round {server_round}/{self.config.federated.num_rounds}, {what}"
        return client_lines(label, total, self._report)

    def _save_global(self, server_round: int | None) -> str:
        run = self._run
        folder = run.final_global if server_round is None else run.server_round(server_round)
        name = self.config.model.name
        return save_adapter(folder, self._model, GLOBAL, self._global_state, name)

    def _messages(
        self, task: Task, arrays: ArrayRecord | None, message_type: str, order: list[str]
    ) -> Iterator[Message]:
        """Yield each client's message; who holds the global adapter already gets its hash only."""
        task = replace(task, global_sha256=self._global_sha256)
        keep_rounds = self.config.federated.keep_rounds
        for client in order:
            local_round, sha256 = self._locals[client]
            own = replace(task, client_id=client, local_round=local_round, local_sha256=sha256)
            if keep_rounds is not None:
                oldest = self._run.oldest_local_round(client, keep_rounds)
                own = replace(own, oldest_local_round=oldest)
            is_held = self._global_sha256 and self._held.pop(client, "") == self._global_sha256
            content = build_task_content(own, None if is_held else arrays)
            message = build_message(content, message_type, self.nodes[client])
            self._traffic.add(client, "down", message)
            yield message

    def _find_returned(self, grid: Grid, absent: set[str]) -> None:
        """Have nodes that are new register: a SuperNode that restarts is another one to Flower."""
        new = sorted(set(grid.get_node_ids()) - set(self.nodes.values()))
        content = build_task_content(replace(self._task, resumes=True))
        messages = (build_message(content, MessageType.QUERY, node) for node in new)

        def read(message: Message) -> None:
            node = message.metadata.src_node_id
            reply = read_reply(message, None, REGISTRATION_ROUND)
            client = reply.client_id
            if client not in absent:
                raise MessageError(f"Node {node} is {client}, which is not missing.")
            self._require_same_data(reply)
            del self._clients_by_node[self.nodes[client]]
            self.nodes[client] = node
            self._clients_by_node[node] = client
            if isinstance(grid, PacedGrid):
                grid.names[node] = client
            self._run.log_event("returned", client=client, node=node)
            self._report(f"{client} is back, as another node.")

        for fault in collect_faults(grid, messages, read):
            self._report(f"A new node cannot take part: {fault}")

    def _send_to_who_lost_it(
        self, grid: Grid, task: Task, message_type: str, clients: list[str]
    ) -> Iterator[Message]:
        """Send the same messages once more, with the global adapter; yield the replies."""
        if clients:
            arrays = pack_state(self._global_state)
            again = self._messages(task, arrays, message_type, list(clients))
            yield from grid.send_and_receive(again)

    def _valid_replies(
        self,
        server_round: int,
        replies: Iterable[Message],
        count: Callable[[int], None],
        fold: Callable[[Reply], None] | None = None,
    ) -> Iterator[Reply]:
        """Yield what can be counted; keep the reason for what cannot.

        Who has lost the global adapter is asked again, once, after all others have answered.

        Args:
            count: called with the number of clients that have answered, whatever it is worth.
        """
        answered: set[str] = set()
        missing_global: list[str] = []
        for message in chain(replies, self._ask_again(missing_global)):
            client = self._clients_by_node.get(message.metadata.src_node_id, "an unknown node")
            if client in self.nodes:
                self._traffic.add(client, "up", message)
            if client not in self.nodes or client in answered:
                self._run.log_event("unasked_reply", round=server_round, client=client)
                del message
                continue
            answered.add(client)
            count(len(answered))
            try:
                reply = read_reply(message, client, server_round)
                if reply.needs_global and client not in missing_global:
                    missing_global.append(client)
                    answered.remove(client)
                    self._run.log_event("lost_adapter", round=server_round, client=client)
                    continue
                if reply.needs_global:
                    raise MessageError(f"{client} lost the global adapter that it was just sent.")
                self._require_same_data(reply)
                if fold is not None:
                    fold(reply)
                reply = replace(reply, arrays=None)
            except (MessageError, AdapterError) as error:
                reply = None
                self._failures[client] = str(error)
                self._run.add_failure(server_round, client, str(error))
                self._report(f"round {server_round}: {error}")
                continue
            finally:
                del message  # and with it the update, before the next one comes
            yield reply

    def _fold_into(
        self, observer: AggregationErrorObserver, expected: list[str]
    ) -> Callable[[Reply], None]:
        def fold(reply: Reply) -> None:
            started, sender = time.monotonic(), reply.client_id
            require_facts(expected, reply)
            num_examples = require_examples(reply, self._most_examples(sender))
            update = require_update(reply, self._shapes, self.config.federated.upload_dtype)
            try:
                self._rule.add(update, num_examples)
            except RejectedUpdateError as error:
                raise MessageError(f"{sender}: {error}") from None
            observer.add(update, num_examples)
            self._aggregation_seconds += time.monotonic() - started

        return fold

    def _most_examples(self, client: str) -> int:
        """Return how many examples a client can have trained on, by what the clients reported."""
        reports = self._run.manifest["clients"]
        counted = reports if self.config.federated.mode == "centralized" else [client]
        kinds = ("universal_examples", "local_examples")
        return sum(reports[name][kind] for name in counted for kind in kinds)

    def _require(self, num_valid: int, num_asked: int, server_round: int) -> None:
        required = min(self.config.federated.required_clients, num_asked)
        if num_valid < required:
            reasons = "\n".join(f"  {reason}" for reason in self._failures.values())
            raise RoundError(
                f"Round {server_round}: {num_valid} of {num_asked} clients returned valid results "
                f"and {required} are required (federated.min_clients).\n{reasons}\n"
                f"The last complete round in {self._run.path} is untouched."
            )


def _split_evaluation(metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    evaluation = {k: v for k, v in metrics.items() if k.startswith(EVALUATION_PREFIXES)}
    return evaluation, {k: v for k, v in metrics.items() if k not in evaluation}
