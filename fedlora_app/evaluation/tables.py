"""From scores to what ``evaluation.json`` says: tables, verdicts, differences, intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations
from statistics import fmean
from typing import Any

from fedlora_app.config.rounds import adapters_label
from fedlora_app.config.sameness import dump_what_counts
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.data.questions import (
    UNIVERSAL,
    UNIVERSAL_UNSEEN,
)
from fedlora_app.evaluation.answering import OPEN_ABOVE, Answering
from fedlora_app.evaluation.chance import read_chances
from fedlora_app.evaluation.choices import Cell, SavedRound, describe_precision
from fedlora_app.evaluation.names import (
    ACCURACY,
    ASKED_SETS,
    EXACT_MATCH,
    KEYWORD,
    MEASURES,
    OWN_SETS,
    PER_BYTE,
    PMI,
    SEMANTIC,
    Measure,
    base_key,
    relative_label,
    shown_measures,
)
from fedlora_app.evaluation.scores import Score, collect_outcomes, compute_interaction, mean
from fedlora_app.evaluation.summary import (
    Conflict,
    Pairs,
    Results,
    Scores,
    average,
    compute_difference,
    every_client_passes,
    summarise_scores,
)

FORMAT = 1
CORE_NOTE = (
    "Only the core of the protocol was run: no other client's adapters, other prompts or other "
    "scales. For the rest: fedlora evaluate RUN --full"
)

Row = dict[str, Any]


def build_evaluation(
    saved: SavedRound,
    scores: Scores,
    chosen: Mapping[str, float],
    curves: Mapping[str, list[Row]],
    membership: list[Row] | None,
    leading: Mapping[str, str],
    is_full: bool = True,
    warnings: Sequence[str] = (),
    semantic_model: str | None = None,
) -> dict[str, Any]:
    """Return the content of ``evaluation.json``.

    Args:
        chosen: each client's scale of the local adapter; empty where none could be chosen.
        curves: figures on the validation questions by scale.
        leading: the measure that each question set is judged by.
        is_full: all of the protocol was run, and not its core alone.
        semantic_model: what compared meanings, if anything did.
    """
    run, config = saved.run, saved.run.config
    as_trained = dict.fromkeys(saved.clients, 1.0)
    results = Results(saved, scores, as_trained)
    questions = list(_question_rows(saved, scores, [as_trained, chosen], leading))
    return {
        "format": FORMAT,
        "run": run.name,
        "mode": config.federated.mode,
        "seed": config.experiment.seed,
        "round": saved.server_round,
        "settings": hash_settings(config),
        "evaluated": datetime.now(UTC).isoformat(timespec="seconds"),
        "computed_on": describe_precision(config.model),
        "max_new_tokens": config.evaluation.max_new_tokens,
        "base_model": run.manifest["base_model"],
        "adapters": saved.hashes,
        "answering": adapters_label(saved.active),
        "combination": saved.combination,
        "files": {c: {n: f.sha256 for n, f in fs.all.items()} for c, fs in saved.files.items()},
        "system_prompts": {c: config.client(c).system_prompt for c in saved.clients},
        "num_steps": run.count_steps(saved.server_round),
        "num_parameters": run.count_parameters(saved.server_round, saved.active),
        "summary": summarise_scores(results),
        "summary_chosen_scale": summarise_scores(replace(results, scales=chosen))
        if chosen
        else None,
        "scales": {c: {"chosen": chosen[c], "curve": curves[c]} for c in chosen},
        "shares": list(_share_rows(scores)),
        "swap_table": list(_swap_rows(scores)),
        "controls": list(_control_rows(scores)),
        "specificity": list(_specificity_rows(results)),
        "conflicts": list(_conflict_rows(results)),
        "membership": membership,
        "protocol": "full" if is_full else "core",
        "semantic_model": semantic_model,
        "leading": dict(leading),
        "chances": read_chances({"questions": questions}),
        "questions": questions,
        "notes": [*(_notes(saved, chosen) if is_full else [CORE_NOTE]), *_data_notes(saved)],
        "warnings": list(warnings),
    }


def hash_settings(config: Config) -> str:
    """Return a hash of how the run was trained, which runs that differ in the seed share."""
    raw = dump_what_counts(config)
    names = ("model", "adapters", "training", "federated")
    chosen = {name: raw.get(name, {}) for name in names}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def choose_scales(on_validation: Scores) -> tuple[dict[str, float], dict[str, list[Row]]]:
    """Return each client's scale and the curve that it was chosen from.

    The scale with the highest mean over the validation sets, each by the mean of its ranking
    accuracy and its exact match; the nearest to 1 of several such.
    """
    figures: dict[tuple[str, float], Row] = {}
    for cell, results in on_validation.items():
        row = figures.setdefault((cell.client, cell.answering.scale), {})
        for measure in (ACCURACY, EXACT_MATCH):
            row[measure.extend(cell.question_set)] = mean(collect_outcomes(results, measure))
    chosen: dict[str, float] = {}
    curves: dict[str, list[Row]] = {}
    for (client, scale), row in sorted(figures.items()):
        objective = fmean([value for value in row.values() if value is not None] or [0.0])
        curves.setdefault(client, []).append({"scale": scale, **row, "objective": objective})
    for client, curve in curves.items():
        best = max(curve, key=lambda row: (row["objective"], -abs(row["scale"] - 1)))
        chosen[client] = best["scale"]
    return chosen, curves


def _swap_rows(scores: Scores) -> Iterator[Row]:
    for cell, results in scores.items():
        if cell.prompt_kind != "own":
            continue
        yield _row(cell, cell.question_set, results)
        if cell.question_set == UNIVERSAL:
            pairs = zip(cell.questions, results, strict=True)
            unseen = [pair for pair in pairs if pair[0].is_unseen]
            if unseen:
                questions, scored = zip(*unseen, strict=True)
                yield _row(replace(cell, questions=questions), UNIVERSAL_UNSEEN, scored)


def _share_rows(scores: Scores) -> Iterator[Row]:
    """Yield what each choice of adapters gets right over all clients, at full scale."""
    pooled: dict[tuple[str, str], list[tuple[str, str, Pairs]]] = {}
    for cell, results in scores.items():
        if cell.prompt_kind != "own" or cell.answering.scale != 1.0:
            continue
        who = relative_label({"adapters": cell.answering.label, "client": cell.client})
        pairs = list(zip(cell.questions, results, strict=True))
        name = cell.question_set
        pooled.setdefault((who, name), []).append((name, cell.client, pairs))
        unseen = [pair for pair in pairs if pair[0].is_unseen]
        if unseen:
            entry = (UNIVERSAL_UNSEEN, cell.client, unseen)
            pooled.setdefault((who, UNIVERSAL_UNSEEN), []).append(entry)
    for (who, name), scored in pooled.items():
        row = {"answered_by": who, "question_set": name}
        yield row | {m.name: average(scored, m).dump() for m in shown_measures()}


def _control_rows(scores: Scores) -> Iterator[Row]:
    for cell, results in scores.items():
        if cell.prompt_kind != "own":
            row = {"prompt": cell.prompt_kind, "system_prompt": cell.system_prompt}
            yield row | _row(cell, cell.question_set, results)


def _row(cell: Cell, question_set: str, results: Sequence[Score]) -> Row:
    """Return one row of the swap table or of the controls."""
    scored = [(question_set, cell.client, list(zip(cell.questions, results, strict=True)))]
    accuracy, exact = (average(scored, m) for m in (ACCURACY, EXACT_MATCH))
    means = {name: mean(collect_outcomes(results, m)) for name, m in MEASURES.items()}
    row = {
        "question_set": question_set,
        "client": cell.client,
        "adapters": cell.answering.label,
        "scale": cell.answering.scale,
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "n": accuracy.n,
        "facts": len({question.cluster for question in cell.questions}),
        "accuracy_per_byte": means["accuracy_per_byte"],
        "accuracy_pmi": means["accuracy_pmi"],
        "margin": mean(score.value(ACCURACY) for score in results),
        "margin_per_byte": mean(score.value(PER_BYTE) for score in results),
        "exact_match": exact.value,
        "exact_match_low": exact.low,
        "exact_match_high": exact.high,
        "n_generated": len(results),
        "rouge_l": means["rouge_l"],
        "keyword": means["keyword"],
        "n_keyword": len(collect_outcomes(results, KEYWORD)),
    }
    return row | {name: value for name, value in means.items() if name not in row}


def _specificity_rows(results: Results) -> Iterator[Row]:
    """Yield own minus foreign local adapter, by client, foreign client and question set."""
    for client in results.clients:
        for foreign in results.foreign(client):
            for name in OWN_SETS:
                own = results.own(client, name)
                if own:
                    row = {"client": client, "foreign": foreign.local, "question_set": name}
                    compared = [(client, own, [results.find(client, name, foreign)])]
                    for measure in shown_measures():
                        row[measure.name] = compute_difference(compared, name, measure).dump()
                    yield row


def _conflict_rows(results: Results) -> Iterator[Row]:
    """Yield one verdict per conflict record, with the interaction of the clients' answers."""
    for record, conflict in results.conflicts.items():
        first = next(iter(conflict.values()))[0]
        yield {
            "record": record,
            "instruction": first.text,
            "fact": first.fact,
            **{
                measure.extend("passed"): every_client_passes(conflict, measure)
                for measure in shown_measures(with_variants=True)
                if measure.passes_above is not None
            },
            "interaction": dict(_interactions(conflict)),
        }


def _interactions(conflict: Conflict) -> Iterator[tuple[str, float]]:
    """Yield the interaction of every two clients, under "one|other"."""
    for (one, (own, own_score)), (other, (rival, rival_score)) in combinations(conflict.items(), 2):
        if own.answer in rival.candidates and rival.answer in own.candidates:
            sides = ((own, own_score), (rival, rival_score))
            likelihoods = (
                dict(zip(question.candidates, score.log_likelihoods, strict=True))
                for question, score in sides
            )
            yield f"{one}|{other}", compute_interaction(*likelihoods, own.answer, rival.answer)


def _question_rows(
    saved: SavedRound,
    scores: Scores,
    scales: Sequence[Mapping[str, float]],
    leading: Mapping[str, str],
) -> Iterator[Row]:
    """Yield every test question under its client's own adapters, at each scale of interest."""
    answering = {
        (client, saved.own(client, by_client[client])): None
        for by_client in scales
        for client in by_client
    }
    results = Results(saved, scores, {})
    for client, own in answering:
        for name in ASKED_SETS:
            leads = MEASURES[leading.get(name, EXACT_MATCH.name)]
            shared = iter(results.find(client, name, saved.alone(client)))
            untrained = iter(results.find(client, name, Answering()))
            for question, score in results.find(client, name, own):
                _, by_global = next(shared, (None, None))
                _, by_base = next(untrained, (None, None))
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
                        "margin": score.value(ACCURACY),
                        "margin_per_byte": score.value(PER_BYTE),
                        "margin_pmi": score.value(PMI),
                        "margin_semantic": score.value(SEMANTIC),
                    },
                    "generated": score.generated,
                    "gate": score.openness,
                    "failed": find_failed(name, score, by_global, leads),
                    **{
                        measure.row_key: score.outcome(measure)
                        for measure in MEASURES.values()
                        if not measure.is_variant
                    },
                    **{
                        base_key(measure): by_base.outcome(measure)
                        for measure in shown_measures()
                        if by_base is not None
                    },
                }


def find_failed(
    question_set: str, score: Score, by_global: Score | None, measure: Measure
) -> str | None:
    """Return which part of a gated pair a wrong answer is due to; None where there is none.

    Args:
        by_global: what the global adapter alone said to the same question.

    Returns:
        "gate" where it left the question to the wrong part, else "local" or "global".
    """
    if score.openness is None or by_global is None or score.outcome(measure) is not False:
        return None
    is_open = score.openness > OPEN_ABOVE
    if question_set in OWN_SETS:
        return LOCAL if is_open else "gate"
    return "gate" if is_open and by_global.outcome(measure) else GLOBAL


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
