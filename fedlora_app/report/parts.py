"""What the sections of a page are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedlora_app.report import drawing

SHAPE_ERRORS = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What a file of another shape than expected raises when it is read."""


@dataclass(frozen=True)
class Plot:
    """A drawn figure, or why it is not there."""

    name: str
    svg: str = ""
    missing: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    caption: str = ""


@dataclass
class Section:
    """A part of the page; the lists of what it does not have stay empty."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    """Those that the questions can be filtered by; without any there is no filter."""
    code: list[tuple[str, str]] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)

    @property
    def blames(self) -> bool:
        """Whether an answer among the questions says which part failed."""
        return any(answer["failed"] for q in self.questions for answer in q["answers"])


class Plotter:
    """Draws figures, keeps them as PNG and SVG in ``folder``, and hands out the SVG."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def draw(self, name: str, make: Callable[[], Figure], caption: str = "") -> Plot:
        """Return the figure that ``make`` draws, or what keeps it from being drawn."""
        try:
            figure = make()
        except drawing.NothingToPlotError as error:
            return Plot(name, missing=str(error))
        except SHAPE_ERRORS as error:
            return Plot(
                name, missing=f"{name} cannot be drawn from what the files hold: {error!r}."
            )
        return Plot(name, drawing.save_plot(figure, self.folder, name), caption=caption)
