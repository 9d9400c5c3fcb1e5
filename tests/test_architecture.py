"""The rules that keep the package readable, held by its syntax trees."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fedlora_app"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem != "__init__"
}
ORDER = [
    *("foundation", "config", "model", "data", "training"),
    *("federation", "runs", "evaluation", "attacks", "report", "planning", "serving", "deployment"),
    *(
        "preflight",
        "client_checks",
        "client",
        "rescaling",
        "adaptation",
        "forgetting",
        "strategy",
        "client_app",
        "server_app",
    ),
    *("launch", "study", "demo", "cli"),
]
"""Packages and the root's modules; each imports from itself and from what stands before it."""
FLOWER_EDGE = {"client_app", "server_app", "strategy", "federation", "deployment"}


def place(name: str) -> str:
    """The package, or the module in the root, that a module belongs to."""
    return name.split(".")[0]


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


def test_the_root_holds_nothing_but_what_is_named():
    found = {path.stem for path in PACKAGE.glob("*") if path.is_dir() or path.suffix == ".py"}
    assert found - {"__init__", "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    used = {
        place(n.removeprefix("fedlora_app."))
        for n in imported(MODULES[name])
        if n.startswith("fedlora_app.")
    }
    assert used & set(ORDER) <= set(ORDER[: ORDER.index(place(name)) + 1])


def test_no_two_modules_import_each_other():
    graph = {
        name: {n.removeprefix("fedlora_app.") for n in imported(path)} & set(MODULES)
        for name, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_flower_is_used_at_the_edge_and_peft_in_one_module():
    assert {place(name) for name, path in MODULES.items() if uses(path, "flwr")} <= FLOWER_EDGE
    peft = [name for name, path in MODULES.items() if uses(path, "peft")]
    assert peft == ["model.adapters"]


def test_the_server_cannot_load_a_base_model():
    for name in ("server_app", "strategy", *(n for n in MODULES if place(n) == "federation")):
        used = imported(MODULES[name])
        assert not used & {"fedlora_app.model.base.load_base_model", "fedlora_app.client"}, name


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
