"""From scores to what ``evaluation.json`` says: tables, verdicts, differences, intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from fedlora_app.config.rounds import adapters_label
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.data.linter import keyword_ceiling
from fedlora_app.data.questions import (
    CONFLICT,
    LOCAL_SET,
    UNIVERSAL,
    UNIVERSAL_UNSEEN,
    Question,
)
from fedlora_app.evaluation.choices import Cell, SavedRound, describe_precision
from fedlora_app.evaluation.metrics import Score, compute_interaction
from fedlora_app.evaluation.saved_model import Answering
from fedlora_app.evaluation.statistics import NOTHING, Estimate, paired_difference, proportion

FORMAT = 1

Scores = dict[Cell, list[Score]]
Row = dict[str, Any]
Pairs = list[tuple[Question, Score]]
Outcome = Callable[[Score], bool | None]

# Suffix of a figure's name to what it counts. Ranking by raw likelihood is the primary measure.
OUTCOMES: dict[str, Outcome] = {
    "accuracy": lambda score: score.ranked_first,
    "accuracy_per_byte": lambda score: score.ranked_first_per_byte,
    "accuracy_pmi": lambda score: score.ranked_first_pmi,
    "exact_match": lambda score: score.exact_match,
}
RATES = {  # how the same outcomes are called in the conflict pass rate and in differences
    "accuracy": "",
    "accuracy_per_byte": "_per_byte",
    "accuracy_pmi": "_pmi",
    "exact_match": "_exact_match",
}


def build_evaluation(
    saved: SavedRound,
    scores: Scores,
    chosen: Mapping[str, float],
    curves: Mapping[str, list[Row]],
    membership: list[Row] | None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of ``evaluation.json``.

    Args:
        chosen: each client's scale of the local adapter; empty where none could be chosen.
        curves: figures on the validation questions by scale.
    """
    run, config = saved.run, saved.run.config
    as_trained = dict.fromkeys(saved.clients, 1.0)
    return {
        "format": FORMAT,
        "run": run.name,
        "mode": config.federated.mode,
        "seed": config.experiment.seed,
        "round": saved.server_round,
        "settings": _hash_settings(config),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "computed_on": describe_precision(config.model),
        "base_model": run.manifest["base_model"],
        "adapters": saved.hashes,
        "answering": adapters_label(saved.active),
        "files": {c: {n: f.sha256 for n, f in fs.all.items()} for c, fs in saved.files.items()},
        "system_prompts": {c: config.client(c).system_prompt for c in saved.clients},
        "num_steps": run.count_steps(saved.server_round),
        "num_parameters": run.count_parameters(saved.server_round, saved.active),
        "summary": summarise_scores(saved, scores, as_trained),
        "summary_chosen_scale": summarise_scores(saved, scores, chosen) if chosen else None,
        "scales": {c: {"chosen": chosen[c], "curve": curves[c]} for c in chosen},
        "swap_table": list(_swap_rows(scores)),
        "controls": list(_control_rows(scores)),
        "specificity": list(_specificity_rows(saved, scores)),
        "conflicts": list(_conflict_rows(saved, scores, as_trained)),
        "membership": membership,
        "questions": list(_question_rows(saved, scores, [as_trained, chosen])),
        "notes": [*_notes(saved, chosen), *_data_notes(saved)],
        "warnings": list(warnings),
    }


def _hash_settings(config: Config) -> str:
    """Return a hash of how the run was trained, which runs that differ in the seed share."""
    raw = config.dump()
    chosen = {name: raw[name] for name in ("model", "adapters", "training", "federated")}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def choose_scales(on_validation: Scores) -> tuple[dict[str, float], dict[str, list[Row]]]:
    """Return each client's scale and the curve that it was chosen from.

    The scale with the highest mean over the validation sets, each by the mean of its ranking
    accuracy and its exact match; the nearest to 1 of several such.
    """
    figures: dict[tuple[str, float], Row] = {}
    for cell, results in on_validation.items():
        row = figures.setdefault((cell.client, cell.answering.scale), {})
        row[cell.question_set] = _share(results, "accuracy")
        row[f"{cell.question_set}_exact_match"] = _share(results, "exact_match")
    chosen: dict[str, float] = {}
    curves: dict[str, list[Row]] = {}
    for (client, scale), row in sorted(figures.items()):
        objective = fmean([value for value in row.values() if value is not None] or [0.0])
        curves.setdefault(client, []).append({"scale": scale, **row, "objective": objective})
    for client, curve in curves.items():
        best = max(curve, key=lambda row: (row["objective"], -abs(row["scale"] - 1)))
        chosen[client] = best["scale"]
    return chosen, curves


def summarise_scores(
    saved: SavedRound, scores: Scores, scales: Mapping[str, float]
) -> dict[str, Row]:
    """Return the figures over all clients, each under its own adapters at its scale."""
    summary: dict[str, Estimate] = {}
    for suffix, outcome in OUTCOMES.items():
        passes = [_passes(found, outcome) for found in _conflicts(saved, scores, scales).values()]
        valid = [value for value in passes if value is not None]
        summary[f"conflict_pass_rate{RATES[suffix]}"] = proportion(valid)
        for name in (CONFLICT, LOCAL_SET, UNIVERSAL, UNIVERSAL_UNSEEN):
            pairs = [pair for c in saved.clients for pair in _own(saved, scores, c, name, scales)]
            values = [outcome(score) for _, score in pairs]
            summary[f"{name}_{suffix}"] = proportion([v for v in values if v is not None])
    for suffix in ("accuracy", "exact_match"):
        for name in (LOCAL_SET, CONFLICT):
            key = RATES[suffix] if name == LOCAL_SET else f"_{name}{RATES[suffix]}"
            summary[f"leakage{key}"] = _leakage(saved, scores, name, suffix)
            summary[f"specificity{key}"] = _specificity(saved, scores, scales, name, suffix)
    summary |= _keyword_figures(saved, scores, scales)
    return {name: estimate.dump() for name, estimate in summary.items()}


def _own(
    saved: SavedRound, scores: Scores, client: str, name: str, scales: Mapping[str, float]
) -> Pairs:
    """Return a client's questions with their scores under its own adapters at its scale."""
    return _find(scores, client, name, saved.own(client, scales.get(client, 1.0)))


def _find(scores: Scores, client: str, name: str, answering: Answering) -> Pairs:
    """Return the questions of a set under a choice of adapters and the client's own prompt."""
    wanted = UNIVERSAL if name == UNIVERSAL_UNSEEN else name
    for cell, results in scores.items():
        key = (cell.client, cell.question_set, cell.answering, cell.prompt_kind)
        if key == (client, wanted, answering, "own"):
            pairs = zip(cell.questions, results, strict=True)
            return [p for p in pairs if name != UNIVERSAL_UNSEEN or p[0].is_unseen]
    return []


def _conflicts(
    saved: SavedRound, scores: Scores, scales: Mapping[str, float]
) -> dict[int, dict[str, tuple[Question, Score]]]:
    """Return the conflict records that two clients or more answer: record to client to score."""
    found: dict[int, dict[str, tuple[Question, Score]]] = {}
    for client in saved.clients:
        for question, score in _own(saved, scores, client, CONFLICT, scales):
            if question.answer is None:  # keywords only: nothing to rank or to match
                continue
            found.setdefault(question.record, {})[client] = (question, score)
    return {record: by_client for record, by_client in found.items() if len(by_client) > 1}


def _passes(by_client: Mapping[str, tuple[Question, Score]], outcome: Outcome) -> bool | None:
    """Return whether every client's own answer won; None where one could not be scored."""
    values = [outcome(score) for _, score in by_client.values()]
    return None if None in values else all(values)


def _leakage(saved: SavedRound, scores: Scores, name: str, suffix: str) -> Estimate:
    """Return how much more global alone is right than the base, on what is a client's own."""
    if GLOBAL not in saved.active:
        return NOTHING
    compared = []
    for client in saved.clients:
        shared = _find(scores, client, name, Answering(with_global=True))
        compared.append((client, shared, [_find(scores, client, name, Answering())]))
    return _difference(compared, suffix)


def _specificity(
    saved: SavedRound, scores: Scores, scales: Mapping[str, float], name: str, suffix: str
) -> Estimate:
    """Return how much more a client's own local adapter is right than the others' ones."""
    compared = []
    for client in saved.clients:
        foreign = saved.foreign(client, scales.get(client, 1.0))
        if foreign:
            own = _own(saved, scores, client, name, scales)
            rivals = [_find(scores, client, name, answering) for answering in foreign]
            compared.append((client, own, rivals))
    return _difference(compared, suffix)


def _difference(compared: Sequence[tuple[str, Pairs, list[Pairs]]], suffix: str) -> Estimate:
    """Return the paired difference of a set of questions against the mean of several others."""
    outcome = OUTCOMES[suffix]
    ones, others, clusters = [], [], []
    for client, own, rivals in compared:
        for index, (question, score) in enumerate(own):
            value = outcome(score)
            rival_values = [outcome(rival[index][1]) for rival in rivals]
            if value is None or None in rival_values:
                continue
            ones.append(value)
            others.append(fmean(rival_values))
            clusters.append((client, question.cluster))
    return paired_difference(ones, others, clusters)


def _keyword_figures(
    saved: SavedRound, scores: Scores, scales: Mapping[str, float]
) -> dict[str, Estimate]:
    """Return the keyword rule's pass rate beside its ceiling on the gold answers."""
    passed = [
        score.keyword
        for client in saved.clients
        for name in (UNIVERSAL, LOCAL_SET, CONFLICT)
        for _, score in _own(saved, scores, client, name, scales)
        if score.keyword is not None
    ]
    figures = {"keyword_pass_rate": proportion(passed)}
    for name, plain in (("keyword_ceiling", False), ("keyword_ceiling_plain", True)):
        right = total = 0
        seen = set()
        for client, files in saved.files.items():
            for kind, file in files.tests.items():
                owner = None if kind == CONFLICT else client
                if (file.path, owner) not in seen:
                    seen.add((file.path, owner))
                    counted = keyword_ceiling(file.records, owner, plain=plain)
                    right, total = right + counted[0], total + counted[1]
        figures[name] = proportion([True] * right + [False] * (total - right))
    return figures


def _swap_rows(scores: Scores) -> Iterator[Row]:
    for cell, results in scores.items():
        if cell.prompt_kind != "own":
            continue
        yield _row(cell, cell.question_set, results)
        if cell.question_set == UNIVERSAL:
            pairs = zip(cell.questions, results, strict=True)
            unseen = [score for question, score in pairs if question.is_unseen]
            if unseen:
                yield _row(cell, UNIVERSAL_UNSEEN, unseen)


def _control_rows(scores: Scores) -> Iterator[Row]:
    for cell, results in scores.items():
        if cell.prompt_kind != "own":
            row = {"prompt": cell.prompt_kind, "system_prompt": cell.system_prompt}
            yield row | _row(cell, cell.question_set, results)


def _row(cell: Cell, question_set: str, results: Sequence[Score]) -> Row:
    """Return one row of the swap table or of the controls."""
    ranked = [score.ranked_first for score in results if score.ranked_first is not None]
    accuracy = proportion(ranked)
    exact = proportion([score.exact_match for score in results if score.exact_match is not None])
    keywords = [score.keyword for score in results if score.keyword is not None]
    return {
        "question_set": question_set,
        "client": cell.client,
        "adapters": cell.answering.label,
        "scale": cell.answering.scale,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "n": accuracy.n,
        "accuracy_per_byte": _share(results, "accuracy_per_byte"),
        "accuracy_pmi": _share(results, "accuracy_pmi"),
        "margin": _mean([s.margin for s in results]),
        "margin_per_byte": _mean([s.margin_per_byte for s in results]),
        "exact_match": exact.value,
        "exact_match_low": exact.low,
        "exact_match_high": exact.high,
        "n_generated": len(results),
        "rouge_l": _mean([s.rouge_l for s in results]),
        "keyword": _mean(keywords),
        "n_keyword": len(keywords),
    }


def _specificity_rows(saved: SavedRound, scores: Scores) -> Iterator[Row]:
    """Yield own minus foreign local adapter, by client, foreign client and question set."""
    for client in saved.clients:
        for foreign in saved.foreign(client):
            for name in (LOCAL_SET, CONFLICT):
                own = _find(scores, client, name, saved.own(client))
                if own:
                    rivals = [_find(scores, client, name, foreign)]
                    row = {"client": client, "foreign": foreign.local, "question_set": name}
                    for suffix in ("accuracy", "exact_match"):
                        row[suffix] = _difference([(client, own, rivals)], suffix).dump()
                    yield row


def _conflict_rows(saved: SavedRound, scores: Scores, scales: Mapping[str, float]) -> Iterator[Row]:
    """Yield one verdict per conflict record, with the interaction of the clients' answers."""
    for record, by_client in sorted(_conflicts(saved, scores, scales).items()):
        first = next(iter(by_client.values()))[0]
        yield {
            "record": record,
            "instruction": first.text,
            "fact": first.fact,
            "passed": _passes(by_client, OUTCOMES["accuracy"]),
            "passed_per_byte": _passes(by_client, OUTCOMES["accuracy_per_byte"]),
            "passed_pmi": _passes(by_client, OUTCOMES["accuracy_pmi"]),
            "passed_exact_match": _passes(by_client, OUTCOMES["exact_match"]),
            "interaction": _interactions(by_client),
        }


def _interactions(by_client: Mapping[str, tuple[Question, Score]]) -> Row:
    """Return the interaction of every two clients, under "one|other"."""
    found = {}
    clients = list(by_client)
    for position, one in enumerate(clients):
        for other in clients[position + 1 :]:
            own, own_score = by_client[one]
            rival, rival_score = by_client[other]
            if own.answer in rival.candidates and rival.answer in own.candidates:
                likelihoods = dict(zip(rival.candidates, rival_score.log_likelihoods, strict=True))
                found[f"{one}|{other}"] = compute_interaction(
                    dict(zip(own.candidates, own_score.log_likelihoods, strict=True)),
                    likelihoods,
                    own.answer,
                    rival.answer,
                )
    return found


def _question_rows(
    saved: SavedRound, scores: Scores, scales: Sequence[Mapping[str, float]]
) -> Iterator[Row]:
    """Yield every test question under its client's own adapters, at each scale of interest."""
    answering = {
        (client, saved.own(client, by_client[client])): None
        for by_client in scales
        for client in by_client
    }
    for client, own in answering:
        for name in (UNIVERSAL, LOCAL_SET, CONFLICT):
            for question, score in _find(scores, client, name, own):
                yield {
                    "question_set": name,
                    "client": client,
                    "record": question.record,
                    "fact": question.fact,
                    "is_unseen": question.is_unseen,
                    "instruction": question.text,
                    "adapters": own.label,
                    "scale": own.scale,
                    "gold": question.answer,
                    "candidates": list(question.candidates),
                    "scores": {
                        "log_likelihoods": list(score.log_likelihoods),
                        "margin": score.margin,
                        "margin_per_byte": score.margin_per_byte,
                        "margin_pmi": score.margin_pmi,
                    },
                    "generated": score.generated,
                    "correct": score.ranked_first,
                    "exact_match": score.exact_match,
                    "rouge_l": score.rouge_l,
                    "keyword": score.keyword,
                }


def _notes(saved: SavedRound, chosen: Mapping[str, float]) -> Iterator[str]:
    """Yield what a reader must know about what was not done."""
    config = saved.run.config
    if LOCAL in saved.active and not chosen:
        yield (
            "No scale of the local adapters was chosen: the configuration names no validation "
            "questions (data.universal_validation, data.conflict_validation, local_validation)."
        )
    others = len(saved.clients) - 1
    tried = max((len(saved.foreign(client)) for client in saved.clients), default=0)
    if LOCAL in saved.active and tried < others:
        yield f"Each client's questions were put to {tried} of the {others} foreign adapters."
    if len({config.client(client).system_prompt for client in saved.clients}) == 1 < others + 1:
        yield (
            "All clients have the same system prompt, so nothing in it can give an answer away; "
            "the control with a foreign identity names the other client instead."
        )


def _data_notes(saved: SavedRound) -> Iterator[str]:
    """Yield the files that are not those that the run was trained or tested with."""
    for client, files in saved.files.items():
        recorded = saved.run.manifest.get("clients", {}).get(client, {})
        for name, file in files.all.items():
            if recorded.get(f"sha256/{name}", file.sha256) != file.sha256:
                yield f"{file.path.name} ({name} of {client}) was changed since the run."


def _share(results: Sequence[Score], suffix: str) -> float | None:
    return _mean([OUTCOMES[suffix](score) for score in results])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [float(value) for value in values if value is not None]
    return fmean(present) if present else None
