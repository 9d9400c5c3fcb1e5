"""The report: what its first screen says, and that no run and no text can break it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from conftest import build_tiny_config
from loopback import Federation
from synthetic import write_run

from fedlora_app.evaluation.reported import collect_reports, judge_conflicts
from fedlora_app.report.numbers import measure_run
from fedlora_app.report.page import write_comparison, write_report
from fedlora_app.report.verdict import BOTH
from fedlora_app.runs.history import read_history
from fedlora_app.runs.paths import RunDirectoryError


class Page(HTMLParser):
    """Collects what a page would fetch, its tags and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """An evaluated run with its report, its plots rendered."""
    run = write_run(tmp_path_factory.mktemp("reported") / "run")
    write_report(run)
    return run


def test_a_page_fetches_nothing_and_runs_only_its_own_script(reported):
    path = reported / "report.html"
    page, html = read(path), path.read_text()
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html and "script-src 'sha256-" in html
    assert page.tags.count("script") == 1 and "unsafe-inline'; script" in html


def test_the_first_screen_says_what_the_evaluation_holds(reported):
    run, page = reported, read(reported / "report.html")
    rate = json.loads((run / "evaluation.json").read_text())["summary"]["conflict_pass_rate"]
    right = round(rate["value"] * rate["n"])
    assert f"to {right} of {rate['n']} conflict questions" in page.text
    assert f"95 % interval {100 * rate['low']:.0f} to {100 * rate['high']:.0f}" in page.text
    assert f"num-supernodes=3\" --run-config \"config='{run / 'config.json'}'" in page.text
    for name in ("answers", "training", "conflicts", "costs", "data", "provenance"):
        assert f"#{name}" in page.links


def test_a_run_that_learned_nothing_shows_no_green_row(tmp_path, unrendered):
    run = write_run(tmp_path / "run", evaluated=False)
    page = write_report(run).read_text()
    assert 'class="best"' in page and "Nothing was learned" not in page
    history = json.loads((run / "history.json").read_text())
    for entry in history:
        right = ("exact_match", "rank_accuracy")
        entry["metrics"] |= {k: 0.0 for k in entry["metrics"] if k.endswith(right)}
    (run / "history.json").write_text(json.dumps(history))
    page = write_report(run).read_text()
    assert 'class="best"' not in page
    assert "Nothing was learned yet, and the training loss is still falling." in page


def test_plots_are_kept_as_png_and_svg(reported):
    folder = reported / "plots"
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.svg")}
    assert {"swap_table", "foreign_adapters_local", "local_scale", "accuracy_conflict"} <= names
    assert {"loss_global", "update_norm", "aggregation_error", "traffic", "seconds"} <= names


def test_where_the_ranking_leads_plots_and_means_are_by_it(tmp_path):
    """Word for word everything would be 0 whatever was learnt."""
    for seed in (1, 2):
        run = write_run(tmp_path / f"run{seed}", num_conflicts=3)
        for name in ("history.json", "evaluation.json"):
            text = (run / name).read_text().replace('exact_match": true', 'exact_match": false')
            (run / name).write_text(re.sub(r'exact_match": [\d.]+', 'exact_match": 0.0', text))
        history = json.loads((run / "history.json").read_text())
        for entry in history:
            sizes = {k: v for k, v in entry["metrics"].items() if k.endswith("/n")}
            entry["metrics"] |= {f"{key}_open": value for key, value in sizes.items()}
        (run / "history.json").write_text(json.dumps(history))
        evaluation = json.loads((run / "evaluation.json").read_text())
        evaluation["leading"] = dict.fromkeys(("universal", "local", "conflict"), "accuracy")
        evaluation["seed"] = seed
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        page = write_report(run)
        assert "Right answers that are ranked first" in page.read_text()
        svgs = {path.stem: path.read_text() for path in (run / "plots").glob("*.svg")}
        assert "swap_table_accuracy" in svgs
        assert "local, ranked first" in svgs["foreign_adapters_local"]
        assert "local adapter, ranked first" in svgs["local_scale"]
    page = write_comparison([tmp_path / "run1", tmp_path / "run2"], tmp_path / "both.html")
    assert "conflict, every client, ranked first" in read(page).text
    curve = (tmp_path / "both_plots" / "accuracy_conflict.svg").read_text()
    assert "ranked first" in curve


def test_text_from_data_is_escaped(tmp_path):
    evil = "<script>alert({})</script><img src=x onerror=alert(1)>&amp; $x$"
    run = write_run(tmp_path / "run", question=evil)
    config = json.loads((run / "config.json").read_text())
    config["model"]["name"] = "<b>model</b></script>"
    (run / "config.json").write_text(json.dumps(config))
    page = read(write_report(run))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert "<script>alert(3)</script>" in page.text and "<b>model</b>" in page.text


@pytest.mark.parametrize(
    "name", ["config.json", "manifest.json", "history.json", "evaluation.json"]
)
def test_a_damaged_run_still_has_a_report(tmp_path, unrendered, name):
    other = write_run(tmp_path / "other", num_conflicts=3)
    for number, content in enumerate([None, "[1, 2", '{"rounds": 5}', "[]"]):
        run = write_run(tmp_path / f"run{number}", num_conflicts=3)
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_text(content)
        text = read(write_report(run)).text
        assert name in text or "evaluation" in text or "Not recorded" in text
    comparison = write_comparison([run, other], tmp_path / "both.html")
    assert "2 runs side by side" in read(comparison).text


@pytest.mark.parametrize("key", ["swap_table", "questions", "summary", "scales", "answering"])
@pytest.mark.parametrize("value", [None, [5], {"a": 1}])
def test_an_evaluation_of_another_shape_does_not_stop_the_report(tmp_path, unrendered, key, value):
    run = write_run(tmp_path / "run", num_conflicts=2)
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {key: value}))
    assert "Training" in read(write_report(run)).text


def test_a_run_that_stopped_says_so(tmp_path, unrendered):
    run = write_run(tmp_path / "run", evaluated=False)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"finished": None, "rounds": manifest["rounds"][:2]}
    manifest["rounds"][1]["failures"] = {"client-01": "out of memory"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = read(write_report(run)).text
    assert "The run has not finished: of 4 rounds round 1 the last complete." in text
    assert "Round 1 continued without client-01: out of memory" in text
    assert "Not evaluated yet" in text and f"fedlora evaluate {run}" in text


def test_a_run_without_a_complete_round_has_done_none(tmp_path, unrendered):
    runs = [write_run(tmp_path / name, evaluated=False) for name in ("begun", "done")]
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    (runs[0] / "manifest.json").write_text(json.dumps(manifest | {"finished": None, "rounds": []}))
    text = read(write_comparison(runs, tmp_path / "both.html")).text
    assert "none of 4" in text and "4 of 4" in text and "None" not in text


def test_what_was_found_wrong_with_the_data_is_said_by_whoever_looked(tmp_path, unrendered):
    run = write_run(tmp_path / "evaluated")
    assert "fedlora check found nothing wrong" in read(write_report(run)).text
    run = write_run(tmp_path / "run", evaluated=False)
    assert "Registration found nothing wrong" in read(write_report(run)).text
    (run / "manifest.json").unlink()
    assert "found nothing wrong" not in read(write_report(run)).text


def test_a_client_alone_has_no_plot_of_other_clients_adapters(tmp_path, unrendered):
    for count in (1, 2):
        text = read(write_report(write_run(tmp_path / f"run{count}", count))).text
        assert f"4 rounds, {count} client{'s' * (count > 1)}, seed" in text
        assert ("another client's adapter in its place" in text) == (count > 1)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"federated": "x"}),
        ("config.json", {"federated": {"clients": ["ann"], "num_rounds": "eight"}}),
        ("manifest.json", {"rounds": [{}, 1, {"round": 1, "failures": []}], "clients": [1]}),
        ("manifest.json", {"rounds": [{"round": 2, "seconds": "long"}]}),
        ("history.json", [{"round": 1}]),
    ],
)
def test_parts_of_another_shape_are_named(tmp_path, unrendered, name, content):
    run = write_run(tmp_path / "run", evaluated=False)
    (run / name).write_text(json.dumps(content))
    text = read(write_report(run)).text
    assert "is damaged" in text and name.split(".")[0] in text


def test_a_text_that_is_no_unicode_is_shown_as_far_as_it_goes(tmp_path, unrendered):
    run = write_run(tmp_path / "run", question="a lone \ud800 surrogate {}")
    assert "a lone ? surrogate" in read(write_report(run)).text


def test_events_that_are_cut_inside_a_character_are_read_up_to_there(tmp_path, unrendered):
    run = write_run(tmp_path / "run", evaluated=False)
    (run / "history.json").unlink()
    event = {"time": "t", "event": "metrics", "round": 1, "client": "ann", "phase": "global"}
    line = json.dumps(event | {"update_norm": 1.0}).encode()
    (run / "metrics.jsonl").write_bytes(line + b'\n{"why": "\xc3')
    assert [entry["client"] for entry in read_history(run)] == ["ann"]
    assert "Training" in read(write_report(run)).text


def test_long_answers_do_not_make_long_pages(tmp_path, unrendered):
    run = write_run(tmp_path / "run", 20, 2, 60, question="word " * 2000 + "{}")
    assert write_report(run).stat().st_size < 6e6


def test_an_evaluation_of_another_round_is_left_out(tmp_path, unrendered):
    run = write_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"round": 2}))
    assert "evaluation.json is of round 2" in read(write_report(run)).text


def test_runs_of_one_name_are_told_apart(tmp_path, unrendered):
    runs = [write_run(tmp_path / folder / "run") for folder in ("a", "b")]
    text = read(write_comparison(runs, tmp_path / "page.html")).text
    assert "a/run" in text and "b/run" in text


@pytest.mark.slow
def test_a_page_elsewhere_has_its_own_plots_and_is_private(tmp_path):
    run = write_run(tmp_path / "run", num_clients=1, num_rounds=1, evaluated=False)
    page = write_report(run, tmp_path / "pages" / "mine.html")
    assert (tmp_path / "pages" / "mine_plots" / "seconds.png").exists()
    assert page.stat().st_mode & 0o77 == 0
    (tmp_path / "folder").mkdir()
    assert write_report(run, tmp_path / "folder") == tmp_path / "folder" / "report.html"


@pytest.mark.minutes
@pytest.mark.slow
def test_a_large_run_gives_a_page_under_10_megabytes(tmp_path):
    run = write_run(tmp_path / "run", num_clients=50, num_rounds=100, num_conflicts=300)
    assert write_report(run).stat().st_size < 10e6
    shown = re.search(r"(\d+) of 300 questions are shown", read(run / "report.html").text)
    assert shown and 50 < int(shown[1]) < 300


def test_a_comparison_links_the_runs_and_says_what_differs(tmp_path, unrendered):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", mode="fedavg", right=0.2)]
    for run in runs:
        write_report(run)
    page = read(write_comparison(runs, tmp_path / "report.html"))
    assert "Two adapters beat one averaged adapter on conflict questions" in page.text
    assert {"a/report.html", "b/report.html"} <= set(page.links)
    assert "b answers with 100 adapter parameters" in page.text


def test_a_run_ends_with_its_report(tiny_project, tmp_path, capsys):
    config = build_tiny_config(("ann", "bob", "cy"), federated={"num_rounds": 1})
    run = Federation(tiny_project, tmp_path / "results", config).run("run", report=True)
    assert f"Report: {run / 'report.html'}" in capsys.readouterr().out.splitlines()[-1]
    assert (run / "report.html").exists() and (run / "plots" / "traffic.png").exists()
    found = measure_run(read_history(run), None)
    passes = list(judge_conflicts(collect_reports(read_history(run)), "global+local").values())
    assert found[BOTH].passed().value == sum(passes) / len(passes)
    assert {"base", "global", BOTH} == set(found)
    text = read(run / "report.html").text
    assert "Not evaluated yet" in text and "conflict questions" in text
