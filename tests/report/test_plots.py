"""The plots: what is drawn, and what is said where there is nothing to draw."""

from __future__ import annotations

import inspect
import json

import pytest
from synthetic import write_run

import fedlora_app
from fedlora_app.report import drawing, plots
from fedlora_app.runs.history import load_history
from fedlora_app.runs.reading import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(write_run(tmp_path_factory.mktemp("runs") / "pair"))


@pytest.fixture(scope="module")
def history(run):
    return load_history(run)


def lines(figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}


def test_a_curve_holds_the_recorded_values_of_each_client(history):
    drawn = lines(plots.plot_loss(history))
    assert set(drawn) == {"client-00", "client-01", "client-02"}
    assert drawn["client-01"] == [1, 1 / 2, 1 / 3, 1 / 4]
    drawn = lines(plots.plot_accuracy(history, "local"))
    assert drawn["client-00"] == [0, 0.2, 0.5, 0.8, 1]


@pytest.mark.parametrize("kind", ["imported", "empty"])
@pytest.mark.parametrize("name", [n for n in fedlora_app.__all__ if n.startswith("plot_")])
def test_what_a_run_lacks_is_said_in_the_place_of_its_figure(name, kind, imported, history):
    """Imported data have no facts and no conflicts; a run that has just begun has nothing."""
    plot = getattr(fedlora_app, name)
    if kind == "empty":
        given, asked = history[:0], {"questions": [], "swap_table": [], "scales": {}}
    else:
        given, asked = load_history(imported), load_run(imported).evaluation
    takes_history = "history" in inspect.signature(plot).parameters
    shown = drawing.draw(plot, given if takes_history else asked)
    lacks = {"plot_accuracy", "plot_gate", "plot_local_scale"} if kind == "imported" else {name}
    assert isinstance(shown, drawing.Missing) == (name in lacks)
    if name in lacks:
        assert shown.why.endswith(".") and shown.why in shown._repr_html_().replace("&#x27;", "'")


def test_several_runs_are_drawn_as_means_over_their_clients(tmp_path, history):
    other = load_history(write_run(tmp_path / "one", mode="fedavg"))
    import pandas

    drawn = lines(plots.plot_update_norm(pandas.concat([history, other])))
    assert set(drawn) == {"pair", "one"} and drawn["one"] == pytest.approx([2, 1, 2 / 3, 0.5])


def test_many_clients_are_drawn_faint_with_their_mean(tmp_path):
    figure = plots.plot_loss(load_history(write_run(tmp_path / "many", num_clients=20)))
    assert "mean of 20 clients" in lines(figure)
    assert len(figure.axes[0].get_legend().get_texts()) == 1


def test_traffic_and_time_are_sums_over_the_clients(history):
    drawn = lines(plots.plot_traffic(history))
    assert drawn["clients to server"] == [3 * 360_000] * 4
    assert lines(plots.plot_seconds(history))["global phase"][1:] == [9.0] * 4


def test_global_alone_is_a_mark_and_no_part_of_the_curve(history):
    extra = history[history["metric"] == "global+local/conflict/exact_match"].tail(3).copy()
    extra["metric"], extra["value"] = "global/conflict/exact_match", 0.125
    import pandas

    drawn = lines(plots.plot_accuracy(pandas.concat([history, extra])))
    assert drawn.pop("global alone") == [0.125]
    assert all(values[-1] == 1 for values in drawn.values())


def test_the_swap_table_averages_over_clients(run):
    figure = plots.plot_swap_table(run.evaluation)
    texts = {text.get_text() for text in figure.axes[0].texts}
    rows = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert rows == list(plots.ANSWERERS.values())[:5] and "90" in texts


def test_the_matrix_of_clients_has_their_own_adapters_on_its_diagonal(run):
    figure = plots.plot_foreign_adapters(run.evaluation, "local")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["90", "40", "40", "40", "90", "40", "40", "40", "90"]


@pytest.mark.parametrize("name", [n for n in dir(plots) if n.startswith("plot_")])
def test_what_was_not_recorded_is_said(name, history):
    plot = getattr(plots, name)
    takes_history = "history" in inspect.signature(plot).parameters
    nothing = history[:0] if takes_history else {"swap_table": [], "scales": {}}
    with pytest.raises(drawing.NothingToPlotError):
        plot(nothing)


def test_names_that_look_like_formulas_or_markup_stay_text(tmp_path):
    history = load_history(write_run(tmp_path / "run"))
    history["client"] = history["client"].replace("client-00", "$x_1$<b>")
    svg = drawing.render_svg(plots.plot_loss(history), "loss")
    assert "$x_1$&lt;b&gt;" in svg


def test_the_same_figure_gives_the_same_bytes(history, tmp_path):
    for name in ("a", "b"):
        drawing.save_plot(plots.plot_loss(history), tmp_path / name, "loss")
    for ending in ("png", "svg"):
        assert (tmp_path / f"a/loss.{ending}").read_bytes() == (
            tmp_path / f"b/loss.{ending}"
        ).read_bytes()


def test_the_package_offers_every_plot():
    assert {n for n in fedlora_app.__all__ if n.startswith("plot_")} == {
        n for n in dir(plots) if n.startswith("plot_")
    }
    assert fedlora_app.plot_loss is plots.plot_loss
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        fedlora_app.plot_nothing  # noqa: B018


def test_a_history_is_read_from_the_events_before_a_round_is_complete(tmp_path, history):
    event = {"time": "t", "event": "metrics", "round": 1, "client": "ann", "phase": "global"}
    rows = [event | {"update_norm": 2.0}, {"time": "t", "event": "failure", "why": "no"}]
    text = "\n".join(map(json.dumps, rows)) + '\n{"time": "cut'
    (tmp_path / "metrics.jsonl").write_text(text)
    table = load_history(tmp_path)
    assert table[["client", "metric", "value"]].values.tolist() == [["ann", "update_norm", 2.0]]
