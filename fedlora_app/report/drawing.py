"""The look of figures, how they are shown in a notebook, and how they are kept. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from html import escape
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedlora_app.foundation.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#24292f", "#d0d7de"
SERIES = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bc4c00", "#1b7c83", "#bf3989", "#6e7781")
SIZE = (4.6, 3.0)  # inches
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
}


class Drawing(Figure):
    """A figure that notebooks show by itself, whether or not they use pyplot."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        with rc_context(STYLE):
            self.savefig(image, format="png", dpi=110)
        return image.getvalue()


Plot = Callable[..., Figure]


class NothingToPlotError(ValueError):
    """What the plot shows was not recorded; the message says how it would be."""


@dataclass(frozen=True)
class Missing:
    """What a notebook shows in the place of a figure that cannot be drawn."""

    why: str

    def _repr_html_(self) -> str:
        return f'<p style="border: 1px dashed; padding: 1em">{escape(self.why)}</p>'


def draw(plot: Plot, *args: Any, **settings: Any) -> Figure | Missing:
    """Return the figure of one of the ``plot_*`` functions, or what the run lacks for it."""
    try:
        return plot(*args, **settings)
    except NothingToPlotError as error:
        return Missing(str(error))


def styled(plot: Plot) -> Plot:
    """Draw in this module's style without changing that of others."""

    @wraps(plot)
    def draw(*args: Any, **settings: Any) -> Figure:
        with rc_context(STYLE):
            return plot(*args, **settings)

    return draw


def new_figure(title: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """Return a figure of the usual width with its one pair of axes; ``height`` in inches."""
    figure = Drawing(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def render_svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG text, the same bytes for the same figure.

    Args:
        name: unique among the figures of a page, because an SVG's inner ids derive from it.
    """
    text = StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def save_plot(figure: Figure, folder: Path, name: str) -> str:
    """Write ``<name>.png`` and ``<name>.svg`` and return the SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, image = render_svg(figure, name), BytesIO()
    figure.set_layout_engine("none")  # what the first rendering found still holds
    with rc_context(STYLE):
        figure.savefig(image, format="png", dpi=144, metadata={"Software": None})
    # Whoever watches a run may write them at the moment in which the run itself does.
    write_atomically(folder / f"{name}.svg", svg)
    write_atomically(folder / f"{name}.png", image.getvalue())
    return svg
