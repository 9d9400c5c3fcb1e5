"""The rules that keep the package readable, held by its syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fedlora_app"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__" and path.parent.name != "demo"
}
FLOWER_EDGE = {"client_app", "server_app", "strategy", "grid", "messages", "workers"}
LAYERS = [
    {"errors"},
    {"project", "seeds", "storage", "telemetry", "build_hook", "config", "progress", "memory"},
    {
        "config_file",
        "rounds",
        "tracking",
        "chat_template",
        "quantised_copy",
        "fingerprint",
        "host_embedding",
        "planning.memory",
        "planning.cards",
    },
    {"data", "run_directory", "evaluation.keywords", "evaluation.intervals", "evaluation.wording"},
    {
        "model",
        "tokens",
        "kernels",
        "aggregation",
        "aggregation_error",
        "adapters",
        "evaluation.questions",
    },
    {"packing", "losses", "adapter_files", "fused", "optimizer"},
    {
        "training",
        "gate",
        "saved_run",
        "resumption",
        "evaluation.comparison",
        "evaluation.comparison_text",
    },
    {"evaluation.scoring", "summary", "report.plots", "report.history", "report.template"},
    {"report.figures", "report.pieces"},
    {"report.evidence", "report.variants"},
    {"report.verdict", "report.sections"},
    {"report.page"},
    {"evaluation.metrics", "evaluation.score_store"},
    {"client_data"},
    {"client_evaluation", "evaluation.linter", "evaluation.matching", "saved_model"},
    {"evaluation.membership", "evaluation.answering", "conversation", "model_card"},
    {"export"},
    {"client", "messages", "evaluation.tables"},
    {"grid", "workers", "strategy", "evaluation.protocol", "evaluation.text"},
    {"client_app", "server_app", "study"},
    {"planning.sizes", "planning.workload", "planning.advice"},
    {"planning.plan"},
    {"planning.text"},
    {"importing.source", "importing.assignment"},
    {"importing.records"},
    {"importing.card"},
    {"importing.data_import"},
    {"terminal"},
    {"command"},
]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(f"{library}.") for name in imported(path))


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    level = next(i for i, layer in enumerate(LAYERS) if name in layer)
    allowed = set().union(*LAYERS[: level + 1])
    own = {n.removeprefix("fedlora_app.") for n in imported(MODULES[name])}
    assert own & set(MODULES) <= allowed


def test_flower_is_used_at_the_edge_and_peft_in_one_module():
    assert {name for name, path in MODULES.items() if uses(path, "flwr")} <= FLOWER_EDGE
    assert [name for name, path in MODULES.items() if uses(path, "peft")] == ["adapters"]


def test_the_server_cannot_load_a_base_model():
    for name in (
        *("server_app", "strategy", "run_directory", "aggregation", "aggregation_error"),
        *("summary", "tracking", "progress"),
    ):
        used = {n for n in imported(MODULES[name]) if n.startswith("fedlora_app.model.base")}
        assert used <= {"fedlora_app.model.base", "fedlora_app.model.base.build_empty_model"}
        assert "fedlora_app.client" not in imported(MODULES[name])


def test_flower_would_drop_no_module_from_its_bundle():
    for path in PACKAGE.rglob("*.py"):
        assert not path.stem.startswith("test_") and not path.stem.endswith("_test")


def test_nothing_unpickles_or_asserts_on_a_tuple():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                assert not isinstance(node.test, ast.Tuple), path
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"load_state_dict_from_url", "unsafe_load"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                assert (owner, node.func.attr) not in {("torch", "load"), ("pickle", "load")}, path
