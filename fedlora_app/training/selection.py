"""What a phase trains on, and for how many steps."""

from __future__ import annotations

import random
from dataclasses import replace

from fedlora_app.config.rounds import Phase
from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientExamples
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.training.phase import count_steps


def select_examples(
    config: Config, client_id: str, examples: ClientExamples, phase: Phase, server_round: int
) -> list[Example]:
    """Return what one phase trains on. The replayed share is drawn again in every round."""
    universal, local = examples.universal.examples, examples.local.examples
    if phase.data == "universal":
        return universal
    if phase.data == "mixed":
        return universal + local
    rng = random.Random(derive_seed(config.experiment.seed, "replay", server_round, client_id))
    replayed = rng.sample(universal, _num_replayed(config, examples))
    return local + [replace(example, is_replayed=True) for example in replayed]


def count_phase_steps(config: Config, examples: ClientExamples, phase: Phase) -> int:
    """Return a phase's optimizer steps.

    A mode with one phase takes as many steps as both phases of the dual mode together, so
    that modes are compared at equal work.
    """
    training = config.training
    universal = count_steps(len(examples.universal.examples), training.global_epochs, training)
    num_local = len(examples.local.examples) + _num_replayed(config, examples)
    local = count_steps(num_local, training.local_epochs, training)
    return {"universal": universal, "local": local}.get(phase.data, universal + local)


def _num_replayed(config: Config, examples: ClientExamples) -> int:
    return round(config.training.replay * len(examples.universal.examples))
