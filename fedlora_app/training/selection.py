"""What a phase trains on, and for how many steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedlora_app.config.participation import find_span, training_clients
from fedlora_app.config.rounds import Phase, plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, Config, TrainingConfig
from fedlora_app.config.sharing import learning_factors
from fedlora_app.data.client_files import ClientExamples
from fedlora_app.data.tokens import Example
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.training.batches import count_steps, examples_per_step

MANY_STEPS = 1000
"""In one phase of one round; more are worth a line."""


@dataclass(frozen=True)
class Selection:
    """One client's phase in one round."""

    examples: list[Example]
    num_steps: int
    num_truncated: int
    """Of the files that the phase is about; not of replayed examples."""
    num_universal: int
    num_local: int
    """Examples that there are, whatever the phase is about."""


def data_owners(config: Config, client_id: str) -> list[str]:
    """Return whose data a client trains on: its own, unless it pools everybody's."""
    pools = config.federated.mode == "centralized" and client_id in training_clients(config, 1)
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
    first, last = find_span(config, client_id)  # a copy takes the steps of its rounds alone
    phase = replace(phase, num_rounds=min(phase.num_rounds, last - first + 1))
    selected: list[Example] = []
    num_steps = num_truncated = num_universal = num_local = 0
    for owner in data_owners(config, client_id):
        examples = load(owner)
        selected += select_examples(config, owner, examples, phase, server_round)
        counts = (len(examples.universal.examples), len(examples.local.examples))
        num_universal, num_local = num_universal + counts[0], num_local + counts[1]
        num_steps += count_phase_steps(config, *counts, phase)
        num_truncated += examples.universal.num_truncated * (phase.data != "local")
        num_truncated += examples.local.num_truncated * (phase.data != "universal")
    return Selection(selected, num_steps, num_truncated, num_universal, num_local)


def select_examples(
    config: Config, client_id: str, examples: ClientExamples, phase: Phase, server_round: int
) -> list[Example]:
    """Return what a phase trains on of one owner's data; the replay is drawn in every round."""
    universal, local = examples.universal.examples, examples.local.examples
    if phase.data == "universal":
        return universal
    if phase.data == "mixed":
        return universal + local
    rng = random.Random(derive_seed(config.experiment.seed, "replay", server_round, client_id))
    replayed = rng.sample(universal, count_replayed(config.training, len(universal), len(local)))
    beside = [replace(example, is_replayed=True) for example in replayed]
    if examples.public is not None and phase.trainable == (LOCAL,) and GLOBAL in phase.active:
        rng = random.Random(derive_seed(config.experiment.seed, "public", server_round, client_id))
        public = examples.public.examples
        passes = math.ceil(len(local) / len(public))
        drawn = [e for _ in range(passes) for e in rng.sample(public, len(public))][: len(local)]
        beside += [replace(example, is_public=True) for example in drawn]
    return local + beside


def take_part(
    selected: Selection, config: Config, client_id: str, phase: Phase, server_round: int
) -> list[Example]:
    """Return the examples that a phase gets to in this round.

    All, unless training.max_steps is too small for that. Then each round takes up where the last
    one stopped, in an order of the whole run, so that all are seen in turn; where factors of the
    global adapter learn in turn, by each of them. Replayed and public ones, which every round draws
    anew, have their share of the steps.
    """
    examples, room = selected.examples, selected.num_steps * examples_per_step(config.training)
    if room >= len(examples):
        return examples
    fixed = [example for example in examples if example.is_own]
    replayed = [example for example in examples if example.is_replayed]
    public = [example for example in examples if example.is_public]
    public = public[: round(room * len(public) / len(examples))]
    room -= len(public)
    num_replayed = round(room * len(replayed) / (len(fixed) + len(replayed)))
    size = min(max(room - num_replayed, 1), len(fixed))
    random.Random(derive_seed(config.experiment.seed, "part", phase.name, client_id)).shuffle(fixed)
    start = _count_turns(config, phase, server_round) * size
    part = [fixed[(start + offset) % len(fixed)] for offset in range(size)]
    return part + replayed[: room - size] + public


def _count_turns(config: Config, phase: Phase, server_round: int) -> int:
    """Return in how many earlier rounds the same learnt."""
    earlier = range(1, server_round)
    if GLOBAL not in phase.trainable:
        return len(earlier)
    return sum(learning_factors(config, number) == phase.factors for number in earlier)


def count_phase_steps(config: Config, num_universal: int, num_local: int, phase: Phase) -> int:
    """Return a phase's optimizer steps with so many universal and local examples.

    They are those of the dual mode's two phases, or of one of them, whatever the mode, so that
    modes are compared at equal work.
    """
    training = config.training
    num_beside = num_local + count_replayed(training, num_universal, num_local)
    num_beside += num_local * (config.data.public is not None)
    steps = {
        GLOBAL: count_steps(num_universal, training.global_epochs, training),
        LOCAL: count_steps(num_beside, training.local_epochs, training),
    }
    most = training.max_steps or max(steps.values())
    capped = sum(min(steps[name], most) for name in phase.steps_of or phase.trainable)
    return phase.num_rounds * capped


def count_replayed(training: TrainingConfig, num_universal: int, num_local: int) -> int:
    """Return how many universal examples a local phase repeats."""
    wanted = round(training.replay * num_universal)
    if training.max_replay_ratio is None:
        return wanted
    return min(wanted, math.floor(training.max_replay_ratio * num_local))


def describe_long_phases(config: Config, examples: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Yield a line where a round has very many steps and nothing says that it may.

    Args:
        examples: how many universal and local ones each client has, of those that are known.
    """
    if config.training.max_steps is not None or not examples:
        return
    plans = [plan_round(config, number) for number in (1, config.federated.num_rounds)]
    phases = [phase for plan in plans for phase in (plan.train, plan.personalise)]
    for phase in dict.fromkeys(phases):
        if phase is None:
            continue
        steps = {c: count_phase_steps(config, *counts, phase) for c, counts in examples.items()}
        client = max(steps, key=steps.__getitem__)
        if steps[client] > MANY_STEPS:
            yield (
                f"Note: a {phase.name} phase of {client} has {steps[client]:,} steps a round; "
                "training.max_steps limits them, and each round then trains on another part."
            )
