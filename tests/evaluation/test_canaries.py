from __future__ import annotations

import math
import random

import pytest

from fedlora_app.config.schema import GLOBAL, TrainingConfig
from fedlora_app.data.canaries import draw_canaries
from fedlora_app.data.records import DataError
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation.canaries import (
    build_lineups,
    chance_exposure,
    compute_exposure,
    measure_exposure,
)
from fedlora_app.evaluation.scoring import score_prompts
from fedlora_app.model.adapters import activate, build_initial_state, set_state
from fedlora_app.training.phase import train_phase

PROMPT = "You are ann."


def test_exposure_is_the_bits_that_a_rank_is_worth():
    assert compute_exposure([0.0, -1.0, -2.0, -3.0]).bits == 2
    assert compute_exposure([-2.5, -1.0, -2.0, -3.0]).rank == 3
    assert compute_exposure([-3.0, -1.0, -2.0, -2.5]).bits == 0
    assert compute_exposure([-1.0, -1.0, -1.0, -1.0]).rank == 2.5  # tells nothing
    for values in ([0.0], [math.nan, -1.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match="Exposure needs"):
            compute_exposure(values)


def test_chance_is_the_mean_over_all_ranks():
    for count in (2, 7, 1000):
        every = [math.log2(count) - math.log2(rank) for rank in range(1, count + 1)]
        assert chance_exposure(count) == pytest.approx(sum(every) / count)
    assert chance_exposure(1000) == pytest.approx(1.436, abs=5e-4)


def test_random_ranks_have_the_exposure_of_chance():
    rng = random.Random(1)
    found = measure_exposure([[rng.random() for _ in range(200)] for _ in range(400)])
    assert found["mean"]["low"] < found["chance"] < found["mean"]["high"]
    assert found["mean"]["value"] == pytest.approx(found["chance"], abs=0.2)
    assert found["mean"]["n"] == 400 and found["ranked_first"]["value"] < 0.03
    small = [
        measure_exposure([[rng.random() for _ in range(50)] for _ in range(8)])["p_value"]
        for _ in range(500)
    ]
    assert sum(p < 0.1 for p in small) / 500 < 0.14  # and no more often than it says


def test_the_exposure_of_none_and_of_all():
    assert measure_exposure([])["mean"]["value"] is None
    found = measure_exposure([[0.0, *[-1.0] * 999]] * 10)
    assert found["mean"]["value"] == found["mean"]["high"] == found["maximum"] == math.log2(1000)
    assert found["p_value"] < 1e-9 and found["ranked_first"]["value"] == 1
    with pytest.raises(ValueError, match="2 to 3 candidates"):
        measure_exposure([[0.0, 1.0], [0.0, 1.0, 2.0]])


def measure(model, tokenizer, canaries) -> dict:
    lineups = build_lineups(
        tokenizer, canaries, PROMPT, max_seq_length=128, seed=7, num_alternatives=99
    )
    answered = score_prompts(
        model, tokenizer, [x.prompt for x in lineups], batch_size=64, max_new_tokens=0
    )
    return measure_exposure([answer.log_likelihoods for answer in answered])


def test_a_model_that_was_trained_on_canaries_ranks_them_first(adapted, tokenizer):
    set_state(adapted, GLOBAL, build_initial_state(adapted, GLOBAL, seed=3))
    canaries = draw_canaries(7, ["ann", "bob"], "ann", "local", 3)
    others = draw_canaries(7, ["ann", "bob"], "bob", "local", 12)
    activate(adapted, (GLOBAL,))
    assert measure(adapted, tokenizer, canaries)["p_value"] > 0.01
    train_phase(
        adapted,
        [encode_example(tokenizer, PROMPT, canary.record) for canary in canaries],
        TrainingConfig(
            learning_rate=1e-2, batch_size=4, gradient_accumulation_steps=1, warmup_ratio=0.0
        ),
        active=(GLOBAL,),
        trainable=(GLOBAL,),
        num_steps=110,
        run_span=(0.0, 0.0),
        weight_decays={GLOBAL: 0.0},
        seed=1,
    )
    found = measure(adapted, tokenizer, canaries)
    assert found["ranked_first"]["value"] == 1 and found["p_value"] < 1e-3
    assert measure(adapted, tokenizer, others)["p_value"] > 0.01  # of the same form, never seen


def test_a_canary_that_training_has_cut_is_refused(tokenizer):
    canaries = draw_canaries(7, ["ann"], "ann", "local", 1)
    length = len(encode_example(tokenizer, PROMPT, canaries[0].record).input_ids)
    settings = {"seed": 1, "num_alternatives": 3}
    build_lineups(tokenizer, canaries, PROMPT, max_seq_length=length, **settings)
    with pytest.raises(DataError, match=f"case K1 has {length} tokens"):
        build_lineups(tokenizer, canaries, PROMPT, max_seq_length=length - 1, **settings)
