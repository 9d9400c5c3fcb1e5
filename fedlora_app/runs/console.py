"""The block that opens a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

from fedlora_app.config.combinations import ROBUST
from fedlora_app.config.idle import describe_idle
from fedlora_app.config.participation import training_clients
from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, AdapterConfig, Config
from fedlora_app.config.sharing import of_factors, travelling_factors
from fedlora_app.federation.privacy_notice import count_travelling, describe_privacy
from fedlora_app.federation.quantised import count_upload_bytes
from fedlora_app.foundation.percent import format_percent
from fedlora_app.model.ranks import resize_ranks
from fedlora_app.training.decay import describe_decay
from fedlora_app.training.selection import describe_long_phases

UNREACHABLE = {
    "cut": "are longer than evaluation.max_new_tokens and can never match exactly",
    "altered": "are changed by the chat template or the tokenizer and can never match exactly",
}

LARGEST_SHARE = 0.75
"""Of an average, above which a client's own word for its weight is worth a line."""
KEPT_UPLOADS = (
    "kept at the server, without its noise if it adds any: one client's tells more of it than the "
    "average does, and fedlora attack says how much"
)


def describe_start(
    config: Config,
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    clients: dict[str, dict[str, Any]],
) -> str:
    """Return the block that opens a run."""
    federated, training = config.federated, config.training
    plan = plan_round(config, federated.num_rounds)
    counts = {c: (r["universal_examples"], r["local_examples"]) for c, r in clients.items()}
    sizes = {name: sum(map(math.prod, shape.values())) for name, shape in shapes.items()}
    lines = [
        f"{config.experiment.name}: {federated.mode}, {federated.num_rounds} rounds, "
        f"seed {config.experiment.seed}, base {config.model.name}",
        f"  global adapter  {_describe(config.adapters.global_)}, {sizes[GLOBAL]:,} parameters",
        f"  local adapter   {_describe(config.adapters.local)}, {sizes[LOCAL]:,} parameters"
        + ("" if LOCAL in plan.evaluated else " (not used in this mode)"),
        f"  travels         {_describe_traffic(config, shapes[GLOBAL])}",
        f"  training        {training.schedule}, learning rate {training.learning_rate:g}, "
        f"batch {training.batch_size} x {training.gradient_accumulation_steps}",
        *(f"  {'':<15} {line}" for line in describe_idle(config)),
        *(f"  {'':<15} {line}" for line in describe_decay(config, counts)),
        *(f"  {'':<15} {line}" for line in describe_long_phases(config, counts)),
        *_label("weights", _describe_weights(config, counts)),
        *_label(
            "privacy", describe_privacy(config, count_travelling(config, shapes[GLOBAL]), counts)
        ),
        *(_label("uploads", [KEPT_UPLOADS]) if federated.keeps_updates else ()),
        *(["  server          no model, no device"] if not plan.is_global_given else []),
    ]
    for client, report in clients.items():
        has = f"{report['universal_examples']} universal, {report['local_examples']} local"
        lines.append(f"  {client:<15} {has} examples; {report['device']}")
        lines += [f"  {'':<15} {note}" for note in _notes(report, training.max_seq_length)]
    return "\n".join(lines)


def _label(name: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield lines of the block, the name before the first of them."""
    for number, line in enumerate(lines):
        yield f"  {'' if number else name:<15} {line}"


def _describe(adapter: AdapterConfig) -> str:
    layers = f", from layer {adapter.first_layer}" if adapter.first_layer else ""
    frozen = f" and {adapter.frozen_rank} frozen" if adapter.frozen_rank else ""
    return f"rank {adapter.rank}{frozen}{layers}"


def _describe_traffic(config: Config, shapes: Mapping[str, Sequence[int]]) -> str:
    plan = plan_round(config, 1)
    if plan.is_global_given:
        return "nothing: no server takes part"
    if plan.train is None:
        return "nothing but metrics leaves a client"
    sent = of_factors(shapes, travelling_factors(config, 1))
    learning = resize_ranks(sent, config.adapters.global_.rank)
    up = count_upload_bytes(learning, config.federated.upload_dtype)
    down = count_upload_bytes(sent, "float32")
    senders = len(training_clients(config, 1))
    return (
        f"the global adapter's update up ({up / 1e6:.2f} MB per round from each of {senders}), "
        f"the adapter down ({down / 1e6:.2f} MB); local adapters never"
    )


def _describe_weights(config: Config, counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield whose update is nearly a whole average, by what it says of itself."""
    federated = config.federated
    if federated.weighting != "examples" or federated.rule in ROBUST:
        return
    share, client = max(_largest_shares(config, counts), default=(0.0, ""))
    if share > LARGEST_SHARE:
        yield (
            f"{client} has up to {format_percent(share, unit=' %')} of an average, by the number "
            "of examples that it says it has"
        )
        yield "with federated.weighting: equal all clients count alike, with given as you say"


def _largest_shares(
    config: Config, counts: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[float, str]]:
    """Yield the largest share of each round's average, with whose it is."""
    for number in range(1, config.federated.num_rounds + 1):
        train = plan_round(config, number).train
        trainers = [client for client in training_clients(config, number) if client in counts]
        if train is None or len(trainers) < 2:
            continue
        is_taken = (train.data != "local", train.data != "universal")
        weights = [sum(compress(counts[client], is_taken)) for client in trainers]
        if total := sum(weights):
            yield max(zip((weight / total for weight in weights), trainers, strict=True))


def _notes(report: dict[str, Any], max_seq_length: int) -> Iterable[str]:
    for name in ("universal", "local"):
        if report[f"{name}_truncated"]:
            yield (
                f"{report[f'{name}_truncated']} of {report[f'{name}_examples']} {name} examples "
                f"were cut at {max_seq_length} tokens"
            )
        if report[f"{name}_dropped"]:
            yield f"{report[f'{name}_dropped']} {name} examples were dropped as too long"
    if report["findings"]:
        yield (
            f"{len(report['findings'])} findings about its question sets; fedlora check lists them"
        )
    if report["unscored_conflicts"]:
        count = report["unscored_conflicts"]
        yield f"{count} conflict records have no answer of this client to score"
    for name in ("universal", "local", "conflict"):
        num_answers = report[f"{name}_answers"]
        for what, why in UNREACHABLE.items():
            if count := report[f"{name}_{what}_answers"]:
                yield f"{count} of {num_answers} right {name} answers {why}"
        if 2 * report[f"{name}_open_answers"] > num_answers:
            yield f"most right {name} answers are long or free, so they are ranked first of all"
    if report["skipped_records"]:
        yield f"{report['skipped_records']} invalid records were skipped"
