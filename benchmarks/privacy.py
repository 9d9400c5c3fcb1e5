"""How much less an update gives away under each setting: a table over attacked and evaluated runs.

Of every setting the mean over seeds and clients of the attacks with a client's own update (over all
rounds), and what the setting costs: questions answered rightly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora_app.attacks.results import (
    AVERAGE,
    FACTS,
    HEADLINES,
    OTHERS,
    OWN,
    PRIVATE,
    QUESTION,
    UPDATE,
    choose_headline,
    choose_token_attack,
    group,
)
from fedlora_app.data.questions import LOCAL_ANSWERS, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN
from fedlora_app.evaluation.evaluated_run import chosen_rows
from fedlora_app.evaluation.names import EXACT_MATCH
from fedlora_app.evaluation.statistics import over_seeds
from fedlora_app.foundation.terminal import shell
from fedlora_app.runs.paths import RunDirectoryError, RunPaths

COLUMNS = {
    f"{FACTS}/{UPDATE}": "which facts",
    f"{FACTS}/{OTHERS}": "facts, by others'",
    f"{FACTS}/{AVERAGE}": "facts, by the mean",
    f"{UNIVERSAL}/{UPDATE}": "wording",
    f"{LOCAL_ANSWERS}/{UPDATE}": "local answers",
    f"{LOCAL_ANSWERS}/{OTHERS}": "local answers, by others'",
    f"{LOCAL_ANSWERS}/{AVERAGE}": "local answers, by the mean",
    "tokens": "tokens",
    f"given/{OWN}": "says own facts",
    f"given/{PRIVATE}": "says own local",
    f"right/{UNIVERSAL}": "universal right",
    f"right/{UNIVERSAL_UNSEEN}": "never seen right",
    f"right/{LOCAL_SET}": "local right",
}
SEED = re.compile(r"-seed\d+$")


def measure(runs: Sequence[Path]) -> dict[str, Any]:
    """Return a row per setting, of runs that are called ``<setting>-seed<N>``.

    Raises:
        RunDirectoryError: a run was not attacked.
    """
    by_setting: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        figures = _read(run)
        by_setting.setdefault(SEED.sub("", run.name), []).append(figures)
    return {
        "rows": [
            {"setting": setting, "seeds": len(seeds), **_average(seeds)}
            for setting, seeds in by_setting.items()
        ]
    }


def describe(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    headings = ["setting", "seeds", *COLUMNS.values()]
    lines = [
        "AUC, % (50 is chance), with a client's own update over all rounds unless a column says "
        "otherwise; answers that the model of the last update gives word by word when it is asked "
        "the question; and test questions that clients answer rightly with their own adapters. "
        "Means over seeds and clients, with Student's interval over three seeds and more.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for row in result["rows"]:
        cells = [_show(row[name]) for name in COLUMNS]
        lines.append(f"| {row['setting']} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(run: Path) -> dict[str, float]:
    path = RunPaths(run).attack
    if not path.is_file():
        raise RunDirectoryError(f"{path} is not there. Make it: fedlora attack {shell(run)}")
    found = json.loads(path.read_text())
    figures: dict[str, list[float]] = {}

    def note(name: str, value: float | None) -> None:
        if value is not None:
            figures.setdefault(name, []).append(value)

    for (name, _), rows in group(found["records"], "set", "client").items():
        for source, row in choose_headline(rows, HEADLINES[name]).items():
            note(f"{name}/{source}", row["auc"]["value"])
    domain = [row for row in found["tokens"] if row["among"] == "domain"]
    for rows in group(domain, "client").values():
        for source, row in choose_headline(rows, choose_token_attack(rows)).items():
            if source == UPDATE:
                note("tokens", row["auc"]["value"])
    last = max(found["rounds"])
    for row in found["texts"]:
        if (row["prompt"], row["source"], row["rounds"]) == (QUESTION, UPDATE, last):
            note(f"given/{row['whose']}", row["verbatim"]["value"])
    evaluation = run / "evaluation.json"
    if evaluation.exists():
        for row in chosen_rows(json.loads(evaluation.read_text())):
            note(f"right/{row['question_set']}", row[EXACT_MATCH.name])
    return {name: sum(values) / len(values) for name, values in figures.items()}


def _average(seeds: Iterable[Mapping[str, float]]) -> dict[str, Any]:
    seeds = list(seeds)
    return {n: over_seeds([s[n] for s in seeds if n in s]).dump() for n in COLUMNS}


def _show(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    text = f"{100 * found['value']:.0f}"
    if found["low"] is None or found["n"] < 3:
        return text
    return f"{text} [{100 * max(0, found['low']):.0f}, {100 * min(1, found['high']):.0f}]"
