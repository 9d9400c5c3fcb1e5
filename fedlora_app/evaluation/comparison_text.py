"""A comparison of runs as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from fedlora_app.evaluation.chance import describe_chance
from fedlora_app.evaluation.comparison import TOPICS
from fedlora_app.evaluation.names import ACCURACY, FIGURES, LEAKAGE, figure_key, shown_measures
from fedlora_app.foundation.percent import format_n, format_percent
from fedlora_app.foundation.terminal import WIDTH, render_table


def describe_comparison(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as text: what speaks against it first, then the tables."""
    runs, groups = comparison["runs"], comparison["groups"]
    differences = comparison["differences"]
    blocks = [_itemise("NOT LIKE FOR LIKE", comparison["not_comparable"])]
    blocks.append(_render_runs(runs))
    blocks.append(_render_figures("Percent right [95 % interval]", runs))
    blocks.append(_render_keyword_rule(runs))
    if groups:
        title = "Means over seeds, percent right [95 %: the wider of seeds' and facts' interval]"
        names = [run["name"] for run in runs]
        blocks.append(_render_figures(title, [_name_group(group, names) for group in groups]))
    for name in dict.fromkeys(entry["run"] for entry in differences):
        blocks.append(_render_differences([entry for entry in differences if entry["run"] == name]))
    if differences:
        blocks.append(textwrap.fill(_explain(len(differences)), WIDTH))
    blocks.append(_itemise("Notes", comparison["notes"]))
    return "\n\n".join(block for block in blocks if block)


def _name_group(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Call a group by its members' numbers in the table of runs."""
    numbers = ", ".join(str(names.index(name) + 1) for name in group["runs"])
    return {**group, "name": f"{group['label']}: runs {numbers}"}


def _render_runs(runs: list[dict[str, Any]]) -> str:
    table = Table("", title="Runs; the first is the reference")
    for heading in ("run", "mode"):
        table.add_column(heading, overflow="fold")
    for heading in ("seed", "round", "steps", "parameters"):
        table.add_column(heading, justify="right")
    for number, run in enumerate(runs, 1):
        counts = (f"{run[key]:,}" for key in ("num_steps", "num_parameters"))
        words = (run["name"], run["mode"], str(run["seed"]), str(run["round"]))
        table.add_row(str(number), *words, *counts)
    return render_table(table)


def _render_figures(title: str, entries: list[dict[str, Any]]) -> str:
    table = Table("", title=title)
    measures = shown_measures()
    for measure in measures:
        table.add_column(measure.label, justify="right", no_wrap=True)
        table.add_column("n/\nfacts", justify="right", no_wrap=True)
    for figure in (*(topic.figure for topic in TOPICS), LEAKAGE):
        keys = [figure_key(figure, measure) for measure in measures]
        rows = [[entry["figures"].get(key) for key in keys] for entry in entries]
        if not any(found and found["n"] for row in rows for found in row):
            continue
        table.add_section()
        by_chance = _describe_chances(entries, figure)
        beside = (cell for m in measures for cell in (by_chance * (m is ACCURACY), ""))
        table.add_row(FIGURES[figure], *beside)
        for entry, row in zip(entries, rows, strict=True):
            table.add_row(f"  {entry['name']}", *_format_figures(row))
    return render_table(table)


def _describe_chances(entries: Iterable[Mapping[str, Any]], figure: str) -> str:
    """Return how often guessing ranks first, of all runs that were asked the same."""
    found = (describe_chance(entry.get("chances") or {}, figure) for entry in entries)
    return " or ".join(dict.fromkeys(filter(None, found)))


def _render_keyword_rule(runs: list[dict[str, Any]]) -> str:
    keys = ("keyword_pass_rate", "keyword_ceiling")
    rows = {run["name"]: [run["figures"].get(key) for key in keys] for run in runs}
    if not any(figure and figure["n"] for row in rows.values() for figure in row):
        return ""
    table = Table("", title="Keyword rule beside its ceiling, the pass rate of right answers, %")
    for heading in ("passed", "n/\nfacts", "ceiling", "n/\nfacts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *_format_figures(row))
    return render_table(table)


def _render_differences(entries: list[dict[str, Any]]) -> str:
    """Return the table of one run's differences from the reference."""
    run, reference = entries[0]["run"], entries[0]["reference"]
    table = Table("", title=f"{run} minus {reference}, percentage points")
    for heading in ("difference [95 %]", "only run", "only ref.", "n/facts", "p", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for topic in dict.fromkeys(entry["topic"] for entry in entries):
        table.add_section()
        table.add_row(topic)
        for entry in (entry for entry in entries if entry["topic"] == topic):
            difference = _format_estimate(entry["difference"], "+")
            counts = [str(entry[key]) for key in ("only_run", "only_reference")]
            counts.append(_format_n(entry))
            p_values = (_format_p(entry[key]) for key in ("p_value", "p_value_holm"))
            mark = " *" if entry.get("leads") else ""
            table.add_row(f"  {entry['scored_by']}{mark}", difference, *counts, *p_values)
    return render_table(table)


def _explain(num_tests: int) -> str:
    return (
        "* is what the questions are judged by: the greedy answer word for word, or the ranking "
        "where most right answers are long or free, so that few can match whatever was learnt. "
        "Differences are over the same questions. Only run and only ref. count the questions that "
        "one of the two got right more often, at one client or over all. Intervals and p, a test "
        "that flips the signs of whole facts, do not take paraphrases of a fact as independent; "
        f"p (Holm) is adjusted for the {num_tests} tests shown. They tell these trained models "
        "apart, not their methods: for that, train each method with several seeds."
    )


def _format_figures(figures: Iterable[dict[str, Any] | None]) -> Iterable[str]:
    for figure in figures:
        yield from (_format_estimate(figure), _format_n(figure)) if figure else ("-", "")


def _format_n(figure: Mapping[str, Any]) -> str:
    return format_n(figure["n"], figure.get("facts"))


def _format_estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return format_percent(value, low, high, sign=sign) or "-"


def _format_p(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _itemise(heading: str, sentences: Sequence[str]) -> str:
    lines = [
        textwrap.fill(
            sentence,
            WIDTH,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for sentence in sentences
    ]
    return "\n".join([f"{heading}:", *lines]) if lines else ""
