"""The long-lived process of a site that answers messages."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from conftest import ROOT
from deployed import Deployed
from flower_process import free_port
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from loopback import Federation, wait_until

from fedlora_app.config.loading import load_config
from fedlora_app.deployment import executor
from fedlora_app.deployment.audit import read_log
from fedlora_app.deployment.endings import STOPPED_IN_TASK
from fedlora_app.deployment.executor import CLIENT_APP, find_refusal, identify
from fedlora_app.deployment.happenings import BUNDLE_REFUSED
from fedlora_app.deployment.record import EVIDENCE_VARIABLE
from fedlora_app.deployment.witness import RECEIVED, SENT
from fedlora_app.foundation.project import hash_bundled_package, hash_package

CLIENT_TASK = TaskType.CLIENT_APP


@pytest.fixture(scope="module")
def bundle() -> bytes:
    """What ``flwr run`` makes of the project."""
    return build_fab_from_disk(ROOT)


def rewrite(bundle: bytes, change) -> bytes:
    """The bundle with what ``change`` makes of each member; None leaves it out."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(bundle)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def test_the_executor_runs_the_app_that_the_project_declares():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"]["clientapp"] == CLIENT_APP


def test_a_bundle_of_the_installed_code_has_its_hash(bundle):
    assert hash_bundled_package(bundle) == hash_package()
    assert find_refusal(CLIENT_TASK, bundle) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda name, content: content + b"# more" if name == "fedlora_app/client.py" else content,
        lambda name, content: None if name == "fedlora_app/model/head.py" else content,
        lambda name, content: content.replace(b"\n", b"\r\n") if name.endswith(".py") else content,
    ],
    ids=["a line more", "a module less", "other ends of lines"],
)
def test_a_bundle_of_other_code_is_refused_with_both_hashes(bundle, change):
    changed = rewrite(bundle, change)
    refusal = find_refusal(CLIENT_TASK, changed)
    assert hash_package() in refusal and hash_bundled_package(changed) in refusal
    assert "the app bundle's code is not what is installed here" in refusal.lower()


def test_settings_in_a_bundle_are_not_code(bundle):
    changed = rewrite(bundle, lambda name, content: content + b"\n" * name.startswith("conf/"))
    assert changed != bundle and find_refusal(CLIENT_TASK, changed) is None


def test_neither_another_app_nor_another_kind_nor_a_damaged_bundle_is_run(bundle):
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as other:
        other.writestr("other_app/client.py", "app = None")
    assert "not what is installed here" in find_refusal(CLIENT_TASK, foreign.getvalue())
    assert "nothing else" in find_refusal(TaskType.AGENT_APP, bundle)
    assert "is damaged" in find_refusal(CLIENT_TASK, bundle[: len(bundle) // 2])


def test_a_refused_bundle_is_entered_with_both_hashes(bundle, tmp_path, monkeypatch):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    log = tmp_path / "evidence.jsonl"
    monkeypatch.setenv(EVIDENCE_VARIABLE, str(log))
    changed = rewrite(bundle, lambda name, content: content + b"# more" * name.endswith(".py"))
    message = Message(RecordDict(), dst_node_id=23, message_type="train")
    context = Context(1, 23, {"client-id": "ann"}, RecordDict(), {})
    serving = executor.Executor("", b"", app=None)
    for content in (changed, b"no zip"):
        serving._refuse_task(message, context, find_refusal(CLIENT_TASK, content), content)
    received, refused, sent, _, damaged, _ = read_log(log).entries
    assert [e["event"] for e in (received, refused, sent)] == [RECEIVED, BUNDLE_REFUSED, SENT]
    assert refused["bundle_package_sha256"] == hash_bundled_package(changed)
    assert refused["package_sha256"] == hash_package()
    assert sent["why_sha256"] == refused["why_sha256"] and sent["client"] == "ann"
    assert damaged["bundle_package_sha256"] is None


def test_a_refusal_names_the_client(tmp_path):
    def context(**node_config) -> Context:
        return Context(1, 23, node_config, RecordDict(), {})

    file = tmp_path / "client.yaml"
    file.write_text("id: ayr\n")
    assert identify(context(**{"client-id": "bath"}), file) == "bath"
    assert identify(context(), file) == "ayr"
    file.write_text("id: [\n")
    assert identify(context(), file) == "node 23"
    assert identify(context(), None) == "node 23"


@pytest.fixture
def runtime_api():
    """A SuperNode's Runtime API on loopback that has no task; yields its address."""
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(
                state_factory=NodeStateFactory(objectstore_factory=ObjectStoreFactory()),
                superexec_auth_secret=b"right",
            ),
            host="127.0.0.1",
            port=free_port(),
            log_level="error",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()


def test_an_executor_with_another_secret_gives_up_with_a_sentence(runtime_api, monkeypatch, capsys):
    monkeypatch.setattr(executor, "RECONNECT_SECONDS", 0.01)
    with pytest.raises(executor.ExecutorError, match="refuses this executor .401.*the same file"):
        executor.Executor(runtime_api, b"wrong", app=None).run()
    assert capsys.readouterr().out.count("No tasks from the SuperNode") == 1


def test_an_executor_waits_for_a_supernode_and_for_tasks(runtime_api, monkeypatch, capsys):
    """Until it is stopped, which is what both pauses do here in the end."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            raise executor.Stopped

    monkeypatch.setattr(executor.time, "sleep", pause)
    nobody = executor.Executor(f"127.0.0.1:{free_port()}", b"right", app=None)
    with pytest.raises(executor.Stopped):
        nobody.run()
    assert set(pauses) == {executor.RECONNECT_SECONDS}
    assert capsys.readouterr().out.count("waiting") == 1
    pauses.clear()
    with pytest.raises(executor.Stopped):
        executor.Executor(runtime_api, b"right", app=None).run()
    assert set(pauses) == {executor.POLL_SECONDS} and not nobody.has_failed_task


@pytest.fixture(scope="module")
def sites(flower, tiny_project, tmp_path_factory):
    """A SuperLink and the sites ann and bob, whose executors outlive the tests of this module."""
    deployed = Deployed(flower, tmp_path_factory.mktemp("sites"))
    try:
        deployed.start_superlink()
        for client in ("bob", "ann"):
            folder = deployed.folder / client
            node = f'client-id="{client}" project-dir="{tiny_project}" output-dir="{folder}"'
            deployed.start_executor(client, deployed.start_supernode(client, node, "process"))
        for client in ("bob", "ann"):
            wait_until(lambda: "Ready for" in deployed.log(f"{client}-executor"), 120)  # noqa: B023
        yield deployed
    finally:
        deployed.stop()


def run(sites: Deployed, app: Path | str, experiment: Path, name: str, **overrides) -> str:
    """What ``flwr run`` of an app prints to its end; the results are in the sites' folder."""
    changed = " ".join(f"{key}={value}" for key, value in overrides.items())
    return sites.flower.run(
        str(app),
        "loopback",
        run_config=f"config='{experiment}' run-name='{name}' overrides='{changed}' "
        f"output-dir='{sites.folder / 'server'}'",
    )


def read_processes(run_dir: Path) -> set[tuple[str, str]]:
    """Each client with what it has said of its process."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {(e["client"], e["process"]) for e in map(json.loads, lines) if e["event"] == "facts"}


@pytest.mark.minutes
@pytest.mark.deployment
def test_executors_load_once_and_train_what_one_process_trains(
    sites, tiny_experiment, tiny_project, tmp_path
):
    output = run(sites, ".", tiny_experiment, "first")
    ran = sites.folder / "server" / "first"
    assert (ran / "final" / "global").is_dir(), output + sites.log("ann-executor")
    processes = read_processes(ran)
    assert {said.partition(", ")[2] for _, said in processes} == {"base model loaded 1 times"}
    assert len(processes) == 2  # one for each client, in all rounds
    expected = Federation(tiny_project, tmp_path, load_config(tiny_experiment)).run("first")
    parts = {"global": ran} | {
        f"clients/{client}": sites.folder / client / "first" for client in ("ann", "bob")
    }
    for part, where in parts.items():
        ours, theirs = (
            (folder / "final" / part / "adapter_model.safetensors").read_bytes()
            for folder in (where, expected)
        )
        assert ours == theirs, part


@pytest.mark.minutes
@pytest.mark.deployment
def test_a_changed_bundle_is_refused_by_name(sites, tiny_experiment, tmp_path):
    changed = tmp_path / "fedlora-app"
    for name in ("fedlora_app", "conf"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, changed / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, changed)
    marker = tmp_path / "was-run"
    with (changed / "fedlora_app" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    output = run(sites, changed, tiny_experiment, "changed")
    assert "The run cannot start:" in output
    for client in ("ann", "bob"):
        assert f"{client}: The app bundle's code is not what is installed here" in output
        assert f"{client}: The app bundle's code" in sites.log(f"{client}-executor")
    assert hash_package() in output and not marker.exists()


@pytest.mark.minutes
@pytest.mark.deployment
def test_stopped_executors_say_so_to_the_server_and_end(sites, tiny_experiment):
    """The last test: nobody has an executor after it. They are those that served the first run."""
    clients = ("ann", "bob")  # one trains after the other, in an order that the seed decides

    def count_trainings(client: str) -> int:
        return sites.log(f"{client}-supernode").count("Receiving: train")

    before = {client: count_trainings(client) for client in clients}

    def stop_in_training() -> None:
        remaining = set(clients)
        while remaining:
            wait_until(lambda: any(count_trainings(c) > before[c] for c in remaining), 120)
            client = next(c for c in remaining if count_trainings(c) > before[c])
            time.sleep(2)  # in which steps are reached; all of them would take hours
            process = sites.processes[f"{client}-executor"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == STOPPED_IN_TASK, sites.log(f"{client}-executor")
            remaining.remove(client)

    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_in_training)
        many = {"training.global_epochs": 100_000}
        output = run(sites, ".", tiny_experiment, "stopped", **many)
        stopping.result()
    for client in clients:
        assert f"{client}: This client's executor was stopped in the middle of its work." in output
    first, second = (sites.folder / "server" / name for name in ("first", "stopped"))
    assert read_processes(first) == read_processes(second)
