"""The server's side of a round: aggregation of the global adapter, and nothing else.

``FedAvg.start`` drives the rounds and calls, in each of them:

1. ``configure_train``: the global adapter goes to every client that trains before the average;
2. ``aggregate_train``: the updates are folded into the new global adapter as they come;
3. ``configure_evaluate``: the new global adapter goes to every client, which personalises its
   local adapter against it and evaluates both;
4. ``aggregate_evaluate``: the metrics come back, and the round is entered in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora_app.config.participation import members, training_clients, weigh
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, OWN_GLOBAL, Config
from fedlora_app.deployment.record import record
from fedlora_app.deployment.witness import JOINED, witness_replies
from fedlora_app.evaluation.final_round import choose_round
from fedlora_app.evaluation.reported import describe_round, split_evaluation
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.broadcast import Broadcast
from fedlora_app.federation.messages import KEPT, REGISTRATION_ROUND, MessageError, Task
from fedlora_app.federation.registration import (
    find_returned,
    read_report,
    settle_clients,
    verify_clients,
)
from fedlora_app.federation.replies import (
    Reply,
    RoundError,
    choose_valid,
    require_counts,
    require_examples,
    require_facts,
    require_same_base,
    require_the_runs_base,
)
from fedlora_app.federation.roster import Roster, Traffic
from fedlora_app.foundation.progress import client_lines
from fedlora_app.model.adapter_files import load_adapter, save_adapter, save_tensors
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, state_shapes
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.history import read_history
from fedlora_app.runs.manifest import MEMORY, describe_missing_finals, find_kept
from fedlora_app.runs.paths import MEMORY_FILE
from fedlora_app.runs.resuming import (
    DATA_HASH,
    Resumption,
    describe_changed_data,
    find_changed_data,
    suggest_earlier,
)
from fedlora_app.runs.round_record import RoundRecord
from fedlora_app.runs.secret_key import open_server_key
from fedlora_app.runs.spending import Spending
from fedlora_app.runs.uploads import KeptUploads

NOT_COME = "it was not there when the run began, and has not come yet"


class GlobalAdapterFedAvg(FedAvg):
    """Makes the new global adapter of the clients' updates, by the rule that is configured.

    The adapter that goes out is the broadcast's; Flower hands back the same arrays in every step.

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
        super().__init__()
        self.config = config
        self.serving_order = config.client_ids
        self.roster = Roster(nodes)
        if config.federated.keep_rounds is not None:
            keeps = partial(run.oldest_kept_round, keep_rounds=config.federated.keep_rounds)
            self.roster.oldest_kept_round = keeps
        self._task = task
        self._model = model
        shapes = state_shapes(model, GLOBAL)
        self._aggregation = Aggregation(config, shapes, open_server_key(config, run.paths))
        self._broadcast = Broadcast(config, self.roster, task, shapes, self._aggregation)
        self._run = run
        self._uploads = KeptUploads(run.paths)
        self._spending = Spending(config, run.paths)
        self._report = report
        self._base_models: dict[str, str] = {}
        self._rounds_before = 0  # that an earlier process has completed
        self._round_seconds: list[float] = []
        self._begin_round(0)

    def summary(self) -> None:
        """Print nothing: the run's start block has it all."""

    def save_initial(self, state: AdapterState) -> ArrayRecord:
        """Keep the initial global adapter as that of round 0 and return it as arrays."""
        self._begin_round(0)
        return self._enter_global(state)

    def restore(
        self, state: AdapterState, memory: AdapterState, resumption: Resumption
    ) -> ArrayRecord:
        """Resume after a complete round, with its global adapter; return it as arrays.

        Flower counts the rounds that follow from 1 again; here they keep their own numbers.

        Args:
            memory: what the aggregation needs beside the adapter.
        """
        self._rounds_before = resumption.after_round
        self._aggregation.recall(memory)
        self.roster.kept = {role: resumption.find_kept(role) for role in KEPT}
        return self._broadcast.renew(state, resumption.global_sha256)

    def verify_clients(self, grid: Grid, holders: set[str]) -> None:
        """Have every client check what it has kept, before anything is trained.

        Args:
            holders: clients that had kept the global adapter; they are sent it again in any case.

        Raises:
            RoundError: with what every client found wrong, together.
        """
        there = [client for client in self.serving_order if client in self.roster.nodes]
        messages = self._broadcast.checking_messages(there, holders)
        faults = verify_clients(grid, messages, self.roster, self._run.manifest["base_model"])
        if faults:
            listing = "\n".join(faults)
            hint = suggest_earlier(self._run.path, self._rounds_before)
            raise RoundError(f"The run cannot resume:\n{listing}{hint}")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per training client, made when its turn comes."""
        server_round += self._rounds_before
        absent = set(self._round.failures) | set(self.serving_order) - set(self.roster.nodes)
        self._begin_round(server_round)
        if absent:
            self._find_returned(grid, absent)
        if plan_round(self.config, server_round).train is None:
            return iter(())
        asked = self._in_order(training_clients(self.config, server_round))
        return self._ask(grid, MessageType.TRAIN, server_round, asked)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the updates in as they come and return the new global adapter.

        Raises:
            RoundError: fewer than ``federated.min_clients`` sent a valid update.
        """
        server_round += self._rounds_before
        state = self._broadcast.state
        if plan_round(self.config, server_round).train is not None:
            state = self._fold_updates(server_round, replies)
        arrays = self._enter_global(state)
        self._uploads.enter(self._round)
        if memory := self._aggregation.memory:
            folder = self._run.paths.global_adapter(server_round)
            self._round.adapters[MEMORY] = save_tensors(folder / MEMORY_FILE, memory)
        return arrays, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message per client, with the new global adapter."""
        server_round += self._rounds_before
        return self._ask(grid, MessageType.EVALUATE, server_round, self._members(server_round))

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
        expected = self._broadcast.facts_after_round(server_round)
        check = partial(require_facts, expected)
        num_asked = len(self._members(server_round))
        reports: dict[str, dict[str, Any]] = {}
        for reply in self._valid_replies(server_round, "evaluate", num_asked, replies, check):
            client = reply.client_id
            reports[client] = reply.metrics
            evaluation, training = split_evaluation(reply.metrics)
            if training and plan.personalise is not None:
                self._round.add_metrics(client, plan.personalise.name, training)
            self._round.add_metrics(client, "evaluate", evaluation)
            self._round.adapters |= self._broadcast.note_kept(reply, server_round, has_ended=True)
            self._base_models[client] = reply.facts["base_model"]
            facts = {k: v for k, v in reply.facts.items() if not k.startswith(DATA_HASH)}
            self._round.log("facts", client=client, **facts)
        require_same_base(self._run.manifest["base_model"], self._base_models)
        self._complete_round(server_round, reports)
        return None

    def evaluate_base(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Evaluate the base model at every client and complete round 0."""
        messages = self.configure_evaluate(0, arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(0, grid.send_and_receive(messages))

    def save_final(self, grid: Grid) -> None:
        """Keep the global adapter where users look for it, and say who has no local one.

        It is the last one, unless validation is to choose among all of them.
        """
        if self.config.federated.final == "best":
            self._return_to_best(grid)
        self._save_global(self._run.paths.final_global, self._broadcast.state)
        for sentence in describe_missing_finals(self._run.manifest, self.config.dump()):
            self._report(sentence)

    def _return_to_best(self, grid: Grid) -> None:
        """Return to the adapters of the round that validation chooses, as the clients do."""
        manifest, last = self._run.manifest, self.config.federated.num_rounds
        chosen = choose_round(read_history(self._run.path), last)
        missing: list[str] = []
        if (best := chosen.server_round) != last:
            entry = next(e for e in manifest["rounds"] if e["round"] == best)
            state = load_adapter(
                self._run.paths.global_adapter(best),
                self._model,
                GLOBAL,
                self.config.model.name,
                within=self._run.path,
                sha256=entry["adapters"][GLOBAL],
            )
            self._broadcast.renew(state, entry["adapters"][GLOBAL])
            adapters = {role: find_kept(manifest, role, best) for role in (LOCAL, OWN_GLOBAL)}
            self.roster.kept |= adapters
            asked = sorted(set().union(*adapters.values()))
            task = self._broadcast.task_of(REGISTRATION_ROUND)
            settled, faults = settle_clients(grid, self.roster, task, asked)
            missing = sorted(set(asked) - settled)
            for fault in faults:
                self._report(fault)
        manifest["final"] = chosen.dump(last) | ({"missing": missing} if missing else {})

    def _begin_round(self, server_round: int) -> None:
        self._round = RoundRecord(self._run, server_round, self._report)
        self._ask_again: Callable[[list[str]], Iterable[Message]] = lambda clients: ()
        self.roster.traffic = Traffic()

    def _ask(
        self, grid: Grid, message_type: str, server_round: int, clients: list[str]
    ) -> Iterator[Message]:
        """Return the clients' messages, and keep how to send one again with the global adapter."""
        build = partial(self._broadcast.messages, message_type, server_round)
        self._ask_again = lambda clients: grid.send_and_receive(build(clients, whole=True))
        for client in clients:
            if client not in self.roster.nodes and client not in self._round.failures:
                self._round.tell("failure", client, f"{client}: {NOT_COME}")
        return build([client for client in clients if client in self.roster.nodes])

    def _fold_updates(self, server_round: int, replies: Iterable[Message]) -> AdapterState:
        """Return the global adapter that the clients' updates make of the one before."""
        phase = plan_round(self.config, server_round).train
        clients = training_clients(self.config, server_round)
        expected = self._broadcast.facts_after_training(server_round)
        # A client cannot have trained on more than it had when it registered, or all had.
        reports = self._run.manifest["clients"]
        pools = self.config.federated.mode == "centralized"
        keeps = self.config.federated.keeps_updates

        def fold(reply: Reply) -> None:
            require_facts(expected, reply)
            owners = reports if pools else [reply.client_id]
            num_examples = require_examples(reply, [reports[owner] for owner in owners])
            weight = weigh(self.config, reply.client_id, num_examples)
            update = self._aggregation.add(reply, weight)
            if keeps:
                self._uploads.add(reply.client_id, update, weight)

        self._uploads.clear()
        self._aggregation.begin(self._broadcast.state, server_round)
        for reply in self._valid_replies(server_round, "train", len(clients), replies, fold):
            self._round.add_metrics(reply.client_id, phase.name, reply.metrics)
            self._round.adapters |= self._broadcast.note_kept(reply, server_round, has_ended=False)
        state = self._aggregation.result()
        if (release := self._aggregation.release) is not None:
            self._spending.note(release)
        if (errors := self._aggregation.errors) is not None:
            self._round.log("aggregation", relative_error=errors.by_module)
        return state

    def _valid_replies(
        self,
        server_round: int,
        step: str,
        num_asked: int,
        replies: Iterable[Message],
        use: Callable[[Reply], None],
    ) -> Iterator[Reply]:
        """Yield the replies that count; keep why the others do not; raise if too few do."""

        base_model = self._run.manifest["base_model"]

        def check(reply: Reply) -> None:
            self._require_same_data(reply)
            require_facts(["base_model"], reply)
            if "fingerprint" in base_model:  # a client that joined later may have another
                require_the_runs_base(base_model, reply)
            use(reply)

        label = f"round {server_round}/{self.config.federated.num_rounds}, {step}"
        count = client_lines(label, num_asked, self._report)
        args = replies, server_round, self.roster, check
        tell = witness_replies(self._round.tell, self._task.run_name, server_round)
        ask_again = self._ask_again
        num_valid = 0
        for reply in choose_valid(*args, ask_again=ask_again, count=count, tell=tell):
            num_valid += 1
            yield reply
        required = min(self.config.federated.required_clients, num_asked)
        self._round.require_valid(num_valid, required, num_asked)

    def _members(self, server_round: int) -> list[str]:
        return self._in_order(members(self.config, server_round))

    def _in_order(self, clients: list[str]) -> list[str]:
        return [client for client in self.serving_order if client in clients]

    def _require_same_data(self, reply: Reply) -> None:
        recorded = self._run.manifest["clients"].get(reply.client_id, {})
        if changed := find_changed_data(recorded, reply.facts):
            raise MessageError(describe_changed_data(self.config, reply.client_id, changed))

    def _find_returned(self, grid: Grid, absent: set[str]) -> None:
        def accept(reply: Reply, node: int) -> None:
            if reply.client_id not in self._run.manifest["clients"]:
                self._take_in(reply, node)
                return
            self._require_same_data(reply)
            self._run.log_event("returned", client=reply.client_id, node=node)
            record(JOINED, run=self._task.run_name, client=reply.client_id, node=str(node))
            self._report(f"{reply.client_id} is back, as another node.")

        for fault in find_returned(grid, self.roster, self._task, self.config, absent, accept):
            self._report(f"A new node cannot take part: {fault}")

    def _take_in(self, reply: Reply, node: int) -> None:
        """Enter a client that was not there when the run began."""
        require_counts(reply)
        report = read_report(reply.metrics, reply.facts)
        self._run.manifest["clients"][reply.client_id] = report
        self._run.log_event(JOINED, client=reply.client_id, node=node)
        record(JOINED, run=self._task.run_name, client=reply.client_id, node=str(node))
        self._report(f"{reply.client_id} joins from round {self._round.server_round} on.")

    def _complete_round(self, server_round: int, reports: dict[str, dict[str, Any]]) -> None:
        """Enter the round with what the server itself has measured, and report it."""
        self._spending.enter(self._round, self._run.manifest["clients"])
        traffic, metrics = self.roster.traffic.by_client, self._aggregation.metrics
        seconds = self._round.complete(traffic, metrics)
        if self.config.federated.keep_rounds is not None:
            self._run.thin(self.config.federated.keep_rounds)
        num_rounds, left = self.config.federated.num_rounds, None
        if server_round > 0:  # round 0 trains nothing
            self._round_seconds.append(seconds)
            mean = sum(self._round_seconds) / len(self._round_seconds)
            left = mean * (num_rounds - server_round)
        sample = self.config.evaluation.sample
        self._report(describe_round(server_round, num_rounds, reports, seconds, left, sample))

    def _enter_global(self, state: AdapterState) -> ArrayRecord:
        """Make this the round's global adapter: in its folder, its entry and what is sent."""
        folder = self._run.paths.global_adapter(self._round.server_round)
        sha256 = self._round.adapters[GLOBAL] = self._save_global(folder, state)
        return self._broadcast.renew(state, sha256)

    def _save_global(self, folder: Path, state: AdapterState) -> str:
        return save_adapter(folder, self._model, GLOBAL, state, self.config.model.name)
