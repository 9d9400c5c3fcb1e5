"""The boundary: what leaves a client, what the server opens, what goes over the network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tiny_config
from flwr.cli.build import build_fab_from_disk
from loopback import Federation, LoopbackGrid
from observation import SERVER, Observation, find_windows, observe
from safetensors.torch import load_file

from fedlora_app import client as client_module
from fedlora_app.config.schema import Config
from fedlora_app.federation.messages import ABOUT_RECORD, METRIC_RECORD, UPDATE_RECORD
from fedlora_app.federation.packed_state import unpack_state
from fedlora_app.foundation.files import WEIGHTS_FILE
from fedlora_app.strategy import RoundError

CLIENTS = ("ann", "bob")
NUM_ROUNDS = 2


@dataclass
class Observed:
    """A finished run, all that was planted for it and all that could be seen of it."""

    project: Path
    config: Config
    run: Path
    grid: LoopbackGrid
    seen: Observation
    texts: dict[str, bytes]
    prompts: dict[str, bytes]

    def local_adapters(self) -> list[np.ndarray]:
        """Every local tensor that was ever kept, what each round changed, and both in bf16."""
        tensors = []
        for client in CLIENTS:
            folder = self.run / "clients" / client
            rounds = [load_file(path / WEIGHTS_FILE) for path in sorted(folder.glob("round_*"))]
            assert len(rounds) == NUM_ROUNDS + 1
            tensors += [tensor for state in rounds for tensor in state.values()]
            tensors += [
                after[key] - before[key] for before, after in pairwise(rounds) for key in after
            ]
        rounded = [tensor.bfloat16().view(torch.uint16).numpy() for tensor in tensors]
        return [tensor.numpy() for tensor in tensors] + rounded

    def server_files(self) -> dict[str, bytes]:
        """Every file that the server has written."""
        paths = (path for path in self.run.rglob("*") if path.is_file())
        names = {path.relative_to(self.run): path for path in paths}
        own = {Path("clients"), Path("final/clients")}
        return {
            name.as_posix(): path.read_bytes()
            for name, path in names.items()
            if not own & set(name.parents)
        }


@pytest.fixture(scope="module")
def observed(tokenizer, tiny_project, tmp_path_factory):
    """A run of two clients with patterns in all that is theirs, by the real apps."""
    project = tmp_path_factory.mktemp("planted")
    shutil.copytree(tiny_project / "model", project / "model")
    (project / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    texts: dict[str, bytes] = {}
    prompts: dict[str, bytes] = {}

    def plant(where: str, kept: dict[str, bytes] = texts) -> str:
        pattern = "zq" + hashlib.sha256(where.encode()).hexdigest()[:10]
        kept[where] = pattern.encode()
        return pattern

    def records(where: str, number: int = 3) -> list[dict]:
        fields = ("instruction", "input", "output", "fact")
        return [
            {name: plant(f"{where}, record {index}, {name}") for name in fields}
            | {
                "distractors": [plant(f"{where}, record {index}, distractor")],
                "evaluation_guide": {
                    f"{client}_keywords": [plant(f"{where}, record {index}, keyword")]
                    for client in CLIENTS
                },
            }
            for index in range(number)
        ]

    def write(name: str, content: list[dict]) -> str:
        path = project / "private" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return str(path.relative_to(project))

    clients = []
    for client in CLIENTS:
        training = records(f"{client}'s local training data")
        clients.append(
            {
                "id": client,
                "system_prompt": f"You are {client}, {plant(client, prompts)}.",
                "universal_train": write(f"{client}/own.json", records(f"{client}'s universal")),
                "local_train": write(f"{client}/train.json", training),
                # The first record is trained on too, so that there is something to find fault with.
                "local_test": write(
                    f"{client}/test.json", training[:1] + records(f"{client}'s test data")
                ),
                "local_validation": write(f"{client}/valid.json", records(f"{client}'s choosing")),
            }
        )
    conflicts = [
        {
            "instruction": plant(f"conflict {index}"),
            "answers": {name: plant(f"conflict {index}, {name}'s answer") for name in CLIENTS},
        }
        for index in range(2)
    ]
    config = build_tiny_config(
        experiment={"track": ["tensorboard"]},
        federated={"clients": clients, "num_rounds": NUM_ROUNDS, "final": "best"},
        training={"max_seq_length": 256},
        data={
            "universal_test": write("all/test.json", records("the universal test")),
            "conflict_test": write("all/conflict.json", conflicts),
        },
        evaluation={"batch_size": 8, "max_new_tokens": 4},
    )
    federation = Federation(project, project / "results", config)
    folders = [project / "results" / "run" / name for name in ("clients", "final/clients")]
    umask = os.umask(0o022)
    with observe(project / "private", project / ".cache", *folders) as seen:
        run = federation.run(report=True)
    os.umask(umask)
    return Observed(project, config, run, federation.grids[0], seen, texts, prompts)


class TestWhatLeavesAClient:
    def test_no_planted_text_is_in_what_left(self, observed):
        places = observed.server_files() | {
            "the messages": observed.grid.bytes_received(),
            "the server's log": observed.seen.log_of(SERVER),
        }
        assert {"report.html", "metrics.jsonl", "history.csv", "manifest.json"} <= set(places)
        assert any(name.startswith("tensorboard/") for name in places)
        assert any(name.startswith("plots/") for name in places)
        assert len(observed.texts) > 100
        found = [
            (what, place)
            for what, pattern in observed.texts.items()
            for place, content in places.items()
            if pattern in content
        ]
        assert not found

    def test_no_piece_of_a_local_adapter_is_in_what_left(self, observed):
        places = observed.server_files() | {
            "the messages": observed.grid.bytes_received(),
            "the server's log": observed.seen.log_of(SERVER),
        }
        needles = observed.local_adapters()
        found = {place: find_windows(needles, content) for place, content in places.items()}
        assert not any(found.values()), found

    def test_the_search_finds_what_is_there(self, observed):
        """Else the two tests above would pass whatever was sent."""
        found = set()
        for client in CLIENTS:
            log = observed.seen.log_of(client)
            shown = {what for what, pattern in observed.texts.items() if pattern in log}
            assert "conflict 0" in shown  # a client shows itself an example,
            found |= shown
        # and what it finds fault with; of a file of all, whoever is the first in a process.
        assert "the universal test, record 0, keyword" in found
        adapters = b"xyz".join(path.read_bytes() for path in observed.run.rglob(WEIGHTS_FILE))
        assert find_windows(observed.local_adapters(), adapters) > 1000
        sent = [
            array.numpy()
            for reply in observed.grid.received
            for record in reply.content.array_records.values()
            for array in record.values()
        ]
        assert find_windows(sent, observed.grid.bytes_received()) > 1000

    def test_a_system_prompt_goes_down_and_never_up(self, observed):
        """It is part of the experiment, which the server's operator has written."""
        sent, files = observed.grid.bytes_sent(), observed.server_files()
        for pattern in observed.prompts.values():
            assert pattern in sent
            assert pattern not in observed.grid.bytes_received() + observed.seen.log_of(SERVER)
            holding = {name for name, content in files.items() if pattern in content}
            assert holding == {"config.json", "report.html"}  # which shows the configuration

    def test_a_reply_holds_these_records_and_no_others(self, observed):
        replies = observed.grid.received
        # Own settings are asked for; then registration, the base model's evaluation, and per
        # round an update and a report.
        assert len(replies) == len(CLIENTS) * (3 + 2 * NUM_ROUNDS)
        shapes = {k: v.shape for k, v in load_file(self._first_global(observed)).items()}
        facts = set()
        for reply in replies:
            content = reply.content
            records = {METRIC_RECORD, ABOUT_RECORD}
            if reply.metadata.message_type == "train":
                records.add(UPDATE_RECORD)
                unpack_state(content.array_records[UPDATE_RECORD], shapes, "a client")
            assert set(content) == records
            about = content.config_records[ABOUT_RECORD]
            assert set(about) == {"client-id", "server-round", "dtype", "facts"}
            facts |= set(json.loads(about["facts"]))
            assert not reply.metadata.group_id and not reply.has_error()
        assert facts == {
            *("device", "process", "findings", "base_model", "global_adapter", "local_adapter"),
            "needs",
            *("sha256/universal_train", "sha256/local_train"),
            *("sha256/universal", "sha256/local", "sha256/conflict", "sha256/local_validation"),
        }

    def _first_global(self, observed):
        return observed.run / "server" / "round_000" / WEIGHTS_FILE

    def test_findings_say_where_and_not_what(self, observed):
        manifest = json.loads((observed.run / "manifest.json").read_text())
        findings = manifest["clients"]["ann"]["findings"]
        assert "test-in-training" in {finding["rule"] for finding in findings}
        assert {key for finding in findings for key in finding} == {
            *("severity", "rule", "file", "record")
        }


def test_no_data_and_no_adapter_is_in_the_bundle(observed, tmp_path):
    """Wherever in the project they lie: ``output-dir`` and data files may be anywhere."""
    project = tmp_path / "project"
    for name in ("fedlora_app", "conf"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, project)
    for name in ("data/private", "private"):
        shutil.copytree(observed.project / "private", project / name)
    for name in ("results/run", "elsewhere/run"):
        shutil.copytree(observed.run, project / name)
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(project)))
    content = b"\n".join(bundle.read(name) for name in bundle.namelist())
    assert b"class GlobalAdapterFedAvg" in content
    planted = [*observed.texts.values(), *observed.prompts.values()]
    assert not [pattern for pattern in planted if pattern in content]
    assert find_windows(observed.local_adapters(), content) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
class TestWhatIsOpened:
    def test_the_server_opens_nothing_of_a_client(self, observed):
        assert observed.seen.watch.opened[SERVER] == set()

    def test_a_client_opens_its_own_and_no_other_clients(self, observed):
        for client, other in (CLIENTS, CLIENTS[::-1]):
            opened = observed.seen.watch.opened[client]
            names = {path.relative_to(observed.project).as_posix() for path in opened}
            for name in ("own.json", "train.json", "test.json", "valid.json"):
                assert f"private/{client}/{name}" in names
            assert f"results/run/clients/{client}/round_001/{WEIGHTS_FILE}" in names
            private = {f"private/{other}", f"results/run/clients/{other}"}
            assert not [name for name in names if any(name.startswith(p) for p in private)]

    def test_a_server_that_does_open_something_is_seen(self, observed):
        secret = observed.project / "private" / "ann" / "train.json"
        with observe(observed.project / "private") as seen:
            load_open = os.open(secret, os.O_RDONLY)
            os.close(load_open)
        assert seen.watch.opened[SERVER] == {secret}


class TestErrors:
    """What goes wrong at a client is told without what it was doing it with."""

    SECRET = "zqthetextofarecord"

    @pytest.mark.parametrize(
        ("place", "kind"),
        [
            *(("tokenize_client_files", kind) for kind in (KeyError, UnicodeError, ExceptionGroup)),
            ("train_phase", RuntimeError),
            ("ClientEvaluation", ExceptionGroup),
        ],
    )
    def test_an_unforeseen_error_stays_here(self, observed, tmp_path, place, kind):
        def fail(*args, **kwargs):
            inner = [ValueError(self.SECRET)] if kind is ExceptionGroup else []
            raise kind(self.SECRET, *[inner] * bool(inner)) from ValueError(self.SECRET)

        federation = Federation(observed.project, tmp_path, observed.config)
        with (
            observe(tmp_path) as seen,
            pytest.MonkeyPatch.context() as patch,
            pytest.raises((RoundError, ValueError)) as caught,
        ):
            patch.setattr(client_module, place, fail)
            federation.run()
        assert f"ann: {kind.__name__} in builtins; this client's log has the rest" in str(
            caught.value
        )
        self._assert_only_the_client_knows(federation, seen, str(caught.value))

    @pytest.mark.parametrize(
        "content",
        [
            f'[{{"instruction": "{SECRET}", "output": "{SECRET}"',  # a file that ends too early
            f'{{"instruction": "{SECRET}"}} {SECRET}',
            json.dumps([{"instruction": SECRET, "output": ""}]),
            json.dumps([{"instruction": SECRET, "output": [SECRET]}]),
            json.dumps([SECRET]),
            json.dumps([{"instruction": SECRET, "output": SECRET * 400}]),
            json.dumps([{"instruction": SECRET * 400, "output": SECRET}]),
            json.dumps([{"instruction": SECRET, "output": "x", "evaluation_guide": SECRET}]),
            json.dumps(
                [{"instruction": "x", "output": "x", "evaluation_guide": {"ann_keywords": SECRET}}]
            ),
        ],
    )
    def test_bad_data_is_named_and_not_quoted(self, observed, tmp_path, content):
        """A field's name, or a client's that a record mentions, may be quoted; no value is."""
        clients = observed.config.dump()["federated"]["clients"]
        bad = observed.project / "private" / "ann" / "bad.json"
        bad.write_text(content)
        clients[0]["local_train"] = "private/ann/bad.json"
        data = observed.config.dump()["data"]
        config = build_tiny_config(federated={"clients": clients, "num_rounds": 1}, data=data)
        federation = Federation(observed.project, tmp_path, config)
        text = ""
        with observe(tmp_path) as seen:
            try:
                federation.run()
            except ValueError as error:
                text = str(error)
        assert "bad.json" in text or not text  # what is too long is cut and counted
        self._assert_only_the_client_knows(federation, seen, text, logged=False)

    def _assert_only_the_client_knows(self, federation, seen, text, logged=True) -> None:
        secret = self.SECRET.encode()
        assert secret not in federation.grids[0].bytes_received()
        assert secret not in seen.log_of(SERVER) + text.encode()
        for path in federation.output_dir.rglob("*"):
            if path.is_file() and "clients" not in path.parts:
                assert secret not in path.read_bytes()
        if logged:
            assert secret in seen.log_of("ann")


class TestPermissions:
    """Whatever the user's umask lets through, only the owner reads what a run leaves."""

    def test_nobody_else_reads_a_run(self, observed):
        paths = [observed.run, *observed.run.rglob("*"), *(observed.project / ".cache").rglob("*")]
        assert len(paths) > 50
        assert not [path for path in paths if _is_open_to_others(path)]

    @pytest.mark.slow
    def test_nor_what_the_commands_write(self, commands):
        _, _, run, export = commands
        paths = [*run.rglob("*"), export, *export.rglob("*")]
        names = {path.name for path in paths}
        assert {"evaluation.json", "report.html", "plots", WEIGHTS_FILE} <= names
        assert not [path for path in paths if _is_open_to_others(path)]


class TestNetwork:
    """No connection is made, to telemetry or to anything else, where all files are local."""

    @pytest.mark.slow
    def test_the_commands_stay_off_the_network(self, commands):
        output, reached, _, _ = commands
        statuses = dict(line.split()[1:] for line in output.splitlines() if "STATUS" in line)
        expected = dict.fromkeys(("check", "evaluate", "report", "ask", "export"), "0")
        assert statuses == expected | {"check": "2"}, output  # it finds fault with the questions
        assert reached == []

    def test_an_attempt_is_seen(self, tmp_path):
        _, reached = _run_offline(
            "import urllib.request; urllib.request.urlopen('http://flower.invalid')", tmp_path
        )
        assert any("flower.invalid" in address for address in reached)

    @pytest.mark.parametrize("allowed", [False, True])
    def test_usage_statistics_are_off_unless_allowed(self, tmp_path, allowed):
        """Also where Flower has been imported, and has read its switch, before the app."""
        script = """
import json
from flwr.supercore import telemetry
import fedlora_app
import datasets, huggingface_hub.constants, os
state = [
    telemetry.create_event(telemetry.EventType.PING, None) == "disabled",
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY,
    not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1",
    os.environ["RAY_USAGE_STATS_ENABLED"] == "0",
]
print("STATE", json.dumps(state))
"""
        names = ("FLWR_TELEMETRY_ENABLED", "HF_UPDATE_DOWNLOAD_COUNTS", "RAY_USAGE_STATS_ENABLED")
        env = {name: "1" for name in names}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "0", "FLWR_DISABLE_UPDATE_CHECK": "0"}
        output, reached = _run_offline(script, tmp_path, env if allowed else {})
        state = json.loads(output.split("STATE")[1])
        if allowed:
            assert state[1:] == [False] * 4
            assert any("telemetry.flower.ai" in address for address in reached)
        else:
            assert state == [True] * 5
            assert reached == []


@pytest.fixture(scope="module")
def commands(observed, tmp_path_factory):
    """Every command that reads a run, in a process whose attempts to connect are listed."""
    folder = tmp_path_factory.mktemp("commands")
    export = folder / "exported"
    run = folder / "results" / "run"
    for name in ("model", "private"):
        (folder / name).symlink_to(observed.project / name)
    shutil.copy(observed.project / "pyproject.toml", folder)
    shutil.copytree(observed.run, run, symlinks=True)
    calls = [
        ("check", run / "config.json"),
        ("evaluate", run),
        ("report", run),
        ("ask", run, "Why?", "--client", "ann", "--max-new-tokens", "2"),
        ("export", run, "--client", "ann", "--output", export),
    ]
    script = f"""
from fedlora_app.cli import main
for arguments in {[[str(argument) for argument in call] for call in calls]!r}:
    sys.argv = ["fedlora", *arguments]
    try:
        main()
    except SystemExit as stop:
        print("STATUS", arguments[0], stop.code or 0, flush=True)
"""
    output, reached = _run_offline(script, folder)
    return output, reached, run, export


AUDIT = """
import sys
def watch(event, details):
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event == "socket.connect" and not isinstance(details[1], (str, bytes))
    ):
        print("REACHED", details[-1] if event == "socket.connect" else details[0], file=sys.stderr)
        raise OSError("this process is off the network")
sys.addaudithook(watch)
"""


def _run_offline(script: str, folder: Path, env: dict | None = None) -> tuple[str, list[str]]:
    """Run a script where every attempt to connect fails; return its output and the attempts."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FLWR_", "RAY_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", AUDIT + script],
        env=given | {"PYTHONPATH": path, "FLWR_HOME": str(folder / "flwr")} | (env or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        umask=0o022,
        timeout=300,
    )
    lines = done.stderr.splitlines()
    reached = [line.removeprefix("REACHED ") for line in lines if line.startswith("REACHED ")]
    return done.stdout, reached


def _is_open_to_others(path: Path) -> bool:
    return not path.is_symlink() and bool(stat.S_IMODE(path.stat().st_mode) & 0o077)
