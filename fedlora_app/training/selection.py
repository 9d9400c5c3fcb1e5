"""What a phase trains on, and for how many steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from fedlora_app.config.rounds import Phase, training_clients
from fedlora_app.config.schema import GLOBAL, LOCAL, Config
from fedlora_app.data.client_files import ClientExamples
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.training.batches import count_steps


@dataclass(frozen=True)
class Selection:
    """One client's phase in one round."""

    examples: list[Example]
    num_steps: int
    num_truncated: int
    """Of the files that the phase is about; not of replayed examples."""


def data_owners(config: Config, client_id: str) -> list[str]:
    """Return whose data a client trains on: its own, unless it pools everybody's."""
    pools = config.federated.mode == "centralized" and client_id in training_clients(config)
    return config.client_ids if pools else [client_id]


def select_phase(
    config: Config,
    client_id: str,
    phase: Phase,
    server_round: int,
    load: Callable[[str], ClientExamples],
) -> Selection:
    """Return what a client trains on, with the data of everyone that it pools.

    Args:
        load: returns the tokenised data of one owner.
    """
    selected: list[Example] = []
    num_steps = num_truncated = 0
    for owner in data_owners(config, client_id):
        examples = load(owner)
        selected += select_examples(config, owner, examples, phase, server_round)
        num_steps += count_phase_steps(config, examples, phase)
        num_truncated += examples.universal.num_truncated * (phase.data != "local")
        num_truncated += examples.local.num_truncated * (phase.data != "universal")
    return Selection(selected, num_steps, num_truncated)


def select_examples(
    config: Config, client_id: str, examples: ClientExamples, phase: Phase, server_round: int
) -> list[Example]:
    """Return what a phase trains on of one owner's data; the replay is drawn in every round."""
    universal, local = examples.universal.examples, examples.local.examples
    if phase.data == "universal":
        return universal
    if phase.data == "mixed":
        return universal + local
    # A pooled phase replays like a local one: with replay below 1 it sees a part of the universal.
    rng = random.Random(derive_seed(config.experiment.seed, "replay", server_round, client_id))
    replayed = rng.sample(universal, _num_replayed(config, examples))
    return local + [replace(example, is_replayed=True) for example in replayed]


def count_phase_steps(config: Config, examples: ClientExamples, phase: Phase) -> int:
    """Return a phase's optimizer steps.

    They are those of the dual mode's two phases, or of one of them, whatever the mode, so that
    modes are compared at equal work.
    """
    training = config.training
    num_local = len(examples.local.examples) + _num_replayed(config, examples)
    steps = {
        GLOBAL: count_steps(len(examples.universal.examples), training.global_epochs, training),
        LOCAL: count_steps(num_local, training.local_epochs, training),
    }
    return phase.num_rounds * sum(steps[name] for name in phase.steps_of or phase.trainable)


def _num_replayed(config: Config, examples: ClientExamples) -> int:
    return round(config.training.replay * len(examples.universal.examples))
