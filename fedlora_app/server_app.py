"""Flower's server side: settle the configuration, meet the clients, run the rounds.

The server loads no base model. It takes the adapter's shapes from the model's
configuration, and knows of the clients only what ``messages`` declares.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MessageType, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedlora_app.adapters import (
    AdapterState,
    attach_adapters,
    build_initial_state,
    state_shapes,
)
from fedlora_app.config import GLOBAL, LOCAL, Config, ConfigError
from fedlora_app.config_file import load_config
from fedlora_app.grid import PacedGrid, build_message
from fedlora_app.messages import MessageError, Reply, Task, build_task_content, read_reply
from fedlora_app.model import build_empty_model
from fedlora_app.project import find_project_root, hash_package
from fedlora_app.run_directory import RunDirectory, check_run_name, default_run_name
from fedlora_app.seeds import derive_seed
from fedlora_app.strategy import GlobalAdapterFedAvg
from fedlora_app.summary import describe_run, describe_start
from fedlora_app.tracking import build_trackers, require_trackers

CHECK_IN_ROUND = 0
DECLARED_DEFAULTS = {("config", "conf/demo.yaml"), ("output-dir", "results")}  # pyproject.toml
CONNECT_REPORT_SECONDS = 30.0

app = ServerApp()


@dataclass(frozen=True)
class Settings:
    """What ``flwr run . --run-config`` decides, with the project it was resolved in."""

    config: Config
    root: Path
    run_name: str
    output_dir: str

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory."""
        return resolve_output_dir(self.root, self.output_dir) / self.run_name


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment from configuration to final adapters."""
    settings = read_settings(context.run_config)
    config = settings.config
    print(f"Run directory: {settings.run_dir}", flush=True)
    RunDirectory.require_absent(settings.run_dir)
    model = attach_adapters(build_empty_model(config.model, settings.root), config.adapters)

    paced = PacedGrid(grid, config.federated.clients_at_once)
    task = Task(
        client_id="",
        server_round=CHECK_IN_ROUND,
        local_round=-1,
        run_name=settings.run_name,
        project_dir=str(settings.root),
        output_dir=str(settings.run_dir.parent),
        package_sha256=hash_package(),
        experiment=json.dumps(config.dump()),
    )
    check_ins = meet_clients(paced, config, task, context.run_config)
    reports = {client: _read_report(reply) for client, (_, reply) in sorted(check_ins.items())}
    base_commit = getattr(model.get_base_model().config, "_commit_hash", None)
    run = RunDirectory.create(settings.run_dir, config, settings.root, reports, base_commit)
    shapes = {name: state_shapes(model, name) for name in (GLOBAL, LOCAL)}
    print(describe_start(config, shapes, reports), flush=True)

    strategy = GlobalAdapterFedAvg(
        config,
        nodes={client: node for client, (node, _) in check_ins.items()},
        task=task,
        model=model,
        run=run,
        report=lambda line: print(line, flush=True),
    )
    seed = derive_seed(config.experiment.seed, "initial")
    with closing(run):
        run.trackers = build_trackers(config, run.path)
        run_rounds(strategy, paced, build_initial_state(model, GLOBAL, seed))
    run.finish()
    print(describe_end(run.history, config), flush=True)
    print(f"Run directory: {run.path}\nReport: {report_run(run.path)}", flush=True)


def run_rounds(strategy: GlobalAdapterFedAvg, grid: PacedGrid, state: AdapterState) -> None:
    """Evaluate the base model, run all rounds from ``state`` on, and keep the last adapter."""

    def evaluate_base(server_round: int, current: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            strategy.evaluate_base(grid, current)
        return None

    with _quiet_flower():
        strategy.start(
            grid=grid,
            initial_arrays=strategy.save_initial(state),
            num_rounds=strategy.config.federated.num_rounds,
            evaluate_fn=evaluate_base,
        )
    strategy.save_final()


def report_run(run_dir: Path) -> str:
    """Write the report of a finished run; return its path, or why there is none."""
    from fedlora_app.report.page import write_report  # matplotlib, which no round needs

    try:
        return str(write_report(run_dir))
    except OSError as error:
        return f"not written ({error.strerror}). Try again: fedlora report {run_dir.name}"


def describe_end(history: list[dict[str, Any]], config: Config) -> str:
    """Return what a finished run prints before its last line."""
    table = describe_run(history)
    if config.federated.mode != "dual":
        return table
    return (
        f"{table}\nTo see what one averaged adapter makes of the same work, add mode='fedavg' to "
        "--run-config."
    )


def read_settings(run_config: dict[str, Any]) -> Settings:
    """Resolve the run configuration into settings.

    Raises:
        ConfigError, RunDirectoryError, ProjectNotFoundError: before anything is written.
    """
    if run_config["resume"]:
        raise ConfigError("resume is not built yet. Leave it empty to start a new run.")
    config_path = str(run_config["config"])
    root = find_project_root(config_path)
    num_rounds, mode = run_config["num-rounds"], run_config["mode"]
    config = load_config(
        root / config_path,
        overrides=str(run_config["overrides"]),
        federated__num_rounds=None if num_rounds == 0 and num_rounds is not False else num_rounds,
        federated__mode=None if mode == "" else mode,
    )
    require_trackers(config)
    resolve_output_dir(root, str(run_config["output-dir"]))
    return Settings(
        config=config,
        root=root,
        run_name=check_run_name(str(run_config["run-name"] or default_run_name(config))),
        output_dir=str(run_config["output-dir"]),
    )


def resolve_output_dir(root: Path, output_dir: str) -> Path:
    """Return the absolute folder that run directories go to."""
    if not output_dir.strip():
        raise ConfigError("output-dir is empty. Name a folder; the default is results.")
    return (root / Path(output_dir).expanduser()).resolve()


def meet_clients(
    grid: PacedGrid, config: Config, task: Task, run_config: dict[str, Any]
) -> dict[str, tuple[int, Reply]]:
    """Have every node check in; return each client's node and report.

    Raises:
        ConfigError: too many or too few nodes, or two nodes that are one client.
        MessageError: with what every client found wrong, together.
    """
    node_ids = wait_for_nodes(grid, len(config.federated.clients), run_config)
    content = build_task_content(task)
    messages = (build_message(content, MessageType.QUERY, node) for node in node_ids)
    met: dict[str, tuple[int, Reply]] = {}
    faults: list[str] = []
    for message in grid.send_and_receive(messages):
        node = message.metadata.src_node_id
        try:
            reply = read_reply(message, None, CHECK_IN_ROUND)
            if reply.client_id in met:
                raise MessageError(
                    f'Two nodes are the client "{reply.client_id}". Give each SuperNode its own '
                    "client-id."
                )
            met[reply.client_id] = (node, reply)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        listing = "\n".join(sorted(set(faults)))
        raise MessageError(f"The run cannot start:\n{listing}")
    return met


def wait_for_nodes(grid: PacedGrid, num_clients: int, run_config: dict[str, Any]) -> list[int]:
    """Return the nodes, waiting for SuperNodes to connect; a simulation has all it gets."""
    is_simulation = type(grid.unwrapped).__name__ == "InMemoryGrid"
    reported = 0.0
    while True:
        node_ids = sorted(grid.get_node_ids())
        if len(node_ids) > num_clients or (is_simulation and len(node_ids) != num_clients):
            text = f"The federation has {len(node_ids)} nodes and federated.clients names "
            text += f"{num_clients}. "
            if not is_simulation:
                raise ConfigError(f"{text}Stop the SuperNodes that do not take part.")
            raise ConfigError(f"{text}Run:\n  {_command_for(num_clients, run_config)}")
        if len(node_ids) == num_clients:
            return node_ids
        if time.monotonic() - reported > CONNECT_REPORT_SECONDS:
            reported = time.monotonic()
            print(f"Waiting for {num_clients - len(node_ids)} more SuperNodes.", flush=True)
        time.sleep(1)


def _read_report(reply: Reply) -> dict[str, Any]:
    """Return what a client said of itself, with its list of findings about the data."""
    findings = json.loads(reply.facts.get("findings", "[]"))
    return {**reply.metrics, **reply.facts, "findings": findings}


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Leave Flower's running commentary out; the strategy reports one line per round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _command_for(num_nodes: int, run_config: dict[str, Any]) -> str:
    """Return the same run's command line with the right number of nodes."""
    given = " ".join(
        f"{key}={value}" if isinstance(value, int) else f"{key}='{value}'"
        for key, value in run_config.items()
        if value not in ("", 0) and (key, value) not in DECLARED_DEFAULTS
    )
    settings = f' --run-config "{given}"' if given else ""
    return f'flwr run . --stream --federation-config "num-supernodes={num_nodes}"{settings}'
