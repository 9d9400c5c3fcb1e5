"""The public names of a package, imported when they are first asked for (PEP 562).

So that a command that needs none of them does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def offer(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], list[str]]:
    """Return the ``__getattr__`` and the ``__all__`` of a package.

    Args:
        names: what is offered, by the package's module that has it.
    """
    homes = {name: module for module, offered in names.items() for name in offered}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, sorted(homes)
