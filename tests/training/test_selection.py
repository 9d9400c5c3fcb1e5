"""What a phase trains on: whose data, how many steps, and what the planner counts of it."""

from __future__ import annotations

from collections import Counter
from itertools import product
from operator import attrgetter
from typing import get_args

import pytest
import torch
from conftest import ALIKE, build_tiny_config

from fedlora_app.config.loading import parse_config
from fedlora_app.config.participation import members, training_clients
from fedlora_app.config.rounds import BOTH, Phase, plan_round
from fedlora_app.config.schema import GLOBAL, LOCAL, Mode
from fedlora_app.data.client_files import ClientExamples
from fedlora_app.data.tokens import Example, TokenizedFile
from fedlora_app.planning.workload import ClientPhase, measure_work
from fedlora_app.training.attention import group_by_width
from fedlora_app.training.batches import split_into_packs, step_batches, tokens_per_micro_batch
from fedlora_app.training.layout import pack
from fedlora_app.training.selection import (
    count_replayed,
    data_owners,
    describe_long_phases,
    select_phase,
    take_part,
)

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


def test_the_mixed_schedule_takes_dual_s_steps_on_all_data():
    phased, mixed = (
        build_tiny_config(training={"schedule": s, "replay": 0.4, "local_mixing_weight": 0.3})
        for s in ("phased", "mixed")
    )
    for phase in ("train", "personalise"):
        ours, theirs = (getattr(plan_round(c, 1), phase) for c in (mixed, phased))
        assert (ours.active, ours.trainable) == (theirs.active, theirs.trainable)
        selected = select_phase(mixed, "bob", ours, 1, load)
        assert len(selected.examples) == 8  # 3 universal and 5 local
        assert selected.num_steps == select_phase(phased, "bob", theirs, 1, load).num_steps
    assert plan_round(mixed, 1).personalise.weights == (0.7, 0.3)
    assert plan_round(mixed, 1).train.weights == (1.0, 1.0)


@pytest.mark.parametrize(("replay", "num_local_steps"), [(1.0, 4), (0.0, 3)])
def test_centralized_training_pools_everybody_at_the_first_client_alone(replay, num_local_steps):
    config, _, selected = select("centralized", replay=replay)
    assert data_owners(config, "ann") == ["ann", "bob"] and data_owners(config, "bob") == ["bob"]
    assert {example.input_ids[0] for example in selected.examples} == {1, 2}
    assert selected.num_truncated == 22
    universal, local = 3, 5
    assert len(selected.examples) == 2 * (universal + local)  # whatever a local phase replays
    assert selected.num_steps == 2 * (2 + num_local_steps)  # of dual's two phases, two a step


@pytest.mark.parametrize(("mode", "count", "truncated"), [("dual", 3, 1), ("fedavg", 8, 11)])
def test_other_modes_train_on_the_clients_own_data(mode, count, truncated):
    _, _, selected = select(mode, "bob")
    assert {example.input_ids[0] for example in selected.examples} == {2}
    assert (len(selected.examples), selected.num_truncated) == (count, truncated)


@pytest.mark.parametrize("max_steps", [None, 1])
def test_every_mode_takes_as_many_steps_in_a_run(max_steps):
    """Of ann's 3 universal and 5 local examples, 3 replayed, 2 a step; and of bob's likewise."""
    found = {}
    modes = [mode for mode in get_args(Mode) if mode != "adapted"]  # which has a global adapter
    for mode in modes:
        config = build_tiny_config(
            federated={"mode": mode, "num_rounds": 3},
            training={"max_steps": max_steps, "global_epochs": 3},
            adapters=ALIKE,
        )
        found[mode] = 0
        for server_round in (1, 2, 3):
            plan = plan_round(config, server_round)
            for phase, clients in (
                (plan.train, training_clients(config, server_round)),
                (plan.personalise, config.client_ids),
            ):
                for client in clients if phase else []:
                    found[mode] += select_phase(config, client, phase, server_round, load).num_steps
    per_client = 3 * (6 + 4) if max_steps is None else 3 * (1 + 1)
    assert found == dict.fromkeys(modes, 2 * per_client)


def test_a_copy_of_a_client_that_came_later_takes_no_more_steps_than_dual():
    found = {}
    for mode in ("dual", "finetuned"):
        raw = build_tiny_config(federated={"mode": mode, "num_rounds": 3}, adapters=ALIKE).dump()
        raw["federated"]["clients"][1]["first_round"] = 3
        config = parse_config(raw)
        found[mode] = sum(
            select_phase(config, client, phase, server_round, load).num_steps
            for server_round in (1, 2, 3)
            for client in members(config, server_round)
            for plan in [plan_round(config, server_round)]
            for phase in (plan.train, plan.personalise)
            if phase is not None
        )
    assert found["finetuned"] == found["dual"]


@pytest.mark.parametrize(
    ("replay", "ratio", "replayed"), [(1.0, None, 90), (1.0, 1.5, 60), (0.5, 1.5, 45), (0, 1.5, 0)]
)
def test_replay_is_limited_by_the_local_records(replay, ratio, replayed):
    training = build_tiny_config(training={"replay": replay, "max_replay_ratio": ratio}).training
    assert count_replayed(training, 90, 40) == replayed


def test_public_records_are_drawn_anew_beside_the_local_ones_and_by_nobody_else():
    tokens = ClientExamples(
        *(TokenizedFile(number(n, first), 0, 0) for n, first in ((3, 0), (5, 100), (40, 200)))
    )
    config = build_tiny_config(
        training={"local_kl_weight": 1.0, "replay": 0}, data={"public": "public.json"}
    )
    plan = plan_round(config, 1)
    drawn = []
    for server_round in (1, 1, 2):
        found = select_phase(config, "ann", plan.personalise, server_round, lambda owner: tokens)
        public = [e.input_ids[0] for e in found.examples if e.is_public]
        assert all(200 <= n < 240 for n in public) and len(public) == 5
        assert [e.input_ids[0] for e in found.examples if e.is_own] == list(range(100, 105))
        assert found.num_steps == 5  # ten examples, two a step
        drawn.append(public)
    assert drawn[0] == drawn[1] != drawn[2]
    for mode, schedule in product(get_args(Mode), ("phased", "joint")):
        other = build_tiny_config(
            training={"local_kl_weight": 1.0, "replay": 0, "schedule": schedule},
            data={"public": "public.json"},
            federated={"mode": mode},
            adapters=ALIKE,
        )
        for server_round in (1, 2):
            plan = plan_round(other, server_round)
            for phase in filter(None, (plan.train, plan.personalise)):
                found = select_phase(other, "ann", phase, server_round, lambda owner: tokens)
                holds = phase == Phase(BOTH, (LOCAL,), "local")
                assert any(e.is_public for e in found.examples) == holds


@pytest.mark.parametrize("max_steps", [10, 20, 30, 39])
def test_limited_rounds_have_each_kinds_share(max_steps):
    tokens = ClientExamples(*(TokenizedFile(number(40, first), 0, 0) for first in (0, 100, 200)))
    training = {"local_kl_weight": 1.0, "replay": 1.0, "max_steps": max_steps}
    config = build_tiny_config(training=training, data={"public": "public.json"})
    phase = plan_round(config, 1).personalise
    selected = select_phase(config, "ann", phase, 1, lambda owner: tokens)
    part = take_part(selected, config, "ann", phase, 1)
    kinds = [sum(map(has, part)) for has in KINDS]
    assert sum(kinds) == len(part) == 2 * max_steps
    assert max(kinds) - min(kinds) <= 1


KINDS = (attrgetter("is_own"), attrgetter("is_replayed"), attrgetter("is_public"))


@pytest.mark.parametrize("num_public", [40, 10, 2])
def test_no_public_record_is_drawn_again_before_all_the_others(num_public):
    sizes = ((3, 0), (11, 100), (num_public, 200))
    tokens = ClientExamples(*(TokenizedFile(number(n, f), 0, 0) for n, f in sizes))
    config = build_tiny_config(
        training={"local_kl_weight": 1.0, "replay": 0}, data={"public": "public.json"}
    )
    phase = plan_round(config, 1).personalise
    found = select_phase(config, "ann", phase, 1, lambda owner: tokens)
    drawn = Counter(e.input_ids[0] for e in found.examples if e.is_public)
    assert drawn.total() == 11 and len(drawn) == min(num_public, 11)
    assert max(drawn.values()) - min(drawn.values()) <= 1


def number(count: int, first: int = 0) -> list[Example]:
    """Return examples of which each can be told from the others."""
    return [Example([first + n] * 4, 2) for n in range(count)]


def parts_of_rounds(data: str, **training):
    """Return what each of 6 rounds trains on, of 10 universal and 20 local examples, by number."""
    tokens = ClientExamples(
        TokenizedFile(number(10), 0, 0), TokenizedFile(number(20, first=100), 0, 0)
    )
    config = build_tiny_config(federated={"num_rounds": 6}, training=training)
    phase = Phase((GLOBAL,), (GLOBAL,), data, (GLOBAL if data == "universal" else LOCAL,))
    parts = []
    for server_round in range(1, 7):
        selected = select_phase(config, "ann", phase, server_round, lambda owner: tokens)
        part = take_part(selected, config, "ann", phase, server_round)
        assert len({example.input_ids[0] for example in part}) == len(part)
        parts.append([example.input_ids[0] for example in part])
    return parts


def test_limited_rounds_go_on_where_the_last_one_stopped():
    parts = parts_of_rounds("universal", max_steps=2)  # 4 of 10
    assert all(len(part) == 4 for part in parts)
    assert len({n for part in parts[:2] for n in part}) == 8
    assert {n for part in parts[:3] for n in part} == set(range(10))
    assert parts == parts_of_rounds("universal", max_steps=2)
    assert parts[0] != sorted(parts[0]), "the order is not the file's"


def test_factors_that_learn_in_turn_see_the_same_examples():
    tokens = ClientExamples(TokenizedFile(number(10), 0, 0), TokenizedFile(number(4), 0, 0))
    federated = {"num_rounds": 8, "aggregation": "alternate"}
    config = build_tiny_config(federated=federated, training={"max_steps": 2, "batch_size": 2})
    seen = {("A",): [], ("B",): []}
    for server_round in range(1, 9):
        phase = plan_round(config, server_round).train
        selected = select_phase(config, "ann", phase, server_round, lambda owner: tokens)
        part = take_part(selected, config, "ann", phase, server_round)
        seen[tuple(f.removeprefix("lora_") for f in phase.factors)].append(
            [example.input_ids[0] for example in part]
        )
    first, second = seen.values()
    assert first == second and {n for part in first for n in part} == set(range(10))


def test_replayed_examples_keep_their_share_and_are_drawn_anew_in_every_round():
    parts = parts_of_rounds("local", max_steps=6)  # 12 of 20 local and 10 replayed ones
    replayed = [[n for n in part if n < 100] for part in parts]
    assert [len(part) for part in parts] == [12] * 6 and {len(part) for part in replayed} == {4}
    assert len({tuple(sorted(part)) for part in replayed}) > 3
    assert {n for part in parts[:3] for n in part if n >= 100} == set(range(100, 120))


def test_all_examples_are_taken_where_there_are_steps_for_a_pass():
    for training in ({}, {"max_steps": 5}, {"max_steps": 9, "global_epochs": 4}):
        assert parts_of_rounds("universal", **training) == [list(range(10))] * 6


def test_thousands_of_steps_are_pointed_out_unless_they_are_limited():
    counts = {"ann": (100_000, 50), "bob": (10, 10)}
    (note,) = describe_long_phases(build_tiny_config(training={"max_replay_ratio": 1.0}), counts)
    assert "a global phase of ann has 50,000 steps a round; training.max_steps" in note
    config = build_tiny_config(training={"max_steps": 2000})
    assert not list(describe_long_phases(config, counts))


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
