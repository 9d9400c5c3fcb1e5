"""What one client of four that sends poison does to the global adapter, by what is set against it.

The demo's four cities train the global adapter for a few rounds by the clients' and the server's
own code, without Flower between. The last client sends something else than its update, in every
round: the update many times over, its opposite, or random numbers. What is measured is how far the
final global adapter lies from that of the same number of rounds without poison, as a share of how
far that has moved in all, and of how many universal questions it ranks the right answer first.
Honest updates are computed once for each adapter that they begin with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.two_processes import quiet
from fedlora_app.client import Client
from fedlora_app.config.loading import load_config
from fedlora_app.config.participation import weigh
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.federation.aggregation import Aggregation
from fedlora_app.federation.messages import MessageError
from fedlora_app.federation.packed_state import pack_state
from fedlora_app.federation.replies import Reply
from fedlora_app.foundation.project import find_project_root
from fedlora_app.foundation.seeds import derive_seed
from fedlora_app.model.adapter_state import AdapterState, compute_norm
from fedlora_app.model.adapters import attach_once, build_initial_state
from fedlora_app.model.base import load_base_model

EXPERIMENT = "data/demo-4/experiment.yaml"
HONEST = "none"
ACCURACY = "global+local/universal/rank_accuracy"
"""With a local adapter as it begins, which adds nothing."""
Poison = Callable[[AdapterState], AdapterState]


def times(factor: float) -> Poison:
    """Return what sends an update so many times over."""
    return lambda update: {key: factor * tensor for key, tensor in update.items()}


def draw_random(update: AdapterState) -> AdapterState:
    """Return random numbers of ten times an update's norm."""
    generator = torch.Generator().manual_seed(0)
    noise = {k: torch.randn(t.shape, generator=generator) for k, t in update.items()}
    return times(10 * compute_norm(update) / compute_norm(noise))(noise)


POISONS: dict[str, Poison] = {
    HONEST: times(1),
    "10 times": times(10),
    "100 times": times(100),
    "its opposite": times(-1),
    "random, 10 times its norm": draw_random,
}
DEFENCES = {
    "fedavg": "",
    "median": "federated.aggregation=median",
    "trimmed-mean": "federated.aggregation=trimmed-mean federated.trim_share=0.25",
    "max_norm_ratio: 3": "federated.max_norm_ratio=3",
    "and max_update_norm": "federated.max_norm_ratio=3 federated.max_update_norm={largest}",
    "clip_norm": "privacy.unit=client privacy.clip_norm={largest}",
}
ROOM = 1.5
"""Of ``max_update_norm``, over the largest norm of an honest update."""


class Federation:
    """Four cities, of which the last may send poison."""

    def __init__(self, folder: Path, num_rounds: int, max_steps: int) -> None:
        self.root = find_project_root()
        self._settings = (
            f"federated.num_rounds={num_rounds} training.max_steps={max_steps} "
            "data.conflict_test=null federated.clients.0.local_test=null"  # not asked about here
        )
        self._folder = folder
        self._sent: list[tuple[AdapterState, str, tuple[AdapterState, int]]] = []
        config = self._configure("")
        loaded = load_base_model(config.model, self.root)
        model = attach_once(loaded, config.adapters)
        seed = derive_seed(config.experiment.seed, "initial")
        self.initial = build_initial_state(model, GLOBAL, seed)
        self.largest_norm = 0.0

    def run(self, defence: str, poison: Poison) -> dict[str, Any]:
        """Return the final global adapter, its accuracy and how many updates were refused."""
        config = self._configure(DEFENCES[defence])
        shapes = {key: tensor.shape for key, tensor in self.initial.items()}
        aggregation, state, num_refused = Aggregation(config, shapes), self.initial, 0
        *_, poisoner = config.client_ids
        for server_round in range(1, config.federated.num_rounds + 1):
            aggregation.begin(state, server_round)
            for client in config.client_ids:
                update, num_examples = self._train(config, client, server_round, state)
                if client == poisoner:
                    update = poison(update)
                try:
                    reply = Reply(client, {}, {}, pack_state(update))
                    aggregation.add(reply, weigh(config, client, num_examples))
                except MessageError:
                    num_refused += 1
            state = aggregation.result()
        return {"state": state, "accuracy": self._evaluate(config, state), "refused": num_refused}

    def _configure(self, overrides: str) -> Config:
        largest = f"{ROOM * self.largest_norm:.6g}" if "{" in overrides else ""
        given = f"{self._settings} {overrides.format(largest=largest)}"
        return load_config(self.root / EXPERIMENT, given)

    def _client(self, config: Config, client: str) -> Client:
        return Client(config, client, self._folder, self.root)

    def _train(
        self, config: Config, client: str, server_round: int, state: AdapterState
    ) -> tuple[AdapterState, int]:
        """Return an honest update and the number of its examples."""
        what = f"{client} {server_round}"
        for before, name, sent in self._sent:
            if name == what and all(torch.equal(before[key], state[key]) for key in state):
                return sent
        with quiet():
            update, metrics, _ = self._client(config, client).train(server_round, state, {})
        sent = (update, metrics["num-examples"])
        self._sent.append((state, what, sent))
        return sent

    def note_largest(self) -> None:
        """Take the updates that were sent until now for honest ones."""
        self.largest_norm = max(compute_norm(update) for _, _, (update, _) in self._sent)

    def _evaluate(self, config: Config, state: AdapterState) -> float:
        with quiet():
            metrics = self._client(config, config.client_ids[0]).evaluate(state, {})
        return metrics[ACCURACY]


def measure(
    num_rounds: int = 3, max_steps: int = 20, poisons: tuple[str, ...] = tuple(POISONS)
) -> dict[str, Any]:
    """Run every poison against every defence."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder), num_rounds, max_steps)
        honest = federation.run("fedavg", POISONS[HONEST])
        federation.note_largest()
        moved = _distance(honest["state"], federation.initial)
        for poison in poisons:
            for defence in DEFENCES:
                found = federation.run(defence, POISONS[poison])
                distance = _distance(found.pop("state"), honest["state"]) / moved
                rows.append({"poison": poison, "defence": defence, "distance": distance, **found})
                print(f"{poison}, {defence}: {distance:.2f}", flush=True)
    return {
        "compared": "the final global adapter with that of a federation without poison",
        "num_rounds": num_rounds,
        "max_steps": max_steps,
        "largest_honest_norm": federation.largest_norm,
        "rows": rows,
    }


def describe(figures: dict[str, Any]) -> str:
    """Return a row for each poison and a column for each defence."""
    rows = figures["rows"]
    lines = [
        f"{figures['num_rounds']} rounds of {figures['max_steps']} steps; distance from the honest "
        "adapter, and questions with the right answer first; (updates refused)",
        "",
        f"| the fourth client sends | {' | '.join(DEFENCES)} |",
        "|---" * (1 + len(DEFENCES)) + "|",
    ]
    for poison in dict.fromkeys(row["poison"] for row in rows):
        cells = [
            f"{row['distance']:.2f}, {100 * row['accuracy']:.0f} %"
            + (f" ({row['refused']})" if row["refused"] else "")
            for row in rows
            if row["poison"] == poison
        ]
        lines.append(f"| {'its update' if poison == HONEST else poison} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _distance(one: AdapterState, other: AdapterState) -> float:
    return compute_norm({key: one[key] - other[key] for key in one})
