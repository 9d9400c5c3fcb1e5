"""How far what a new adapter does is from what it should do, module by module and together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ProductErrors:
    """Frobenius norms by module: of an error, and of the product B A that it is an error of."""

    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def note(self, module: str, error: float, size: float) -> None:
        """Enter one module."""
        self.errors[module], self.sizes[module] = error, size

    @property
    def by_module(self) -> dict[str, float | None]:
        """Each module's error relative to its product.

        None stands for a product of 0 with an error that is not.
        """
        return {module: self._divide([module]) for module in self.errors}

    @property
    def by_group(self) -> dict[str, float | None]:
        """The same of all layers' modules of one kind together, such as ``q_proj``."""
        groups = defaultdict(list)
        for module in self.errors:
            groups[module.rsplit(".", 1)[-1]].append(module)
        return {group: self._divide(modules) for group, modules in sorted(groups.items())}

    @property
    def total(self) -> float | None:
        """The same of all modules together; None of none."""
        return self._divide(self.errors) if self.errors else None

    def _divide(self, modules: Iterable[str]) -> float | None:
        modules = list(modules)
        error = math.hypot(*(self.errors[module] for module in modules))
        size = math.hypot(*(self.sizes[module] for module in modules))
        if error == 0:
            return 0.0
        return error / size if size > 0 else None
