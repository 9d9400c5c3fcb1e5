"""``fedlora plan --measure`` on tiny models: real steps and answers, and what follows from them."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from conftest import build_tiny_config

from fedlora_app import cli as command
from fedlora_app.config.schema import ModelConfig
from fedlora_app.model.base import load_base_model, settle_base
from fedlora_app.planning.measured_text import describe_measurement
from fedlora_app.planning.measurement import (
    LONGEST,
    MEDIAN,
    MeasuredAnswers,
    choose_examples,
    compute_times,
    measure_run,
)
from fedlora_app.planning.plan import build_plan
from fedlora_app.planning.random_base import build_random_base
from fedlora_app.planning.suggestions import suggest_changes
from fedlora_app.planning.workload import load_client_phases
from fedlora_app.training.activations import PlanError

CPU = torch.device("cpu")
PHASES = {(phase, kind) for phase in ("global", "local") for kind in (LONGEST, MEDIAN)}


def measure(project, config, **settings):
    plan = build_plan(config, project)
    arguments = {"is_random": False, "report": lambda *_: None} | settings
    return plan, measure_run(config, project, plan, **arguments)


@pytest.fixture
def shape_only(tiny_project, tmp_path):
    """A project whose base model has a configuration and a tokenizer, and no weights."""
    project = shutil.copytree(tiny_project, tmp_path / "project", dirs_exist_ok=True)
    for weights in project.glob("model/*.safetensors"):
        weights.unlink()
    return project


@pytest.mark.slow
def test_random_weights_need_the_configuration_and_tokenizer_alone(shape_only):
    config = build_tiny_config()
    told = []
    plan, found = measure(shape_only, config, is_random=True, report=lambda *a: told.append(a))
    assert set(found.steps) <= PHASES and ("local", LONGEST) in found.steps
    for steps in found.steps.values():
        assert steps.tokens_per_second > 0 and steps.flops_per_step > 0
        assert found.share_of_peak(steps) > 0 and steps.memory_retries == 0
    assert found.answers.num_questions > 0 and found.answers.seconds > 0
    assert found.save_seconds > 0 and found.message_seconds > 0
    assert [done for _, done, _ in told] == list(range(len(told))) and told[0][0] == "loading"
    text = describe_measurement(config, plan, found)
    for part in ("local, longest", "planned", "A round:", "The whole run of 2 rounds", "random"):
        assert part in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(json.dumps(found.dump()))["times"]["round"] == found.times.round


@pytest.mark.parametrize("is_4bit", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_random_base_is_of_the_models_shape(tiny_model, is_4bit, is_tied):
    config = tiny_model.config
    config.tie_word_embeddings = is_tied
    dtype = torch.bfloat16 if is_4bit else torch.float32
    model, again = (
        settle_base(build_random_base(config, CPU, dtype, is_4bit), ModelConfig(), CPU)
        for _ in range(2)
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) is is_tied and type(head) is torch.nn.Linear
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == ("Linear4bit" if is_4bit else "Linear")
    ids = torch.tensor([[1, 2, 3]])
    logits = model(input_ids=ids).logits
    assert logits.isfinite().all() and logits.std() > 0
    assert torch.equal(logits, again(input_ids=ids).logits)


def test_memory_that_runs_out_is_met_as_a_client_meets_it(tiny_project, capsys):
    """The smaller batches that fitted are what it would change."""
    config = build_tiny_config(training={"max_seq_length": 48})  # two are 74 or more
    decoder = load_base_model(config.model, tiny_project).model.base_model

    def check(module, args, settings):
        if settings["input_ids"].shape[1] > 60 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = decoder.register_forward_pre_hook(check, with_kwargs=True)
    try:
        plan, found = measure(tiny_project, config)
    finally:
        handle.remove()
    assert any(steps.memory_retries for steps in found.steps.values())
    assert "longest examples: out of memory with batches of 2" in capsys.readouterr().out
    suggestion = suggest_changes(config, plan, found)[0]
    assert suggestion.settings["training.batch_size"] == 1
    assert suggestion.settings["training.gradient_accumulation_steps"] == 2
    assert "training.batch_size=1" in describe_measurement(config, plan, found)


def test_memory_that_never_suffices_ends_the_measurement(tiny_project):
    config = build_tiny_config()
    decoder = load_base_model(config.model, tiny_project).model.base_model

    def fail(*args, **settings):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = decoder.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(PlanError, match=r"also with batches of 1 and.*max_seq_length"):
            measure(tiny_project, config)
    finally:
        handle.remove()


def test_steps_that_hide_records_draw_all_of_their_examples(tiny_project):
    """So that it is known what was timed."""
    settings = {"unit": "record", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    plain, private = (
        measure(tiny_project, build_tiny_config(**changes))[1].steps["global", LONGEST]
        for changes in ({}, {"privacy": settings})
    )
    assert private.tokens_per_step == plain.tokens_per_step
    assert 1.4 < private.flops_per_step / plain.flops_per_step < 2
    assert private.seconds_per_step > 0


@pytest.mark.slow
def test_a_runs_time_is_that_of_its_parts(tiny_project):
    """Tokens by their speed, questions by theirs and how often they are asked."""
    evaluation = {"interval": 2, "sample": 4}
    config = build_tiny_config(federated={"num_rounds": 4}, evaluation=evaluation)
    plan, found = measure(tiny_project, config)
    answers = MeasuredAnswers(10, 5.0, 0, 0)  # half a second each
    times = compute_times(config, plan, found.steps, answers, 3.0, 100.0)
    speed = {
        phase: (found.steps.get((phase, MEDIAN)) or found.steps[phase, LONGEST]).tokens_per_second
        for phase in ("global", "local")
    }
    assert times.training == pytest.approx(
        sum(work.work.tokens / speed[work.phase] for work in plan.work)
    )
    assert times.evaluation == 0.5 * 15 and times.last_evaluation == 2 * 0.5 * 19
    assert times.transfer == 6.0
    expected = 100 + 4 * (times.training + 6) + 2 * times.evaluation + times.last_evaluation
    assert times.run == pytest.approx(expected)  # rounds 0 and 2 are asked a sample
    never = build_tiny_config(evaluation={"interval": 0})
    assert compute_times(never, plan, found.steps, answers, 3.0, 0.0).evaluation == 0


@pytest.mark.slow
def test_questions_that_take_too_long_are_to_be_sampled(tiny_project):
    config = build_tiny_config()
    plan, found = measure(tiny_project, config)
    plan.num_questions["ann"]["universal"] = 5000
    slow = MeasuredAnswers(10, 100.0, 0, 0)
    for sample, is_named in ((0, True), (20, False)):
        changed = build_tiny_config(evaluation={"sample": sample})
        times = compute_times(changed, plan, found.steps, slow, 0.0, 0.0)
        suggestions = suggest_changes(
            changed, plan, type(found)(**vars(found) | {"times": times, "answers": slow})
        )
        key = "evaluation.sample"
        named = [s.settings[key] for s in suggestions if key in s.settings]
        assert bool(named) is is_named and all(20 <= n < 5000 for n in named)


def test_steps_are_of_the_longest_and_of_median_examples(tiny_project, tokenizer):
    config = build_tiny_config()
    parts = load_client_phases(config, tokenizer, tiny_project)
    phase = parts[-1].phase
    examples = [e for part in parts if part.phase == phase for e in part.selection.examples]
    lengths = sorted(len(example.input_ids) for example in examples)
    chosen = choose_examples(parts, phase, config)
    assert sorted(len(e.input_ids) for e in chosen[LONGEST]) == lengths[-2:]
    middle = [len(e.input_ids) for e in chosen[MEDIAN]]
    assert len(middle) == 2 and lengths[0] <= min(middle) <= max(middle) < lengths[-1]


def test_the_command_measures(tiny_project, capsys, monkeypatch):
    path = tiny_project / "measured.yaml"
    path.write_text(json.dumps(build_tiny_config().dump()))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", "plan", str(path), *arguments])
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    status, out, err = call("--measure", "--random", "--json")
    found = json.loads(out)
    assert status == 0 and found["measured"]["is_random"] and found["plan"]["name"] == "tiny", err
    status, _, err = call("--measure", "--gpu-memory", "8GB")
    assert status == 2 and "leave out --gpu-memory" in err
    status, _, err = call("--random")
    assert status == 2 and "--random needs --measure" in err
