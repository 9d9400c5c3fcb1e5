"""The long-lived process of a site that answers messages."""

from __future__ import annotations

import io
import json
import shutil
import signal
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from deployed import Deployed
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TaskType
from loopback import Federation, wait_until

from fedlora_app.config.loading import load_config
from fedlora_app.deployment.endings import STOPPED_IN_TASK
from fedlora_app.deployment.executor import CLIENT_APP, find_refusal, identify
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


@pytest.mark.deployment
def test_executors_load_once_and_train_what_one_process_trains(
    sites, tiny_experiment, tiny_project, tmp_path
):
    def run(name: str) -> Path:
        output = sites.flower.run(
            ".",
            "loopback",
            run_config=f"config='{tiny_experiment}' run-name='{name}' "
            f"output-dir='{sites.folder / 'server'}'",
        )
        folder = sites.folder / "server" / name
        assert (folder / "final" / "global").is_dir(), output + sites.log("ann-executor")
        return folder

    first, second = run("first"), run("second")
    expected = Federation(tiny_project, tmp_path, load_config(tiny_experiment)).run("first")
    processes = set()
    for ran in (first, second):
        lines = (ran / "metrics.jsonl").read_text().splitlines()
        facts = [e for e in map(json.loads, lines) if e["event"] == "facts"]
        processes |= {(e["client"], e["process"]) for e in facts}
    assert {said.partition(", ")[2] for _, said in processes} == {"base model loaded 1 times"}
    assert len(processes) == 2  # a process for each client, of both runs
    weights = "adapter_model.safetensors"
    for ran in (first, second):
        ours = [
            ran / "final" / "global",
            *(
                sites.folder / client / ran.name / "final" / "clients" / client
                for client in ("ann", "bob")
            ),
        ]
        theirs = [expected / "final" / part for part in ("global", "clients/ann", "clients/bob")]
        for our, their in zip(ours, theirs, strict=True):
            assert (our / weights).read_bytes() == (their / weights).read_bytes(), our


@pytest.mark.deployment
def test_a_changed_bundle_is_refused_by_name(sites, tiny_experiment, tmp_path):
    changed = tmp_path / "fedlora-app"
    changed.mkdir()
    for name in ("fedlora_app", "conf"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, changed / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, changed)
    marker = tmp_path / "was-run"
    with (changed / "fedlora_app" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    output = sites.flower.run(
        str(changed),
        "loopback",
        run_config=f"config='{tiny_experiment}' run-name='changed' "
        f"output-dir='{sites.folder / 'server'}'",
    )
    assert "The run cannot start:" in output
    for client in ("ann", "bob"):
        assert f"{client}: The app bundle's code is not what is installed here" in output
        assert f"{client}: The app bundle's code" in sites.log(f"{client}-executor")
    assert hash_package() in output and not marker.exists()


@pytest.mark.deployment
def test_a_stopped_executor_ends_its_task_and_itself(sites, tiny_experiment):
    """It comes last: ann has no executor after it."""
    executor = sites.processes["ann-executor"]
    before = sites.log("ann-executor")

    def stop_in_training() -> None:
        wait_until(lambda: "round 1" in sites.log("ann-executor")[len(before) :], 120)
        executor.send_signal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_in_training)
        output = sites.flower.run(
            ".",
            "loopback",
            run_config=f"config='{tiny_experiment}' run-name='stopped' num-rounds=50 "
            f"output-dir='{sites.folder / 'server'}'",
        )
        stopping.result()
    assert executor.wait(timeout=10) == STOPPED_IN_TASK, sites.log("ann-executor")
    assert "ann: This client's executor was stopped in the middle of its work." in output
