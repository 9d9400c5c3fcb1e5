"""The server's side of a round: FedAvg over the global adapter, and nothing else.

``FedAvg.start`` drives the rounds. *Train* messages bring updates, which are checked and
folded in as they come; *evaluate* messages make every client personalise against the new
global adapter and report. A round is entered in the manifest when both are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora_app.adapters import (
    AdaptedModel,
    AdapterError,
    AdapterState,
    save_adapter,
    state_shapes,
)
from fedlora_app.aggregation import AggregationError, WeightedMean
from fedlora_app.config import GLOBAL, LOCAL, Config
from fedlora_app.grid import build_message
from fedlora_app.messages import (
    MessageError,
    Reply,
    Task,
    build_task_content,
    pack_state,
    read_reply,
    unpack_state,
)
from fedlora_app.rounds import plan_round, training_clients
from fedlora_app.run_directory import RunDirectory
from fedlora_app.summary import describe_round

EVALUATION_PREFIXES = ("base/", "global/", "local/", "global+local/", "evaluation_seconds")


class RoundError(RuntimeError):
    """Too few clients did their part; the last complete round is untouched."""


class GlobalAdapterFedAvg(FedAvg):
    """Averages the global adapter, weighted by the examples of the global phase.

    Args:
        nodes: node id of every client.
        task: what every message carries; client and rounds are filled in.
        model: the base on the meta device with its adapters, for shapes and file headers.
        run: where adapters and metrics are kept.
        report: called with one line per round.
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
        self._run = run
        self._report = report
        self._global_state: AdapterState = {}
        self._local_rounds = dict.fromkeys(nodes, -1)
        self._adapter_hashes: dict[str, str] = {}
        self._base_models: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._round_started = time.monotonic()

    def summary(self) -> None:
        """Say nothing: the run's start block has said it."""

    def save_initial(self, state: AdapterState) -> ArrayRecord:
        """Keep the initial global adapter as that of round 0 and return it as arrays."""
        self._global_state = state
        self._adapter_hashes = {GLOBAL: self._save_global(0)}
        return pack_state(state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per training client, made when its turn comes."""
        self._round_started = time.monotonic()
        self._global_state = unpack_state(arrays, self._shapes, "The server")
        self._adapter_hashes, self._failures = {}, {}
        if plan_round(self.config, server_round).train is None:
            return iter(())
        clients = training_clients(self.config)
        order = [client for client in self.serving_order if client in clients]
        return self._messages(server_round, arrays, MessageType.TRAIN, order)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the updates in as they come and return the new global adapter.

        Raises:
            RoundError: fewer than ``federated.min_clients`` sent a valid update.
        """
        phase = plan_round(self.config, server_round).train
        if phase is not None:
            mean = WeightedMean(self._shapes)
            for reply in self._valid_replies(server_round, replies, fold=self._fold_into(mean)):
                self._run.add_metrics(server_round, reply.client_id, phase.name, reply.metrics)
                if LOCAL in phase.trainable:
                    self._local_rounds[reply.client_id] = server_round
            self._require(mean.num_updates, len(training_clients(self.config)), server_round)
            self._global_state = mean.apply_to(self._global_state)
        self._adapter_hashes[GLOBAL] = self._save_global(server_round)
        return pack_state(self._global_state), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per client, with the new global adapter."""
        return self._messages(server_round, arrays, MessageType.EVALUATE, self.serving_order)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Collect what the clients report and complete the round.

        Raises:
            RoundError: fewer than ``federated.min_clients`` answered, or they do not share
                one base model.
        """
        personalise = plan_round(self.config, server_round).personalise
        reports: dict[str, dict[str, Any]] = {}
        for reply in self._valid_replies(server_round, replies):
            client = reply.client_id
            reports[client] = reply.metrics
            evaluation, training = _split_evaluation(reply.metrics)
            if training and personalise is not None:
                self._run.add_metrics(server_round, client, personalise.name, training)
            self._run.add_metrics(server_round, client, "evaluate", evaluation)
            if "local_adapter" in reply.facts:
                self._local_rounds[client] = server_round
                self._adapter_hashes[f"{LOCAL}:{client}"] = reply.facts["local_adapter"]
            self._base_models[client] = reply.facts["base_model"]
            self._run.log_event("facts", round=server_round, client=client, **reply.facts)
        self._require(len(reports), len(self.nodes), server_round)
        if len(set(self._base_models.values())) > 1:
            listing = ", ".join(f"{c}: {f[:12]}" for c, f in sorted(self._base_models.items()))
            raise RoundError(
                f"The clients do not hold the same base model ({listing}). Compare model.name, "
                "model.revision and the weight files."
            )
        if self._base_models:
            self._run.manifest["base_model"]["fingerprint"] = next(iter(self._base_models.values()))
        seconds = time.monotonic() - self._round_started
        facts = {"seconds": round(seconds, 3)}
        if self._failures:
            facts["failures"] = dict(self._failures)
        self._run.complete_round(server_round, dict(self._adapter_hashes), **facts)
        self._report(
            describe_round(server_round, self.config.federated.num_rounds, reports, seconds)
        )
        return None

    def evaluate_base(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Evaluate the base model at every client and complete round 0."""
        self._round_started = time.monotonic()
        messages = self.configure_evaluate(0, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(0, grid.send_and_receive(messages))

    def save_final(self) -> None:
        """Keep the last global adapter where users look for it."""
        self._save_global(None)

    def _save_global(self, server_round: int | None) -> str:
        run = self._run
        folder = run.final_global if server_round is None else run.server_round(server_round)
        name = self.config.model.name
        return save_adapter(folder, self._model, GLOBAL, self._global_state, name)

    def _messages(
        self, server_round: int, arrays: ArrayRecord, message_type: str, order: list[str]
    ) -> Iterator[Message]:
        for client in order:
            task = replace(
                self._task,
                client_id=client,
                server_round=server_round,
                local_round=self._local_rounds[client],
            )
            yield build_message(build_task_content(task, arrays), message_type, self.nodes[client])

    def _valid_replies(
        self,
        server_round: int,
        replies: Iterable[Message],
        fold: Callable[[Reply], None] | None = None,
    ) -> Iterator[Reply]:
        """Yield what can be counted; keep the reason for what cannot."""
        answered: set[str] = set()
        for message in replies:
            client = self._clients_by_node.get(message.metadata.src_node_id, "an unknown node")
            try:
                if client not in self.nodes or client in answered:
                    raise MessageError(f"{client}: a reply that nobody asked for")
                reply = read_reply(message, client, server_round)
                if fold is not None:
                    fold(reply)
            except (MessageError, AdapterError) as error:
                self._failures[client] = str(error)
                self._run.log_event("failure", round=server_round, client=client, why=str(error))
                self._report(f"round {server_round}: {error}")
                continue
            answered.add(client)
            yield reply

    def _fold_into(self, mean: WeightedMean) -> Callable[[Reply], None]:
        def fold(reply: Reply) -> None:
            sender = reply.client_id
            num_examples = reply.metrics.get("num-examples")
            if not isinstance(num_examples, int) or num_examples < 1:
                raise MessageError(
                    f"{sender} reports {num_examples!r} examples; at least 1 is needed."
                )
            if reply.arrays is None:
                raise MessageError(f"{sender} sent no update.")
            dtype = self.config.federated.upload_dtype
            update = unpack_state(reply.arrays, self._shapes, sender, dtype)
            try:
                mean.add(update, num_examples)
            except AggregationError as error:
                raise MessageError(f"{sender}: {error}") from None

        return fold

    def _require(self, num_valid: int, num_asked: int, server_round: int) -> None:
        required = min(self.config.federated.required_clients, num_asked)
        if num_valid < required:
            reasons = "\n".join(f"  {reason}" for reason in self._failures.values())
            raise RoundError(
                f"Round {server_round}: {num_valid} of {num_asked} clients did their part and "
                f"{required} are required (federated.min_clients).\n{reasons}\n"
                f"The last complete round in {self._run.path} is untouched."
            )


def _split_evaluation(metrics: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    evaluation = {k: v for k, v in metrics.items() if k.startswith(EVALUATION_PREFIXES)}
    return evaluation, {k: v for k, v in metrics.items() if k not in evaluation}
