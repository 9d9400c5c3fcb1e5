"""What a phase trains on: whose data, how many steps, and what the planner counts of it."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_config

from fedlora_app.config.rounds import plan_round
from fedlora_app.data.client_files import ClientExamples
from fedlora_app.data.tokens import Example, TokenizedFile
from fedlora_app.planning.workload import ClientPhase, measure_work
from fedlora_app.training.batches import split_into_packs, step_batches, tokens_per_micro_batch
from fedlora_app.training.packing import group_by_width, pack
from fedlora_app.training.selection import data_owners, select_phase

TOKENS = {"ann": 1, "bob": 2}


def load(owner: str) -> ClientExamples:
    """Return 3 universal and 5 local examples of one owner, of 4 to 25 tokens of its own."""
    examples = [Example([TOKENS[owner]] * (4 + 3 * n), 2) for n in range(8)]
    return ClientExamples(TokenizedFile(examples[:3], 1, 0), TokenizedFile(examples[3:], 10, 0))


def select(mode: str, client: str = "ann", **training):
    config = build_tiny_config(federated={"mode": mode}, training=training)
    plan = plan_round(config, 1)
    phase = plan.train or plan.personalise
    return config, phase, select_phase(config, client, phase, 1, load)


def test_centralized_training_pools_everybody_at_the_first_client_alone():
    config, _, selected = select("centralized")
    assert data_owners(config, "ann") == ["ann", "bob"] and data_owners(config, "bob") == ["bob"]
    assert {example.input_ids[0] for example in selected.examples} == {1, 2}
    assert (len(selected.examples), selected.num_truncated) == (16, 22)
    assert selected.num_steps == 2 * (2 + 4)  # universal, then local with its replay, two a step


@pytest.mark.parametrize(("mode", "count", "truncated"), [("dual", 3, 1), ("fedavg", 8, 11)])
def test_other_modes_train_on_the_clients_own_data(mode, count, truncated):
    _, _, selected = select(mode, "bob")
    assert {example.input_ids[0] for example in selected.examples} == {2}
    assert (len(selected.examples), selected.num_truncated) == (count, truncated)


def test_a_plan_counts_the_steps_tokens_and_packs_of_training():
    config, phase, selected = select("dual", global_epochs=3, max_seq_length=16)
    work = measure_work(ClientPhase("ann", phase, selected), config.training)
    batches = step_batches(selected.examples, config.training, 0)
    packs, tokens = 0, 0
    for _ in range(selected.num_steps):
        batch = next(batches)
        packs += len(split_into_packs(batch, tokens_per_micro_batch(config.training)))
        tokens += sum(len(example.input_ids) for example in batch)
    assert work.steps == selected.num_steps
    assert (work.work.tokens, work.work.micro_batches) == (tokens, packs)


def test_groups_of_a_width_are_those_that_attention_pads():
    lengths = [5, 40, 16, 17, 33, 3, 64]
    groups = group_by_width(lengths)
    packed = pack([Example([1] * n, 1) for n in lengths], torch.device("cpu"))
    found = packed.inputs["packed_groups"].groups
    assert [(group.count, group.width) for group in found] == [
        (len(members), max(lengths[place] for place in members)) for members in groups
    ]
    assert groups == [[0, 2, 5], [1, 4, 6], [3]]
