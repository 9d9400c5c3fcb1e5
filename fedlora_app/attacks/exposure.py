"""How much of a client's canaries its update, the average and its own local adapter remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from fedlora_app.attacks.observed import Observed
from fedlora_app.attacks.results import AVERAGE, BEFORE, LOCAL_ALONE, UPDATE
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.canaries import ROLES, load_canaries
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.canaries import build_lineups, measure_exposure
from fedlora_app.evaluation.choices import SavedRound
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.scoring import score_prompts
from fedlora_app.model.adapter_state import AdapterState
from fedlora_app.model.adapters import AdaptedModel, only_adapters, set_state


def measure_canaries(
    saved: SavedRound,
    model: SavedModel,
    observed: Observed,
    report: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Yield a row per client with canaries, the file they lie in, and who is asked.

    ``update``: the adapter that the client's update of the round leads to; ``average``: the global
    adapter after it; ``before``: that before it; ``local``: the client's own local adapter after
    the run's final round, alone.
    """
    loaded, adapted = model.load()
    config = saved.run.config
    for client, files in saved.files.items():
        canaries = load_canaries(files)
        lineups = build_lineups(
            loaded.tokenizer,
            canaries,
            config.client(client).system_prompt,
            max_seq_length=config.training.max_seq_length,
            seed=config.experiment.seed,
        )
        if not lineups:
            continue
        asked = _models(saved, model, adapted, observed, client)
        for turn, (source, answering) in enumerate(asked.items()):
            report(f"round {observed.server_round}, canaries", turn, len(asked))
            with answering() as answers:
                scored = score_prompts(
                    answers,
                    loaded.tokenizer,
                    [lineup.prompt for lineup in lineups],
                    batch_size=config.evaluation.batch_size,
                    max_new_tokens=0,
                )
            for role in ROLES:
                values = [
                    answered.log_likelihoods
                    for lineup, answered in zip(lineups, scored, strict=True)
                    if lineup.canary.role == role
                ]
                if values:
                    about = {"client": client, "role": role, "source": source}
                    yield {**about, "rounds": observed.server_round, **measure_exposure(values)}


def _models(
    saved: SavedRound,
    model: SavedModel,
    adapted: AdaptedModel,
    observed: Observed,
    client: str,
) -> dict[str, Callable[[], AbstractContextManager[AdaptedModel]]]:
    states = {BEFORE: observed.before, AVERAGE: observed.average}
    if client in observed.reached:
        states[UPDATE] = observed.reached[client]
    found = {source: partial(_global_alone, adapted, state) for source, state in states.items()}
    if LOCAL in saved.trained:
        found[LOCAL_ALONE] = partial(_local_alone, model, client)
    return found


@contextmanager
def _global_alone(model: AdaptedModel, state: AdapterState) -> Iterator[AdaptedModel]:
    set_state(model, GLOBAL, state)
    with only_adapters(model, [GLOBAL]):
        yield model


@contextmanager
def _local_alone(model: SavedModel, client: str) -> Iterator[AdaptedModel]:
    with model.answering(Answering(local=client)) as (answers, _):
        yield answers
