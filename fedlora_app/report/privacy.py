"""The section on differential privacy: what a run has spent, and what that is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedlora_app.config.privacy import has_noise
from fedlora_app.config.schema import PrivacyConfig
from fedlora_app.federation.privacy_notice import describe_assumptions
from fedlora_app.report.parts import Plotter, Section, Table
from fedlora_app.runs.directory import SERVER
from fedlora_app.runs.partial import PartialRun
from fedlora_app.runs.spending import PRIVACY

FIGURES = {
    "epsilon": "epsilon so far",
    "noise_multiplier": "noise multiplier",
    "clipped_share": "share of updates clipped",
    "noised_cosine": "cosine of the mean with and without noise",
}


def show_privacy(run: PartialRun, plotter: Plotter) -> Section | None:
    """Return the section; None of a run that protects nothing in this way."""
    privacy = PrivacyConfig.model_validate(run.config.get("privacy") or {})
    if privacy.unit == "none":
        return None
    section = Section("privacy", "Differential privacy", list(_describe(privacy)))
    rows = list(_collect(run))
    columns = [key for key in FIGURES if any(key in figures for _, _, figures in rows)]
    table = [
        (number, who, *(_format(figures.get(key)) for key in columns))
        for number, who, figures in rows
    ]
    if columns:
        caption = "By round; lower epsilons are better"
        headings = ("round", "who", *(FIGURES[key] for key in columns))
        section.tables.append(Table(headings, table, caption))
    return section


def _describe(privacy: PrivacyConfig) -> Iterator[str]:
    who = "server" if privacy.noise == "server" and privacy.unit == "client" else "client"
    what = "Updates are" if privacy.unit == "client" else "Gradients of single examples are"
    start = f"The unit is one {privacy.unit}. {what} clipped to norm {privacy.clip_norm:g}"
    if not has_noise(privacy):
        yield f"{start}, without noise: epsilon is infinite, and nothing is hidden."
        return
    yield f"{start}; the {who} adds the noise. Figures are at delta {privacy.delta:g}."
    yield from (f"{sentence}." for sentence in describe_assumptions(privacy))


def _collect(run: PartialRun) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield what the history holds of each round and of whom, what the server measured too."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in run.history:
        if entry["phase"] == PRIVACY or (entry["client"], entry["phase"]) == (SERVER, "aggregate"):
            found.setdefault((entry["round"], entry["client"]), {}).update(entry["metrics"])
    for (number, client), figures in sorted(found.items()):
        if any(key in figures for key in FIGURES):
            yield number, "the server" if client == SERVER else client, figures


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
