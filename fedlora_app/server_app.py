"""Flower's server side: settle the configuration, meet the clients, run the rounds.

The server loads no base model. It takes the adapter's shapes from the model's
configuration, and knows of the clients only what ``messages`` declares.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedlora_app.config.participation import list_members
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.deployment.coordinator import find_owners
from fedlora_app.deployment.record import record
from fedlora_app.deployment.registry import RegistryError
from fedlora_app.deployment.witness import JOINED, witness_run
from fedlora_app.evaluation.learning import describe_end
from fedlora_app.federation.grid import PacedGrid
from fedlora_app.federation.messages import REGISTRATION_ROUND, Task
from fedlora_app.federation.ray_pool import current_pool, require_usable_environment
from fedlora_app.federation.registration import read_report, register_clients
from fedlora_app.foundation.files import keep_files_private
from fedlora_app.foundation.project import hash_package
from fedlora_app.foundation.quiet import quieted
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.foundation.terminal import shell
from fedlora_app.model.adapter_files import load_adapter, load_tensors
from fedlora_app.model.adapters import (
    AdaptedModel,
    build_initial_state,
    describe_adapted,
    state_shapes,
)
from fedlora_app.runs.console import describe_start
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.history import read_history
from fedlora_app.runs.manifest import RUN_ID
from fedlora_app.runs.paths import MEMORY_FILE, RunDirectoryError
from fedlora_app.runs.resuming import (
    FRESH,
    Resumption,
    describe_other_software,
    describe_resuming,
    require_same_data,
)
from fedlora_app.runs.settings import Settings, read_settings
from fedlora_app.runs.tracking import build_trackers
from fedlora_app.strategy import GlobalAdapterFedAvg
from fedlora_app.training.shapes import build_shapes

app = ServerApp()

RUN_ID_BYTES = 8


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment from configuration to final adapters, or resume a stopped one."""
    keep_files_private()
    settings = read_settings(context.run_config)
    config, resumption = settings.config, settings.resumption
    print(f"Run directory: {settings.run_dir}", flush=True)
    if resumption is None:
        RunDirectory.require_absent(settings.run_dir)
    with ExitStack() as stack:
        if resumption is not None:  # nobody else may write in it from here on
            run = RunDirectory.reopen(settings.run_dir, resumption.saved.manifest)
            stack.enter_context(closing(run))
        model, faults = build_shapes(config, settings.root)
        paced = PacedGrid(
            grid,
            config.federated.at_once,
            config.federated.client_timeout_seconds,
            current_pool,
            config.federated.reconnect_seconds,
            _Owners(config.client_ids),
        )
        stack.enter_context(_show_errors(paced))
        after = None if resumption is None else resumption.after_round
        stack.enter_context(witness_run(paced, settings.run_name, config, after))
        if paced.is_simulation:
            require_usable_environment()
            config.require_clients()
        task = build_registration(settings)
        to_come = list_members(config, 0 if after is None else after + 1)
        taken_part = set() if resumption is None else to_come & run.manifest["clients"].keys()
        registrations = register_clients(
            paced, config, task, context.run_config, faults, to_come, taken_part
        )
        paced.names |= {node: client for client, (node, _) in registrations.items()}
        for client, (node, _) in sorted(registrations.items()):
            record(JOINED, run=settings.run_name, client=client, node=str(node))
        reports = {
            client: read_report(reply.metrics, reply.facts)
            for client, (_, reply) in sorted(registrations.items())
        }
        if resumption is None:
            base_commit = getattr(model.get_base_model().config, "_commit_hash", None)
            run = RunDirectory.create(
                settings.run_dir,
                config,
                settings.root,
                reports,
                base_commit,
                task.date,
                **{RUN_ID: task.run_id},
            )
            stack.enter_context(closing(run))
        else:
            run.manifest["clients"] = reports | run.manifest["clients"]  # who has come since
            require_same_data(run.manifest, reports)
            for note in describe_other_software(run.manifest, reports):
                print(note, flush=True)
        stack.enter_context(_explain_disk_errors(run))
        shapes = {name: state_shapes(model, name) for name in (GLOBAL, LOCAL)}
        print(describe_start(config, shapes, reports), flush=True)
        if note := describe_adapted(model):
            print(note, flush=True)
        strategy = GlobalAdapterFedAvg(
            config,
            nodes={client: node for client, (node, _) in registrations.items()},
            task=task,
            model=model,
            run=run,
            report=lambda line: print(line, flush=True),
        )
        run_rounds(strategy, paced, model, run, resumption)
        run.finish()
    print(describe_end(read_history(run.path), config, run.manifest.get("final")), flush=True)
    print(f"Run directory: {run.path}\nReport: {report_run(run.path)}", flush=True)


class _Owners:
    """Which of the experiment's clients each node of a deployment is.

    Where the SuperLink does not say so for a moment, what it said last holds: a run of hours does
    not end by that, and nobody new is let in meanwhile.
    """

    def __init__(self, clients: Collection[str]) -> None:
        self._clients = clients
        self._known: dict[int, str] | None = None

    def __call__(self) -> dict[int, str] | None:
        """Return it; None where nodes are not known by keys."""
        try:
            found = find_owners()
        except RegistryError as error:
            if self._known is None:
                raise
            print(f"Nobody new is let in for now. {error}", flush=True)
            return self._known
        self._known = found and {n: site for n, site in found.items() if site in self._clients}
        return self._known


def build_registration(settings: Settings) -> Task:
    """Return the first task, which every node gets and from which all others are made."""
    resumption, run_id = settings.resumption, secrets.token_hex(RUN_ID_BYTES)
    if resumption is not None:
        run_id = str(resumption.saved.manifest.get(RUN_ID, ""))
    return Task(
        client_id="",
        server_round=REGISTRATION_ROUND,
        global_sha256="",
        resumes=resumption is not None,
        run_name=settings.run_name,
        project_dir=str(settings.root),
        output_dir=str(settings.run_dir.parent),
        package_sha256=hash_package(),
        experiment=json.dumps(settings.config.dump()),
        date=settings.date,
        run_id=run_id,
    )


def run_rounds(
    strategy: GlobalAdapterFedAvg,
    grid: PacedGrid,
    model: AdaptedModel,
    run: RunDirectory,
    resumption: Resumption | None,
) -> None:
    """Run all rounds, or those that a stopped run has left, and save the final adapter."""
    config, after = strategy.config, FRESH
    if resumption is not None:
        after = resumption.after_round
        arrays = _restore(strategy, grid, model, resumption)
        run.rewind(config, after, resumption.changes)
        print(f"Resuming after round {after} of {config.federated.num_rounds}.", flush=True)
        for key, (before, now) in resumption.changes.items():
            print(f"From here on {key} is {now!r}, and was {before!r}.", flush=True)
    run.trackers = build_trackers(config, run.path)
    if after == FRESH:
        seed = derive_seed(config.experiment.seed, "initial")
        arrays = strategy.save_initial(build_initial_state(model, GLOBAL, seed))

    def evaluate_base(server_round: int, current: ArrayRecord) -> MetricRecord | None:
        if server_round == 0 and after == FRESH:
            strategy.evaluate_base(grid, current)
        return None

    with quieted("flwr"):  # the strategy reports one line per round
        strategy.start(
            grid=grid,
            initial_arrays=arrays,
            num_rounds=config.federated.num_rounds - max(after, 0),
            evaluate_fn=evaluate_base,
        )
    strategy.save_final(grid)


def _restore(
    strategy: GlobalAdapterFedAvg, grid: PacedGrid, model: AdaptedModel, resumption: Resumption
) -> ArrayRecord:
    """Restore the strategy's state after all clients have verified their own; return the arrays."""
    saved, after = resumption.saved, resumption.after_round
    before, now = saved.config.federated.num_rounds, strategy.config.federated.num_rounds
    if now != before:
        print(
            f"Note: the run was to have {before} rounds and now gets {now}; from here on the "
            "learning rate follows the schedule of the new total.",
            flush=True,
        )
    if after == FRESH:
        strategy.verify_clients(grid, set())
        return ArrayRecord()
    state = load_adapter(
        saved.adapter_folder(after),
        model,
        GLOBAL,
        saved.config.model.name,
        within=saved.path,
        sha256=resumption.global_sha256,
    )
    memory = {}
    if resumption.memory_sha256 is not None:
        path = saved.adapter_folder(after) / MEMORY_FILE
        memory = load_tensors(
            path,
            None,
            within=saved.path,
            sha256=resumption.memory_sha256,
            expected="what the aggregation keeps from round to round. Restore it.",
        )
    arrays = strategy.restore(state, memory, resumption)
    is_last = after == now  # what is left to do needs no global adapter at the clients
    strategy.verify_clients(grid, set() if is_last else resumption.evaluated_clients)
    return arrays


def report_run(run_dir: Path) -> str:
    """Write the report of a finished run; return its path, or why there is none."""
    from fedlora_app.report.page import write_report  # matplotlib, which no round needs

    try:
        return str(write_report(run_dir))
    except Exception as error:  # whatever it is, the run itself has ended well
        return (
            f"not written ({type(error).__name__}: {error}). Try: fedlora report {shell(run_dir)}"
        )


@contextmanager
def _show_errors(grid: PacedGrid) -> Iterator[None]:
    """Print what ends the run where Flower would wait for a hung worker before it does."""
    try:
        yield
    except Exception as error:
        if grid.has_running_clients and grid.is_simulation:
            print(f"{error}\nFlower waits for the worker that hangs; end it.", flush=True)
        raise


@contextmanager
def _explain_disk_errors(run: RunDirectory) -> Iterator[None]:
    """Say what is intact when something cannot be written."""
    try:
        yield
    except ConnectionError:
        raise  # of Flower, and no disk's
    except OSError as error:
        complete = [entry["round"] for entry in run.manifest.get("rounds", [])]
        state = (
            f"Round {complete[-1]} is complete and intact" if complete else "No round is complete"
        )
        raise RunDirectoryError(
            f"{error.filename or run.path} cannot be written: {error.strerror or error}. {state}. "
            f"When there is room again: {describe_resuming(run.path)}"
        ) from error
