"""The plots of runs, each one a matplotlib figure. Needs no torch.

Curves take the table of ``load_history``, the others an ``evaluation.json``. One run is drawn with
a line per client, several runs with a line per run, the mean over its clients. Every figure
is small enough to be read on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from fedlora_app.data.questions import CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.answering import OPEN_ABOVE
from fedlora_app.evaluation.chance import describe_chance, read_chances
from fedlora_app.evaluation.evaluated_run import group_rows
from fedlora_app.evaluation.gate_report import GatedSet, read_gated_sets
from fedlora_app.evaluation.names import (
    ACCURACY,
    ANSWERERS,
    ASKED_SETS,
    CHANCE,
    EXACT_MATCH,
    MEASURES,
    QUESTION_SETS,
)
from fedlora_app.foundation.percent import format_percent
from fedlora_app.report.drawing import (
    INK,
    SERIES,
    SIZE,
    Drawing,
    NothingToPlotError,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

MOST_LINES = len(SERIES)  # more of them are drawn faint, with their mean
MOST_CELLS = 150  # a heat map of more has no figures in it
NUM_BINS = 20  # of a histogram
PHASES = {"global": "global phase", "local": "local phase", "global+local": "joint phase"}
MADE_BY = {
    UNIVERSAL: "They come with data.universal_test.",
    UNIVERSAL_UNSEEN: (
        "They are those of data.universal_test whose fact only other clients train on: test and "
        "training records need a `fact`."
    ),
    LOCAL_SET: "They come with a client's local_test.",
    CONFLICT: "They come with data.conflict_test.",
}
"""What it takes for a question set to be asked; with evaluation.interval: 0 none is."""
HEAT = LinearSegmentedColormap.from_list("heat", ["#f6f8fa", "#54aeff", "#0a3069"])


@styled
def plot_accuracy(
    history: pandas.DataFrame, question_set: str = "conflict", measure: str = "exact_match"
) -> Figure:
    """Draw a question set's accuracy by round, from the base model's in round 0.

    Args:
        measure: ``exact_match`` or ``rank_accuracy``.
    """
    ending = f"/{question_set}/{measure}"
    rows = history[history["metric"].str.endswith(ending) & (history["phase"] == "evaluate")]
    answering = rows["metric"].str.removesuffix(ending)
    # In the last round the global adapter is tried alone beside the pair; the pair is the curve.
    is_aside = (answering == "global") & rows.duplicated(["run", "round", "client"], keep=False)
    title = f"{QUESTION_SETS[question_set].label} questions"
    label = next(m.label for m in MEASURES.values() if m.reported == measure)
    if rows.empty:
        raise NothingToPlotError(f"No {title} were asked in this run. {MADE_BY[question_set]}")
    figure, axes = _plot_curves(history, rows[~is_aside], title, label)
    aside = rows[is_aside].groupby("run", as_index=False)[["round", "value"]].mean()
    if 0 < len(aside) <= MOST_LINES:
        label = "global alone" if len(aside) == 1 else "global alone, a mark per run"
        axes.plot(aside["round"], aside["value"], "x", color=INK, label=label, zorder=5)
        axes.legend(fontsize=7)
    chance = history["value"][history["metric"].str.endswith(f"/{question_set}/{CHANCE}")]
    if measure == ACCURACY.reported and not chance.empty:
        axes.axhline(chance.mean(), color=INK, linewidth=0.8, linestyle=":", label="chance")
        axes.legend(fontsize=7)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


@styled
def plot_loss(history: pandas.DataFrame, phase: str = "global") -> Figure:
    """Draw a phase's mean training loss by round; ``phase`` as in the history's column."""
    rows = _select(history, f"train_{phase}/train_loss")
    figure, axes = _plot_curves(
        history, rows, f"{PHASES[phase]}: training loss", "nats per answer token"
    )
    if not rows.empty and rows["value"].min() > 0:
        axes.set_yscale("log")
    return figure


@styled
def plot_update_norm(history: pandas.DataFrame) -> Figure:
    """Draw how far each client moves the global adapter, the norm of its update."""
    rows = _select(history, "update_norm")
    return _plot_curves(history, rows, "norm of the update that is sent", from_zero=True)[0]


@styled
def plot_aggregation_error(history: pandas.DataFrame) -> Figure:
    """Draw how far the new adapter's product is from the mean of the clients' ones, relatively."""
    rows = _select(history, "aggregation_error")
    title = "aggregation error: from the mean of the products"
    figure, axes = _plot_curves(history, rows, title, label="of the new product", from_zero=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@styled
def plot_update_cosine(history: pandas.DataFrame) -> Figure:
    """Draw how alike the clients' updates are, the mean cosine between two of them."""
    rows = _select(history, "update_cosine")
    title = "cosine between two clients' updates, mean"
    return _plot_curves(history, rows, title, from_zero=True)[0]


@styled
def plot_traffic(history: pandas.DataFrame) -> Figure:
    """Draw the bytes that all clients receive and send in a round; their sum for several runs."""
    rows = history[history["metric"].isin(["bytes_down", "bytes_up"])]
    names = {"bytes_down": "server to clients", "bytes_up": "clients to server"}
    sums = rows.groupby(["run", "metric", "round"], as_index=False)["value"].sum()
    sums["client"] = sums["metric"].map(names)
    if _has_several(history):
        sums = sums.groupby(["run", "round"], as_index=False)["value"].sum()
    figure, axes = _plot_curves(history, sums, "traffic of a round, all clients", from_zero=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    return figure


@styled
def plot_seconds(history: pandas.DataFrame) -> Figure:
    """Draw the time of each part of a round, the sum over the clients."""
    names = {"evaluation_seconds": "evaluation", "aggregation_seconds": "aggregation"}
    names |= {f"train_{phase}/seconds": label for phase, label in PHASES.items()}
    rows = history[history["metric"].isin(names)]
    sums = rows.groupby(["run", "metric", "round"], as_index=False)["value"].sum()
    sums["client"] = sums["metric"].map(names)
    title = "seconds of a round, all clients"
    if _has_several(history):
        sums = sums.groupby(["run", "round"], as_index=False)["value"].sum()
    return _plot_curves(history, sums, title, from_zero=True)[0]


@styled
def plot_memory(history: pandas.DataFrame) -> Figure:
    """Draw the peak memory of a client's process: of the GPU, or resident on a CPU."""
    rows = history[history["metric"].str.endswith("peak_memory_bytes")]
    columns = ["run", "client", "round"]
    highest = rows.groupby(columns, as_index=False)["value"].max()
    figure, axes = _plot_curves(
        history, highest, "peak memory of the client's process", from_zero=True
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    return figure


@styled
def plot_swap_table(evaluation: dict[str, Any], measure: str = "exact_match") -> Figure:
    """Draw which adapters answer which questions, means over the clients."""
    values: dict[tuple[str, str], list[float]] = {}
    for who, found in group_rows(evaluation).items():
        for row in found:
            if row.get(measure) is not None:
                values.setdefault((who, row["question_set"]), []).append(row[measure])
    rows = [who for who in ANSWERERS if any(who == key[0] for key in values)]
    columns = [name for name in QUESTION_SETS if any(name == key[1] for key in values)]
    means = [[_mean(values.get((who, name))) for name in columns] for who in rows]
    title = "who answers what, mean over clients"
    if measure != EXACT_MATCH.name:
        title = f"who answers what: {MEASURES[measure].label}"
    chances = read_chances(evaluation) if measure == ACCURACY.name else {}
    labels = [
        QUESTION_SETS[name].label.replace(", ", ",\n")
        + describe_chance(chances, name, lead="\n").replace("chance ", "chance\n")
        for name in columns
    ]
    return _plot_heat(means, [ANSWERERS[who] for who in rows], labels, title)


@styled
def plot_foreign_adapters(
    evaluation: dict[str, Any], question_set: str = "local", measure: str = "exact_match"
) -> Figure:
    """Draw each client's questions (rows) under each client's local adapter (columns)."""
    values = {}
    for row in evaluation["swap_table"]:
        owner = row["adapters"].partition(":")[2]
        is_pair = row["adapters"].startswith(("global+local:", "local:"))
        if is_pair and row["scale"] == 1.0 and row["question_set"] == question_set:
            key = (row["client"], owner)
            if row["adapters"].startswith("global") or key not in values:
                values[key] = row[measure]
    clients = sorted({client for client, _ in values})
    table = [[values.get((client, owner)) for owner in clients] for client in clients]
    asked = QUESTION_SETS[question_set].label + _by(measure)
    title = f"{asked}: asked of (row), adapter of (column)"
    return _plot_heat(table, clients, clients, title)


@styled
def plot_local_scale(evaluation: dict[str, Any], measure: str = "exact_match") -> Figure:
    """Draw validation accuracy by the scale of the local adapter (lambda), means over clients."""
    scales = evaluation["scales"]
    if not scales:
        raise NothingToPlotError(
            "No scale of the local adapter was tried: this mode has none, or there are no "
            "validation files (data.conflict_validation, a client's local_validation)."
        )
    title = f"validation questions by scale of the local adapter{_by(measure)}"
    figure, axes = new_figure(title)
    for colour, name in zip(SERIES, ASKED_SETS, strict=False):
        points: dict[float, list[float]] = {}
        for entry in scales.values():
            for point in entry["curve"]:
                value = point.get(MEASURES[measure].extend(name))
                if value is not None:
                    points.setdefault(point["scale"], []).append(value)
        if points:
            xs = sorted(points)
            axes.plot(
                xs,
                [_mean(points[x]) for x in xs],
                "o-",
                color=colour,
                label=QUESTION_SETS[name].label,
            )
    for chosen in sorted({entry["chosen"] for entry in scales.values()}):
        axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate("chosen", (chosen, 0.02), fontsize=7, rotation=90, ha="right")
    axes.set_xlabel("scale (lambda)")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend()
    return figure


@styled
def plot_gate(evaluation: dict[str, Any]) -> Figure:
    """Draw how far the clients' gates open, a histogram for the questions of each set.

    Blue where a question is on the side that it should be on, red where it is not.
    """
    sets = list(read_gated_sets(evaluation).values())
    if not sets:
        raise NothingToPlotError(
            "No gate answered in this evaluation: adapters.gate is none, the mode has no pair of "
            "adapters, or an earlier version wrote evaluation.json."
        )
    num_columns = min(2, len(sets))
    num_rows = -(-len(sets) // num_columns)
    figure = Drawing(figsize=(SIZE[0], 0.5 + 1.55 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for position, (axes, gated) in enumerate(zip(panels.flat, sets, strict=False)):
        _draw_openness(axes, gated)
        axes.tick_params(labelbottom=position + num_columns >= len(sets))  # none below it
    for axes in panels.flat[len(sets) :]:
        axes.set_visible(False)
    title = {"x": 0.01, "ha": "left", "fontsize": 9.5, "fontweight": "bold"}
    figure.suptitle("how far the gates open; red: on the wrong side", **title)
    figure.supxlabel("0: closed, global alone      1: open, with the local adapter", fontsize=8)
    figure.supylabel("share of questions", fontsize=8)
    return figure


def _draw_openness(axes: Axes, gated: GatedSet) -> None:
    values = gated.values
    edges = [i / NUM_BINS for i in range(NUM_BINS + 1)]
    sides = [[v for v in values if (v > OPEN_ABOVE) is is_open] for is_open in (False, True)]
    for side, is_open in zip(sides, (False, True), strict=True):
        colour = SERIES[0] if is_open is gated.is_own else SERIES[1]
        axes.hist(side, edges, weights=[1 / len(values)] * len(side), color=colour)
    axes.axvline(OPEN_ABOVE, color=INK, linewidth=0.8, linestyle=":")
    share = format_percent(gated.share_open(), digits=None, unit=" %")
    title = f"{gated.label}\nopen for {share} of {len(values)}"
    axes.set_title(title, fontsize=8.5, fontweight="normal")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, OPEN_ABOVE, 1], ["0", f"{OPEN_ABOVE:g}", "1"])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def format_bytes(value: float) -> str:
    """Return "1.4 MB" and the like, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _plot_curves(
    history: pandas.DataFrame,
    rows: pandas.DataFrame,
    title: str,
    label: str = "",
    from_zero: bool = False,
) -> tuple[Figure, Axes]:
    """Draw value by round: a line per client of one run, or per run of several in the history."""
    if rows.empty:
        raise NothingToPlotError(f"Not recorded in this run: {title}.")
    figure, axes = new_figure(title)
    by = "run" if _has_several(history) else "client"
    table = rows.pivot_table(index="round", columns=by, values="value", aggfunc="mean")
    if len(table.columns) <= MOST_LINES:
        for colour, name in zip(SERIES, table.columns, strict=False):
            # An underscore at its beginning would keep a name out of the legend.
            shown = f" {name}" if str(name).startswith("_") else str(name)
            axes.plot(table.index, table[name], "o-", color=colour, label=shown)
        if len(table.columns) > 1 or by == "run":
            axes.legend()
    else:
        for name in table.columns:
            axes.plot(table.index, table[name], color=SERIES[0], alpha=0.25, linewidth=0.6)
        if by == "client":  # runs may be of several modes, whose mean would mean nothing
            mean = f"mean of {len(table.columns)} clients"
            axes.plot(table.index, table.mean(axis=1), color=SERIES[1], label=mean)
            axes.legend()
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(table.index) == 1:  # else there are fractions of rounds around it
        axes.set_xticks(table.index)
    if from_zero:
        axes.set_ylim(bottom=0)
    return figure, axes


def _plot_heat(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Figure:
    if not rows or not columns:
        raise NothingToPlotError(f"Not in this evaluation: {title}.")
    table = [[float("nan") if v is None else v for v in row] for row in values]
    annotated = len(rows) * len(columns) <= MOST_CELLS
    height = 1.1 + 0.32 * len(rows) if annotated else 4.4
    figure, axes = new_figure(title, height)
    axes.pcolormesh(table, cmap=HEAT, vmin=0, vmax=1, edgecolors="face", linewidth=0.2)
    axes.grid(False)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not annotated:
        axes.set_xlabel(f"{len(columns)} clients")
        axes.set_ylabel(f"{len(rows)} clients")
        return figure
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    if max(len(line) for name in columns for line in name.split("\n")) * len(columns) > 60:
        axes.tick_params(axis="x", rotation=60)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                colour = "#ffffff" if value > 0.6 else "#1f2328"
                text = format_percent(value, digits=0)
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour)
    return figure


def _by(measure: str) -> str:
    """Return by what answers are judged, where it is not word for word."""
    return "" if measure == EXACT_MATCH.name else f", {MEASURES[measure].label}"


def _has_several(history: pandas.DataFrame) -> bool:
    return history["run"].nunique() > 1


def _select(history: pandas.DataFrame, metric: str) -> pandas.DataFrame:
    return history[history["metric"] == metric]


def _mean(values: Iterable[float] | None) -> float | None:
    values = list(values or [])
    return sum(values) / len(values) if values else None
