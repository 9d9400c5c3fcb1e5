"""A study: every variant of an experiment with every seed, run, evaluated and put side by side.

Each run is an ordinary ``flwr run`` below ``results/<name>/``. A run that is finished and of
the same configuration is not repeated, nor is its evaluation, and an unfinished one is resumed
after its last complete round, so that a study can be stopped at any time. Figures are those of
``evaluation.json`` over all clients of a run, then means over the seeds, with the wider of two
intervals: Student's t over the seeds, and the runs' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from fedlora_app.config.combination import Combination
from fedlora_app.config.faults import describe_faults, list_faults
from fedlora_app.config.loading import join_overrides, load_config, read_yaml
from fedlora_app.config.rounds import BASE
from fedlora_app.config.sameness import gives_the_same
from fedlora_app.config.schema import SAFE_NAME, Config, ConfigError, Section
from fedlora_app.data.client_files import ClientFiles, load_all_files
from fedlora_app.evaluation.chance import Chances, read_chances
from fedlora_app.evaluation.choices import Report, SavedRound, open_round
from fedlora_app.evaluation.kept import SUFFIX, find_kept, has_base, is_of, keep_evaluation
from fedlora_app.evaluation.names import (
    ACCURACY,
    ANSWERERS,
    EXACT_MATCH,
    LEAKAGE,
    OWN_PAIR,
    PASS_HEADING,
    PASS_RATE,
    QUESTION_SETS,
    Measure,
    figure_key,
    own_answerer,
    shown_measures,
)
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.shares import (
    Shares,
    read_chosen_shares,
    read_shares,
    read_summary,
    read_unknown,
)
from fedlora_app.evaluation.statistics import Estimate, average_estimates, over_seeds
from fedlora_app.foundation.files import write_atomically, write_json
from fedlora_app.foundation.percent import PLUS_MINUS, format_percent
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.terminal import shell
from fedlora_app.launch import RunFailedError, run_with_flower
from fedlora_app.model.base import release_base_model
from fedlora_app.report.page import REPORT_FILE, write_comparison, write_report
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import SavedRun, load_run

BASE_ANSWERS = ".base-answers.jsonl"
"""What the base model answers, the same in all runs on one base, prompts and settings."""
ASKED = [(s.heading, name) for name, s in QUESTION_SETS.items()] + [(PASS_HEADING, PASS_RATE)]
HEADINGS = (*(entry.heading for entry in QUESTION_SETS.values()), PASS_HEADING, LEAKAGE)
ROWS = {who: label for who, label in ANSWERERS.items() if who != OWN_PAIR}
ROWS |= {OWN_PAIR: ANSWERERS[OWN_PAIR], "chosen": "  ... at the chosen scale"}
"""Who answers in a run, in the order of the table: what the method is for comes last."""

Figures = dict[str, dict[str, Estimate]]
"""Who answers, to ``<measure>/<heading>``, to a share in [0, 1] or a difference of such."""


class StudyConfig(Section):
    """What a study runs."""

    name: str = Field(pattern=SAFE_NAME)
    config: str
    """The experiment that all variants start from."""
    seeds: list[int] = Field(min_length=1)
    overrides: str = ""
    """Laid over the experiment in every variant."""
    kept: str | None = None
    """A folder of finished runs' evaluations, relative to the project: what is there is not run
    again, on whatever machine, and new ones are written there."""
    variants: dict[Annotated[str, Field(pattern=SAFE_NAME)], str] = Field(min_length=1)
    """Each variant's name and what it overrides."""
    combine: dict[str, Combination] = Field(default_factory=dict)
    """How the two adapters answer together in the evaluation of a variant, by its name; else as its
    configuration says."""

    @model_validator(mode="after")
    def _name_seeds_once(self) -> Self:
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            names = ", ".join(map(str, repeated))
            raise ValueError(f"seeds names {names} more than once, which is one run and not two")
        return self

    @model_validator(mode="after")
    def _name_variants(self) -> Self:
        if unknown := sorted(self.combine.keys() - self.variants.keys()):
            raise ValueError(f"combine names {', '.join(unknown)}, which is no variant")
        return self


@dataclass(frozen=True)
class Member:
    """One run of a study: a variant with a seed."""

    variant: str
    seed: int
    overrides: str
    config: Config

    @property
    def name(self) -> str:
        """The name of its run directory."""
        return f"{self.variant}-seed{self.seed}"


def load_study(path: Path) -> StudyConfig:
    """Read a study's YAML.

    Raises:
        ConfigError: with all of its faults.
    """
    raw = read_yaml(path)
    if isinstance(raw, dict) and not raw.keys() & {"config", "seeds", "variants"}:
        raise ConfigError(
            f"{path} is no study: it has none of config, seeds and variants. An experiment is run "
            f"by: fedlora train {shell(path)}"
        )
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(list_faults(str(path), *describe_faults(error, StudyConfig))) from None


def run_study(study: StudyConfig, root: Path, output_dir: Path, report: Report) -> str:
    """Run and evaluate what is missing, write the summary and return it as text.

    Args:
        root: the checkout that runs, and to which the study's config is relative.

    Raises:
        ConfigError: a variant's configuration has faults; nothing was run.
        RunDirectoryError: a run did not reach its end.
    """
    folder = output_dir / study.name
    members = list(_list_members(study, root))
    evaluations: dict[str, list[dict[str, Any]]] = {name: [] for name in study.variants}
    for member in members:
        evaluation = _find_evaluation(study, member, root, folder / member.name, report)
        evaluations[member.variant].append(evaluation)
    text = _write_summary(study, evaluations, folder)
    (folder / BASE_ANSWERS).unlink(missing_ok=True)
    runs = [folder / member.name for member in members]
    here = [run for run in runs if run.is_dir()]  # and not kept from another machine
    for run in here:
        write_report(run)
    page = write_comparison(here, folder / REPORT_FILE) if here else "no run lies here"
    return f"{text}\n\nWritten: {folder / 'summary.md'} and summary.json\nReport: {page}"


def _list_members(study: StudyConfig, root: Path) -> Iterator[Member]:
    """Yield every run of a study, seed by seed."""
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            overrides = join_overrides(study.overrides, changes, f"experiment.seed={seed}")
            yield Member(variant, seed, overrides, load_config(root / study.config, overrides))


def _find_evaluation(
    study: StudyConfig, member: Member, root: Path, run_dir: Path, report: Report
) -> dict[str, Any]:
    """Return a run's evaluation: the one that was kept, or what it gives when it is finished."""
    config = member.config
    data_root = find_project_root(str(root / study.config))  # as the run itself finds it
    combine = study.combine.get(member.variant)
    name = f"{member.name}-{combine}" if combine else member.name
    kept = root / study.kept / f"{name}{SUFFIX}" if study.kept else None
    files = load_all_files(config, data_root)
    if kept and (evaluation := find_kept(kept, config, files, data_root)):
        print(f"{member.name}: kept in {study.kept}", flush=True)
        return evaluation
    if not _is_finished(run := _load_same(run_dir, config, files, data_root)):
        _run(study, member, root, run_dir, resumes=run is not None)
        if not _is_finished(_load_same(run_dir, config, files, data_root)):
            raise RunDirectoryError(
                f"{run_dir} did not reach its end; its log is above. The same command resumes it."
            )
    saved = open_round(load_run(run_dir), data_root, combine=combine)
    evaluation = _evaluate(saved, report, run_dir.parent / BASE_ANSWERS)
    if kept:
        keep_evaluation(kept, config, evaluation)
    return evaluation


def _write_summary(
    study: StudyConfig, evaluations: Mapping[str, list[dict[str, Any]]], folder: Path
) -> str:
    """Write the study's tables and return them."""
    figures = {name: [measure(entry) for entry in runs] for name, runs in evaluations.items()}
    steps = {name: [entry["num_steps"] for entry in runs] for name, runs in evaluations.items()}
    chances = {name: read_chances(runs[0]) for name, runs in evaluations.items()}
    unknown = {name: list(map(read_unknown, runs)) for name, runs in evaluations.items()}
    own = {name: own_answerer(runs[0]["answering"]) for name, runs in evaluations.items()}
    lines = [*_describe(study, figures, steps, chances), *_describe_unknown(unknown, own)]
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "summary.json",
        {
            "study": study.model_dump(),
            "figures": {name: list(map(_dump_values, runs)) for name, runs in figures.items()},
            "estimates": {name: list(map(_dump_estimates, runs)) for name, runs in figures.items()},
            "unknown": {
                name: [_dump_estimates(shares) for shares, _ in runs]
                for name, runs in unknown.items()
            },
            "num_steps": steps,
        },
    )
    write_atomically(folder / "summary.md", text + "\n")
    return text


def measure(evaluation: Mapping[str, Any]) -> Figures:
    """Return a run's figures by who answers, over all clients."""
    figures = {who: _flatten(shares) for who, shares in read_shares(evaluation).items()}
    figures.setdefault(own_answerer(evaluation["answering"]), {}).update(
        _from_summary(read_summary(evaluation))
    )
    if evaluation["summary_chosen_scale"] is not None:
        figures["chosen"] = _flatten(read_chosen_shares(evaluation))
        figures["chosen"] |= _from_summary(read_summary(evaluation, "summary_chosen_scale"))
    return figures


def tabulate(
    figures: Mapping[str, list[Figures]], steps: Mapping[str, list[int]], name: str
) -> Iterator[str]:
    """Yield the lines of a Markdown table of one measure, in percent."""
    columns = [f"{name}/{key}" for key in (*QUESTION_SETS, "pass_rate", "leakage")]
    yield "| variant | answers with | " + " | ".join(HEADINGS) + " | steps |"
    yield "|---" * (3 + len(HEADINGS)) + "|"
    said_of_base = set()
    for variant, runs in figures.items():
        for who, label in ROWS.items():
            if any(who not in run for run in runs):
                continue
            means = (_describe_mean([run[who].get(c) for run in runs], c) for c in columns)
            cells = " | ".join(means)
            if who == BASE:
                if cells in said_of_base:  # as in every variant that is asked the same
                    continue
                said_of_base.add(cells)
            shown = sorted(set(steps[variant]))
            yield f"| {variant} | {label} | {cells} | {', '.join(map(str, shown))} |"


def describe_percent(values: list[float | None]) -> str:
    """Return "97.2 ± 1.3", the mean over seeds and its 95 % half-width, in percent.

    Seeds that agree say nothing of how much others would differ, so that the mean stands alone.
    """
    if any(value is None for value in values):
        return ""
    estimate = over_seeds(values)
    if len(set(values)) == 1:
        return format_percent(estimate.value)
    return format_percent(estimate.value, estimate.low, estimate.high, interval=PLUS_MINUS)


def _describe_mean(estimates: Sequence[Estimate | None], column: str) -> str:
    """Return "97.2 [91.0, 99.3]", the mean over seeds; "" where a run has none."""
    if None in estimates:
        return ""
    mean = average_estimates(estimates, -1.0 if column.endswith(LEAKAGE) else 0.0)
    return format_percent(mean.value, mean.low, mean.high)


def _describe(
    study: StudyConfig,
    figures: Mapping[str, list[Figures]],
    steps: Mapping[str, list[int]],
    chances: Mapping[str, Chances],
) -> Iterator[str]:
    seeds = ", ".join(map(str, study.seeds))
    found = [who for runs in figures.values() for run in runs for who in run.values()]
    scored_by = {key.partition("/")[0] for of in found for key in of}
    for measure in (m for m in _measures() if m.name in scored_by):
        heading = f"{measure.label.capitalize()}, %"
        yield (
            f"{heading}; over all clients, then means over seeds {seeds} [95 %: the wider of "
            "Student's t over the seeds and the interval over facts]\n"
        )
        yield from tabulate(figures, steps, measure.name)
        yield ""
        if measure is ACCURACY:
            yield from _describe_chances(chances)


def _describe_chances(chances: Mapping[str, Chances]) -> Iterator[str]:
    """Yield by what chance a guess is right, by variants where they were asked other questions."""
    variants: dict[str, list[str]] = {}
    for variant, of in chances.items():
        told = ", ".join(f"{head} {format_percent(of[k])}" for head, k in ASKED if k in of)
        variants.setdefault(told, []).append(variant)
    for told, names in variants.items():
        who = f" ({', '.join(names)})" if len(variants) > 1 else ""
        if told:
            yield f"A guess ranks the right answer first for, %{who}: {told}.\n"


def _describe_unknown(
    unknown: Mapping[str, list[tuple[Shares, Shares]]], own: Mapping[str, str]
) -> Iterator[str]:
    """Yield tables of what clients get right of the facts that the base model does not know.

    Args:
        unknown: of each variant's runs (``read_unknown``).
        own: who answers in each variant.
    """
    for measure in _measures():
        lines: list[str] = []
        said: set[str] = set()
        for variant, runs in unknown.items():
            shares, extents = (_describe_sets(p, measure) for p in zip(*runs, strict=True))
            if extents.strip(" |") and extents not in said:
                lines.append(f"| {variant} | share of all questions | {extents} |")
                said.add(extents)
            if shares.strip(" |"):
                lines.append(f"| {variant} | {ANSWERERS[own[variant]]} | {shares} |")
        if lines:
            yield (
                f"{measure.label.capitalize()}, %, of the facts that the base model does not know: "
                "it ranks the right answer first, or says it, in none of the wordings\n"
            )
            headings = " | ".join(entry.heading for entry in QUESTION_SETS.values())
            yield f"| variant | answers with | {headings} |"
            yield "|---" * (2 + len(QUESTION_SETS)) + "|"
            yield from lines
            yield ""


def _describe_sets(runs: Sequence[Shares], measure: Measure) -> str:
    """Return a row's cells: of each question set the mean over runs, "" where one has none."""
    found = [run.get(measure.name, {}) for run in runs]
    return " | ".join(
        _describe_mean([by_set.get(name) for by_set in found], name) for name in QUESTION_SETS
    )


def _flatten(shares: Shares) -> dict[str, Estimate]:
    return {f"{name}/{s}": found[s] for name, found in shares.items() for s in found}


def _from_summary(summary: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the figures that a run has for its clients' own adapters only."""
    figures = {}
    for measure in _measures():
        for key, figure in (("pass_rate", PASS_RATE), ("leakage", LEAKAGE)):
            entry = summary.get(figure_key(figure, measure)) or {}
            if entry.get("value") is not None:
                figures[f"{measure.name}/{key}"] = Estimate(**entry)
    return figures


def _dump_values(figures: Figures) -> dict[str, dict[str, float]]:
    return {who: {key: e.value for key, e in found.items()} for who, found in figures.items()}


def _dump_estimates(figures: Figures) -> dict[str, dict[str, Any]]:
    return {who: {key: e.dump() for key, e in found.items()} for who, found in figures.items()}


def _measures() -> list[Measure]:
    """Return the measures that there is a table of, exact match first."""
    return sorted(shown_measures(), key=lambda measure: measure is not EXACT_MATCH)


def _load_same(
    run_dir: Path, config: Config, files: Mapping[str, ClientFiles], root: Path
) -> SavedRun | None:
    """Return a run if it is of this configuration, and of the files and the base as they are."""
    try:
        run = load_run(run_dir)
    except (RunDirectoryError, ConfigError):
        return None
    is_same = gives_the_same(run.config, config) and all(
        run.manifest["clients"][client].get(f"sha256/{name}") == file.sha256
        for client, own in files.items()
        for name, file in own.all.items()
    )
    return run if is_same and has_base(run.manifest["base_model"], config, root) else None


def _is_finished(run: SavedRun | None) -> bool:
    return run is not None and bool(run.manifest.get("finished"))


def _run(study: StudyConfig, member: Member, root: Path, run_dir: Path, *, resumes: bool) -> None:
    """Start one run with Flower, or resume it, and wait for it."""
    settings = {"config": root / study.config, "overrides": member.overrides}
    if resumes:
        print(f"{run_dir} is unfinished and resumed.", flush=True)
        settings |= {"resume": run_dir}
    else:
        settings |= {"output-dir": run_dir.parent, "run-name": run_dir.name}
    if run_dir.exists() and not resumes:
        aside = _move_aside(run_dir)
        print(
            f"{run_dir} is of another configuration, data or base model, and is run again; "
            f"what was there is {aside.name} now.",
            flush=True,
        )
    try:
        run_with_flower(root, settings, len(member.config.federated.clients))
    except RunFailedError as error:
        raise RunDirectoryError(
            f"{run_dir} did not reach its end: {error} The same command resumes it."
        ) from None


def _move_aside(run_dir: Path) -> Path:
    """Give a run directory another name and return it; it may be days of work."""
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.earlier-{number}")).exists():
        number += 1
    return run_dir.rename(aside)


def _evaluate(saved: SavedRound, report: Report, base_answers: Path) -> dict[str, Any]:
    """Return the evaluation of a run's adapters, made again where it is not of them."""
    found = saved.run.find_evaluation(saved.server_round, saved.combine)
    if _is_current(found, saved):
        return found
    print(f"{saved.run.name}: evaluating", flush=True)
    try:
        return evaluate_round(saved, report, base_answers=base_answers)
    finally:
        release_base_model()  # the next run has one of its own, on the same card


def _is_current(evaluation: Mapping[str, Any] | None, saved: SavedRound) -> bool:
    """Return whether an evaluation is of these adapters and of the files as they are now."""
    if evaluation is None or not is_of(evaluation, saved.files):
        return False
    return evaluation["adapters"] == saved.hashes
