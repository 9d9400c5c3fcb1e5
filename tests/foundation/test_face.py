from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import fedlora_app

PACKAGES = [
    "fedlora_app",
    *(m.name for m in pkgutil.walk_packages(fedlora_app.__path__, "fedlora_app.") if m.ispkg),
]
HEAVY = {"torch", "transformers", "peft", "flwr", "datasets", "matplotlib", "pandas"}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_offered_name_is_there(name):
    package = importlib.import_module(name)
    for offered in getattr(package, "__all__", []):
        assert getattr(package, offered) is not None, offered
    assert package.__doc__


def test_what_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'fedlora_app\.config' has no attribute 'nothing'"):
        fedlora_app.config.nothing  # noqa: B018


def test_importing_a_package_imports_nothing_heavy():
    light = [name for name in PACKAGES if name != "fedlora_app.federation.rules"]  # it has code
    code = f"import sys, {', '.join(light)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
