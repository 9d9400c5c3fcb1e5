"""Tiny real objects: a two-layer Qwen2, the demo's tokenizer, a federation of two clients."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A core for each worker: torch's threads would otherwise wait for each other most of the time.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import AdaptersConfig, Config

if TYPE_CHECKING:  # what takes seconds to import is imported by the workers alone, where it is used
    from loopback import Federation
    from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "data" / "demo" / "base_model"
ALIKE = {name: {"rank": 4, "alpha": 8} for name in ("global", "local")}
"""Adapters of which one can be a copy of the other, as mode finetuned needs them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what starts Flower's own processes: none of it is left over at the end."""
    items.sort(key=lambda item: "flower" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Spare every collection of garbage what all tests import: an eighth of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from more, and lose tenfold when another process runs."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """No test, nor a process that one starts, writes to the user's cache."""
    from fedlora_app.model.kept_hashes import CACHE_VARIABLE

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is synced outlives the machine, which no test ends: a third of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def build_tiny_model(vocab_size: int, seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """Return a random two-layer Qwen2 of about 50,000 parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes))).eval()


@pytest.fixture
def tiny_model(tokenizer) -> Qwen2ForCausalLM:
    return build_tiny_model(len(tokenizer))


@pytest.fixture
def adapters_config() -> AdaptersConfig:
    return AdaptersConfig.model_validate({"global": {"rank": 4}, "local": {"rank": 2, "alpha": 4}})


@pytest.fixture
def adapted(tiny_model, adapters_config):
    """The tiny model with both adapters, B of both filled so that they have an effect."""
    import torch

    from fedlora_app.model.adapters import attach_adapters

    model = attach_adapters(tiny_model, adapters_config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory, tokenizer) -> Path:
    """A project folder with a tiny model and data for the clients ann, bob and cy."""
    project = tmp_path_factory.mktemp("project")
    (project / "pyproject.toml").write_text('[project]\nname = "fedlora-app"\n')
    build_tiny_model(len(tokenizer), num_hidden_layers=1).save_pretrained(project / "model")
    tokenizer.save_pretrained(project / "model")

    def write(name: str, records: list[dict]) -> None:
        (project / name).write_text(json.dumps(records))

    facts = ["red", "blue", "green", "black", "white", "brown"]
    for index, client in enumerate(("ann", "bob", "cy")):
        own = [
            {"instruction": f"What is the {fact} rule?", "output": f"{client} says {fact}."}
            for fact in facts[: 3 + index]
        ]
        shared = [
            {"instruction": f"Which office is {fact}?", "output": f"The {fact} one.", "fact": fact}
            for fact in facts[index : index + (3 if client == "cy" else 4)]
        ]
        write(f"{client}_local.json", own)
        write(f"{client}_universal.json", shared)
    write(
        "universal_test.json",
        [
            {"instruction": f"Name the {fact} office.", "output": f"The {fact} one.", "fact": fact}
            for fact in facts
        ],
    )
    write(
        "conflict.json",
        [
            {
                "instruction": f"Tell me the {fact} rule.",
                "answers": {client: f"{client} says {fact}." for client in ("ann", "bob", "cy")},
            }
            for fact in facts[:3]
        ],
    )
    return project


@pytest.fixture(scope="session")
def embedder_name(tiny_project) -> str:
    """The tiny model as a sentence-embedding one, in the project: it tells a text from another."""
    folder = shutil.copytree(tiny_project / "model", tiny_project / "embedder")
    parts = [("", "models.Transformer"), ("1_Pooling", "models.Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder.name


def build_tiny_config(clients: tuple[str, ...] = ("ann", "bob"), **changes) -> Config:
    """Return the experiment of ``tiny_project``; ``changes`` name section and keys."""
    raw = {
        "experiment": {"name": "tiny", "seed": 7},
        "model": {"name": "model", "quantization": "none", "dtype": "float32"},
        "adapters": {
            "gate": "none",
            "global": {"rank": 4, "alpha": 8},
            "local": {"rank": 2, "alpha": 4},
        },
        "training": {
            "replay": 1.0,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_seq_length": 128,
            "global_epochs": 1,
            "local_epochs": 1,
        },
        "federated": {
            "num_rounds": 2,
            "clients": [
                {
                    "id": client,
                    "system_prompt": f"You are {client}.",
                    "local_train": f"{client}_local.json",
                    "local_test": f"{client}_local.json",
                    "universal_train": f"{client}_universal.json",
                }
                for client in clients
            ],
        },
        "data": {
            "universal_train": None,
            "universal_test": "universal_test.json",
            "conflict_test": None if len(clients) < 3 else "conflict.json",
            "on_lint_error": "warn",  # the tiny clients are tested on what they trained on
        },
        "evaluation": {"batch_size": 64, "max_new_tokens": 3, "interval": 2},
    }
    for section, values in changes.items():
        raw[section] = raw.get(section, {}) | values
    return parse_config(raw)


@pytest.fixture
def tiny_config() -> Config:
    return build_tiny_config()


@pytest.fixture
def federation(tiny_project, tmp_path) -> Federation:
    """Two clients over an in-process grid; the run directory is a new one."""
    from loopback import Federation

    return Federation(tiny_project, tmp_path / "results", build_tiny_config())


@pytest.fixture(scope="session")
def finished(tiny_project, tmp_path_factory) -> Federation:
    """The same federation after its run has ended, for all tests to read and none to change."""
    from loopback import Federation

    federation = Federation(tiny_project, tmp_path_factory.mktemp("finished"), build_tiny_config())
    federation.run()
    return federation


@pytest.fixture(scope="session")
def imported(tiny_project, tmp_path_factory) -> Path:
    """An evaluated run on imported data, which has no facts and no conflict questions."""
    from imported_run import import_table
    from loopback import Federation

    from fedlora_app.evaluation.choices import open_round
    from fedlora_app.evaluation.protocol import evaluate_round
    from fedlora_app.runs.reading import load_run

    project = shutil.copytree(tiny_project, tmp_path_factory.mktemp("imported") / "project")
    run = Federation(project, project / "results", import_table(project)).run()
    evaluate_round(open_round(load_run(run), project), lambda *_: None)
    return run


@pytest.fixture
def fedlora(capsys, monkeypatch):
    """Call the command as users type it: its status, and what it printed to both streams."""
    from fedlora_app import cli as command

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            command.main()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the command has as Ctrl-C
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def flower_identity() -> None:
    """Who Flower takes the sender of messages for that a test makes itself."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture
def unrendered(monkeypatch) -> None:
    """Figures are made and not rendered, which takes most of a report's time."""
    from fedlora_app.report import drawing

    monkeypatch.setattr(drawing, "save_plot", lambda figure, folder, name: "<svg></svg>")


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    from flower_process import Flower

    flower = Flower(tmp_path_factory.mktemp("flwr"))
    yield flower
    flower.stop()


@pytest.fixture(scope="module")
def tiny_experiment(tiny_project) -> Path:
    path = tiny_project / "flower.yaml"
    path.write_text(json.dumps(build_tiny_config().dump()))
    return path
