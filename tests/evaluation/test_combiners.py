"""Combinations of both adapters at inference: their closed forms, what is kept, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import get_args

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation

from fedlora_app.cli.root import Combine
from fedlora_app.config.combination import (
    COMBINATIONS,
    GATE,
    INSTANCE,
    SCALE,
    SEARCH,
    Combination,
)
from fedlora_app.config.loading import change_config
from fedlora_app.config.schema import GLOBAL, LOCAL, ConfigError, TrainingConfig
from fedlora_app.data.client_files import load_client_files
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.records import Record
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation import fitted
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.combiner import GLOBAL_ALONE, Weights, weighted_pair
from fedlora_app.evaluation.fitted import FitError, load_combiner, save_combiner
from fedlora_app.evaluation.fitted_files import about_file, tensors_file
from fedlora_app.evaluation.generation import generate_answer
from fedlora_app.evaluation.instance import FACTOR, InstanceWeights
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.saved_model import FITTED, SavedModel
from fedlora_app.evaluation.scoring import Prompt, score_prompts
from fedlora_app.evaluation.search import (
    BOUND,
    PENALTY,
    START,
    SearchedWeights,
    compute_loss,
    draw_records,
    search_weights,
)
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.evaluation.token_mixer import TokenMixer, train_mixer
from fedlora_app.foundation import progress
from fedlora_app.model.adapter_state import compute_norm
from fedlora_app.model.adapters import (
    activate,
    get_state,
    only_adapters,
    scaled_adapters,
    scaled_local,
)
from fedlora_app.model.base import find_decoder
from fedlora_app.model.fused import MIXED, find_mixed_layers, fused_answering
from fedlora_app.runs.reading import load_run

SYSTEM = "You help."
QUESTIONS = ("What is the red rule?", "Which office is blue?", "Why?")


def encode(tokenizer, *questions: str) -> list[list[int]]:
    return [encode_prompt(tokenizer, SYSTEM, question) for question in questions]


def make_local_noise(model) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if f"lora_B.{LOCAL}" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def answer_alone(model, tokenizer) -> list[Record]:
    """Questions with what the global adapter alone answers."""
    activate(model, (GLOBAL,))
    prompts = encode(tokenizer, *QUESTIONS)
    answers = [generate_answer(model, tokenizer, ids, max_new_tokens=8) for ids in prompts]
    return [Record(q, answer or "so") for q, answer in zip(QUESTIONS, answers, strict=True)]


@pytest.fixture(scope="module")
def run(tiny_project, tmp_path_factory):
    """A finished run whose adapters have an effect, with validation questions."""
    config = build_tiny_config(
        data={"universal_validation": "universal_test.json"},
        training={"learning_rate": 5e-2, "local_weight_decay": 0.0},
        evaluation={"max_new_tokens": 4, "local_scales": [0.5, 1.0], "protocol": "core"},
        federated={"num_rounds": 1},
    )
    return Federation(tiny_project, tmp_path_factory.mktemp("combined"), config).run()


@pytest.fixture
def copied(run, tmp_path):
    """The run's copy, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


def open_saved(run_dir, project, combine: Combination | None) -> SavedModel:
    return SavedModel(load_run(run_dir), 1, project, combine=combine)


def test_instance_weights_are_scaled_mean_cosines():
    instances = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    states = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    found = InstanceWeights(instances).weigh(states)
    means = [(0.6 + 0.8 + 0.36 + 0.64) / 3, (1 + 0 + 0.6) / 3, 0]  # the last one's is negative
    assert found.tolist() == pytest.approx([FACTOR * mean for mean in means], abs=1e-7)


@torch.no_grad()
def test_instances_are_seen_with_the_local_adapter_alone_at_its_own_scale(adapted, tokenizer):
    prompts = encode(tokenizer, *QUESTIONS)
    with only_adapters(adapted, (LOCAL,)):
        decoder = find_decoder(adapted.get_base_model())
        states = [decoder(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
    units = torch.nn.functional.normalize(torch.stack(states), dim=-1)
    instances, asked = units[:2], units[2:]
    share = round(FACTOR * (asked @ instances.T).mean().item(), 2)
    activate(adapted, (GLOBAL, LOCAL))
    with fused_answering(adapted), scaled_local(adapted, 0.3):
        (weights,) = InstanceWeights(instances).find_weights(adapted, prompts[2:])
    assert weights == (pytest.approx(1 - share), share) and 0 < share < 1


def test_every_question_is_answered_with_its_own_weights(adapted, tokenizer):
    """Batched with others, and generated for, as by itself under these weights."""
    activate(adapted, (GLOBAL, LOCAL))
    generator = torch.Generator().manual_seed(3)
    instances = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1)
    combiner = InstanceWeights(instances.abs(), SYSTEM)
    prompts = [Prompt(SYSTEM, question, ("One.", "Two, three.")) for question in QUESTIONS]
    settings = {"batch_size": 8, "max_new_tokens": 6}
    answers = score_prompts(adapted, tokenizer, prompts, combiner=combiner, **settings)
    ids = encode(tokenizer, *QUESTIONS)
    found = combiner.find_weights(adapted, ids)
    assert len(set(found)) > 1
    for prompt, prompt_ids, answered, weights in zip(prompts, ids, answers, found, strict=True):
        with weighted_pair(adapted, weights):
            (expected,) = score_prompts(adapted, tokenizer, [prompt], **settings)
        assert answered.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
        one = generate_answer(adapted, tokenizer, prompt_ids, max_new_tokens=6, combiner=combiner)
        assert answered.generated == expected.generated == one
        assert answered.openness is None


@torch.no_grad()
@torch.no_grad()
def test_a_mixer_of_zeros_takes_half_of_each_adapter(adapted):
    activate(adapted, MIXED)
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    layers = find_mixed_layers(adapted)
    mixer = {layer: torch.zeros(2, layer.in_features) for layer in layers.values()}
    with weighted_pair(adapted, Weights(0.5, 0.5)):
        expected = adapted(ids).logits
    with fused_answering(adapted, mixer):
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=0)
    assert (adapted(ids).logits - expected).abs().max() > 0.01
    whole = adapted(ids).logits
    with fused_answering(adapted):  # it leaves nothing behind
        torch.testing.assert_close(adapted(ids).logits, whole, atol=1e-5, rtol=0)
    with only_adapters(adapted, (GLOBAL,)):
        expected = adapted(ids).logits
        with fused_answering(adapted, mixer):  # there is nothing to mix
            torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=0)


def test_a_mixer_s_shares_and_gradient_have_their_closed_form(adapted):
    """Of one layer, fp64: y = W0 x + sum of p_i u_i, p = softmax(M x), at two scales."""
    adapted = adapted.double()
    activate(adapted, MIXED)
    layer = next(iter(find_mixed_layers(adapted).values()))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, layer.in_features, generator=generator, dtype=torch.float64)
    slope = torch.randn(3, 5, layer.out_features, generator=generator, dtype=torch.float64)
    matrix = torch.randn(2, layer.in_features, generator=generator, dtype=torch.float64)
    matrix.requires_grad_()
    with scaled_local(adapted, 0.5), fused_answering(adapted, {layer: matrix}):
        found = layer(x)
    (found * slope).sum().backward()
    added = [x @ layer.get_delta_weight(name).T.detach() for name in MIXED]
    added[1] = 0.5 * added[1]
    exponentials = (x @ matrix.detach().T).exp()
    p = exponentials / exponentials.sum(-1, keepdim=True)
    expected = layer.get_base_layer()(x) + p[..., [0]] * added[0] + p[..., [1]] * added[1]
    # The shares are taken in fp32, whatever the adapters are in.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    along = p[..., 0] * p[..., 1] * ((added[0] - added[1]) * slope).sum(-1)  # (3, 5)
    row = torch.einsum("bt,bti->i", along, x)
    torch.testing.assert_close(matrix.grad, torch.stack([row, -row]), atol=1e-4, rtol=1e-4)


def test_a_mixer_learns_which_adapter_knows_an_answer(adapted, tokenizer):
    """Answers that the global adapter alone gives, and a local adapter of noise."""
    make_local_noise(adapted)
    examples = [encode_example(tokenizer, SYSTEM, r) for r in answer_alone(adapted, tokenizer)]
    training = TrainingConfig(
        batch_size=1, gradient_accumulation_steps=3, local_epochs=3, learning_rate=3e-2
    )
    before = {name: get_state(adapted, name) for name in MIXED}
    matrices = train_mixer(adapted, examples, training, num_phases=4, seed=1)
    mixer = TokenMixer(matrices)
    activate(adapted, MIXED)

    def measure(mixing):
        with fused_answering(adapted, mixing):
            return compute_loss(adapted, examples, Weights(1, 1), 8)

    zeros = TokenMixer({name: torch.zeros_like(m) for name, m in matrices.items()})
    assert measure(mixer.find_mixer(adapted)) < measure(zeros.find_mixer(adapted)) - 0.1
    for name in MIXED:  # frozen, and left as they were found
        assert all(torch.equal(before[name][k], t) for k, t in get_state(adapted, name).items())
    assert not any(p.requires_grad for p in adapted.parameters()) and not adapted.training
    again = train_mixer(adapted, examples, training, num_phases=4, seed=1)
    assert all(torch.equal(again[name], matrix) for name, matrix in matrices.items())
    sparing = training.model_copy(update={"gradient_checkpointing": True})
    again = train_mixer(adapted, examples, sparing, num_phases=4, seed=1)
    for name, matrix in matrices.items():
        torch.testing.assert_close(again[name], matrix, atol=1e-3, rtol=1e-3)
    assert not adapted.get_base_model().is_activation_checkpointing


def test_a_mixer_whose_loss_is_not_finite_is_refused(adapted, tokenizer):
    (example,) = [encode_example(tokenizer, SYSTEM, Record("Why?", "So."))]
    for name, parameter in adapted.named_parameters():
        if f"lora_B.{LOCAL}" in name:
            parameter.data.fill_(float("inf"))
    with pytest.raises(FitError, match=r"mixer's loss .* Lower training\.learning_rate"):
        train_mixer(adapted, [example], TrainingConfig(), num_phases=1, seed=1)
    assert not any("forward" in module.__dict__ for module in adapted.modules())


@contextmanager
def memory_for(model, num_rows: int):
    """Have training run out of memory with more rows."""

    def check(module, args, settings):
        if torch.is_grad_enabled() and len(settings["input_ids"]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = model.get_base_model().base_model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_a_mixer_is_fitted_once_more_where_memory_runs_out(adapted, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    make_local_noise(adapted)
    examples = [encode_example(tokenizer, SYSTEM, r) for r in answer_alone(adapted, tokenizer)]
    training = TrainingConfig(batch_size=3, gradient_accumulation_steps=1, learning_rate=3e-2)
    fit = {"num_phases": 4, "seed": 1, "what": "ann, mixer"}
    expected = train_mixer(adapted, examples, training, **fit)
    assert re.match(r"ann, mixer: step 1/8, loss \d\.\d{3}, \d+ s left\n", capsys.readouterr().out)
    with memory_for(adapted, 1):
        found = train_mixer(adapted, examples, training, **fit)
    assert "ann, mixer: out of memory with batches of 3; once more" in capsys.readouterr().out
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, atol=1e-3, rtol=1e-3)
    assert not adapted.get_base_model().is_activation_checkpointing
    with (
        memory_for(adapted, 0),
        pytest.raises(FitError, match="ann, mixer: out of memory, also with .* another --combine"),
    ):
        train_mixer(adapted, examples, training, **fit)
    assert not any("forward" in module.__dict__ for module in adapted.modules())


def test_a_mixer_answers_each_question_as_by_itself(adapted, tokenizer):
    activate(adapted, MIXED)
    generator = torch.Generator().manual_seed(4)
    combiner = TokenMixer(
        {
            name: torch.randn(2, layer.in_features, generator=generator)
            for name, layer in find_mixed_layers(adapted).items()
        },
        SYSTEM,
    )
    prompts = [Prompt(SYSTEM, question, ("One.", "Two, three.")) for question in QUESTIONS]
    settings = {"batch_size": 8, "max_new_tokens": 6}
    answers = score_prompts(adapted, tokenizer, prompts, combiner=combiner, **settings)
    plain = score_prompts(adapted, tokenizer, prompts, **settings)
    ids = encode(tokenizer, *QUESTIONS)
    for prompt, prompt_ids, answered, other in zip(prompts, ids, answers, plain, strict=True):
        example = encode_example(tokenizer, SYSTEM, Record(prompt.question, "Two, three."))
        with fused_answering(adapted, combiner.find_mixer(adapted)):
            expected = -compute_loss(adapted, [example], Weights(1, 1), 1)
        alone = answered.log_likelihoods[1] / example.num_answer_tokens
        assert alone == pytest.approx(expected, abs=1e-4)
        assert answered.log_likelihoods != pytest.approx(other.log_likelihoods, abs=0.01)
        text = generate_answer(adapted, tokenizer, prompt_ids, max_new_tokens=6, combiner=combiner)
        assert answered.generated == text


def test_weights_scale_what_each_adapter_adds(adapted):
    activate(adapted, (GLOBAL, LOCAL))
    ids = torch.tensor([[5, 6, 7]])
    layer = next(m for m in adapted.modules() if hasattr(m, "lora_A") and m.lora_A)
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    deltas = {name: layer.get_delta_weight(name) for name in (GLOBAL, LOCAL)}
    with weighted_pair(adapted, Weights(0.7, -0.4)), scaled_local(adapted, 0.5):
        found = layer(x)
    expected = layer.get_base_layer()(x) + x @ (0.7 * deltas[GLOBAL] - 0.2 * deltas[LOCAL]).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    whole = adapted(ids).logits
    with scaled_adapters(adapted, {GLOBAL: 1.0, LOCAL: 1.0}):
        assert torch.equal(adapted(ids).logits, whole)


def test_the_search_finds_the_optimum_of_a_parabola_with_its_penalty():
    weights = search_weights(lambda w: (w.of_global - 0.8) ** 2 + (w.of_local + 0.3) ** 2)
    shift = PENALTY / 4  # where the slopes 2 (w - c) and PENALTY / 2 cancel
    assert weights == (pytest.approx(0.8 - shift, abs=0.02), pytest.approx(shift - 0.3, abs=0.02))


def test_no_weight_is_searched_for_beyond_its_bounds():
    tried = []

    def loss(weights):
        tried.append(weights)
        return -weights.of_global

    assert search_weights(loss) == (pytest.approx(BOUND, abs=0.05), pytest.approx(0, abs=0.3))
    assert max(max(map(abs, weights)) for weights in tried) <= BOUND
    assert tried[:3] == [Weights(*start) for start in START]


def test_of_a_local_adapter_of_noise_the_search_leaves_nothing(adapted, tokenizer):
    """The answers are those of the global adapter alone."""
    make_local_noise(adapted)
    examples = [encode_example(tokenizer, SYSTEM, r) for r in answer_alone(adapted, tokenizer)]
    activate(adapted, (GLOBAL, LOCAL))
    with fused_answering(adapted):
        found = search_weights(lambda weights: compute_loss(adapted, examples, weights, 8))
    losses = [compute_loss(adapted, examples, Weights(*start), 8) for start in START]
    assert abs(found.of_local) < 0.15 and found.of_global > 0.5
    best = compute_loss(adapted, examples, found, 8) + PENALTY * sum(map(abs, found)) / 2
    assert best <= min(
        loss + PENALTY * sum(start) / 2 for loss, start in zip(losses, START, strict=True)
    )
    assert losses[0] > losses[1] + 0.1


def test_records_to_search_on_are_validation_ones_where_there_are_any(run, tiny_project):
    config = load_run(run).config
    client = config.client("ann")
    files = load_client_files(config, client, tiny_project)
    drawn = draw_records(client, files, seed=1)
    assert {r.output for r in drawn} >= {r.output for r in files.local.records}  # trained on
    universal = [r for r in drawn if "office" in r.instruction]
    assert len(universal) == 6 and all(r.instruction.startswith("Name") for r in universal)
    assert drawn == draw_records(client, files, seed=1) != draw_records(client, files, seed=2)


@pytest.mark.parametrize("name", sorted(FITTED))
def test_what_is_fitted_is_kept_and_is_the_same_again(copied, tiny_project, name, monkeypatch):
    saved = open_saved(copied, tiny_project, name)
    with saved.answering(saved.own("ann")) as (model, fresh):
        ids = encode(saved.load()[0].tokenizer, *QUESTIONS)
        expected = fresh.find_weights(model, ids)
    folder = saved.run.paths.combiner("ann", name)
    assert {path.name for path in folder.iterdir()} == {about_file(name), tensors_file(name)}
    assert folder.stat().st_mode & 0o077 == 0 or folder.parent.stat().st_mode & 0o077 == 0
    first = [path.read_bytes() for path in sorted(folder.iterdir())]
    shutil.rmtree(folder)
    again = open_saved(copied, tiny_project, name)
    with again.answering(again.own("ann", 0.5)) as (model, other):
        assert other.find_weights(model, ids) == expected
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == first
    monkeypatch.setattr(FITTED[name], "fit", None)  # nothing is fitted any more
    kept = open_saved(copied, tiny_project, name)
    with kept.answering(kept.own("ann")) as (model, other):
        assert other.find_weights(model, ids) == expected


@pytest.mark.parametrize("name", sorted(FITTED))
def test_what_was_fitted_to_anything_else_is_not_used(copied, tiny_project, name):
    saved = open_saved(copied, tiny_project, name)
    with saved.answering(saved.own("ann")) as (_, combiner):
        pass
    folder = saved.run.paths.combiner("ann", name)
    about = json.loads((folder / about_file(name)).read_text())["fitted_to"]
    kind = FITTED[name]
    expected = {"base_model", "system_prompt", "settings", *kind.FILES}
    assert about.keys() == expected | {f"{role}_adapter" for role in kind.ADAPTERS}
    assert load_combiner(kind, folder, about, "") is not None
    for key in about:
        assert load_combiner(kind, folder, about | {key: "other"}, "") is None
    path = folder / tensors_file(name)
    path.write_bytes(path.read_bytes()[:20])
    assert load_combiner(kind, folder, about, "") is None
    tensors, content = combiner.dump()
    broken = {key: tensor * float("nan") for key, tensor in tensors.items()}
    monkey = type("Broken", (kind,), {"dump": lambda self: (broken, content)})
    save_combiner(folder, monkey.restore(tensors, content, ""), about)
    assert load_combiner(kind, folder, about, "") is None
    save_combiner(folder, combiner, about)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    assert load_combiner(kind, folder, about, "") is None


def test_other_data_or_another_seed_is_fitted_anew(run, tiny_project):
    saved = load_run(run)
    client = saved.config.client("ann")
    adapters = {GLOBAL: "g", LOCAL: "l"}

    def describe(config=saved.config, adapters=adapters, data=None):
        return fitted.describe_fit(SearchedWeights, config, client, "b", adapters, data or {})

    experiment = saved.config.experiment.model_copy(update={"seed": 8})
    assert describe() == describe()
    assert describe() != describe(saved.config.model_copy(update={"experiment": experiment}))
    assert describe() != describe(adapters=adapters | {LOCAL: "other"})
    assert describe() != describe(data={"sha256/local_train": "x"})


@pytest.mark.parametrize(("rule", "ranks"), [("rest-of-world", ()), ("svd", (1, 2))])
def test_a_combiner_is_fitted_beside_its_owner_s_global_adapter(
    tiny_project, tmp_path, monkeypatch, rule, ranks
):
    config = build_tiny_config(
        federated={"aggregation": rule, "num_rounds": 1},
        training={"learning_rate": 2e-2},
        evaluation={"max_new_tokens": 4, "interval": 0},
    )
    for place, rank in enumerate(ranks):
        config = change_config(config, f"federated.clients.{place}.rank={rank}")
    run = load_run(Federation(tiny_project, tmp_path, config).run())

    beside, fit = [], SearchedWeights.fit.__func__

    def note(kind, task):
        beside.append(compute_norm(get_state(task.model, GLOBAL)))
        return fit(kind, task)

    monkeypatch.setattr(SearchedWeights, "fit", classmethod(note))
    for is_swapped_first in (True, False):
        shutil.rmtree(run.paths.combiner("bob", SEARCH), ignore_errors=True)
        saved = SavedModel(run, 1, tiny_project, combine=SEARCH)
        own = saved.own("bob")
        assert own.global_of == "bob"
        for who in (replace(own, global_of="ann"), own)[not is_swapped_first :]:
            with saved.answering(who):
                pass
    assert len(beside) == 2 and beside[0] == beside[1] > 0


def test_a_fine_tuned_copy_is_weighed_against_the_average(tiny_project, tmp_path):
    """FedDPA-F: by weights of sum 1, since the copy holds all that the average does."""
    config = build_tiny_config(
        adapters={"local": {"rank": 4, "alpha": 8}},
        federated={"mode": "finetuned"},
        evaluation={"max_new_tokens": 4, "protocol": "core", "interval": 0},
    )
    run = load_run(Federation(tiny_project, tmp_path, config).run())
    saved = open_round(run, tiny_project, combine=INSTANCE)
    assert saved.own("ann") == Answering(True, "ann", combine=INSTANCE)
    found = evaluate_round(saved, lambda *_: None)
    assert found["answering"] == "global+local" and saved.evaluation_path.exists()
    assert open_round(run, tiny_project).own("ann") == Answering(False, "ann")
    for combine, server_round in ((SCALE, 2), (GATE, 2), (INSTANCE, 1)):
        with pytest.raises(ConfigError, match=f"{combine} has no effect: .* mode finetuned"):
            open_round(run, tiny_project, server_round, combine)


@pytest.mark.parametrize("mode", ["fedavg", "local-only"])
def test_a_combination_of_one_adapter_is_refused_before_anything_is_loaded(run, tiny_project, mode):
    saved = load_run(run)
    federated = saved.config.federated.model_copy(update={"mode": mode})
    other = replace(saved, config=saved.config.model_copy(update={"federated": federated}))
    for name in COMBINATIONS:
        with pytest.raises(ConfigError, match=f"{name} has no effect: .* mode {mode} clients answ"):
            SavedModel(other, 1, tiny_project / "nowhere", combine=name)
    assert SavedModel(other, 1, tiny_project).combination == SCALE


def test_every_combination_is_offered_by_the_command():
    (names, _) = get_args(get_args(Combine)[0])
    assert set(get_args(names)) == set(COMBINATIONS) == set(get_args(Combination))


@pytest.mark.parametrize("name", [GATE, *sorted(FITTED)])
def test_an_evaluation_is_of_the_combination_that_it_says(copied, tiny_project, name):
    saved = open_round(load_run(copied), tiny_project, combine=name)
    evaluation = evaluate_round(saved, lambda *_: None)
    run = saved.run
    assert evaluation["combination"] == name
    assert json.loads((copied / f"evaluation_{name}.json").read_text()) == evaluation
    assert not run.paths.evaluation.exists() and run.find_evaluation(1, name) == evaluation
    assert run.find_evaluation(1) is None
    assert f"global+local by {name}" in describe_evaluation(evaluation)
    model = SavedModel(run, 1, tiny_project, combine=name)
    own = model.own("ann")
    with model.answering(own) as (adapted, combiner):
        tokenizer = model.load()[0].tokenizer
        rows = [
            row
            for row in evaluation["questions"]
            if row["client"] == "ann" and row["question_set"] == "local"
        ]
        assert rows
        for row in rows:
            prompt = Prompt("You are ann.", row["instruction"], tuple(row["candidates"]))
            (answered,) = score_prompts(
                adapted, tokenizer, [prompt], batch_size=8, max_new_tokens=4, combiner=combiner
            )
            expected = pytest.approx(answered.log_likelihoods, abs=1e-3)
            assert row["scores"]["log_likelihoods"] == expected
            assert row["generated"] == answered.generated
            assert (row["gate"] is not None) == (name == GATE)


def test_what_the_run_is_configured_for_has_the_usual_name(run, tiny_project):
    saved = load_run(run)
    paths = {
        name: SavedModel(saved, 1, tiny_project, combine=name).evaluation_path.name
        for name in (None, SCALE, GATE, INSTANCE)
    }
    usual = "evaluation.json"
    assert paths == {
        None: usual,
        SCALE: usual,
        GATE: "evaluation_gate.json",
        INSTANCE: "evaluation_instance.json",
    }
    assert saved.evaluation_path(0, SEARCH).name == "evaluation_round_000_search.json"


def test_the_global_adapter_alone_is_asked_once_for_what_is_left_to_it(copied, tiny_project):
    """As behind a closed gate: the answers are the very same ones."""
    saved = open_saved(copied, tiny_project, SEARCH)
    with saved.answering(saved.own("ann")) as (_, combiner):
        pass
    alone = replace(combiner, weights=GLOBAL_ALONE)
    folder = saved.run.paths.combiner("ann", SEARCH)
    about = json.loads((folder / about_file(SEARCH)).read_text())["fitted_to"]
    save_combiner(folder, alone, about)
    evaluation = evaluate_round(
        open_round(load_run(copied), tiny_project, combine=SEARCH), lambda *_: None
    )
    rows = {
        (row["question_set"], row["adapters"]): {
            key: value for key, value in row.items() if key != "adapters"
        }
        for row in evaluation["swap_table"]
        if row["client"] == "ann"
    }
    for name in ("local", "universal"):
        assert rows[name, "global+local:ann"] == rows[name, "global"]
    assert Answering(with_global=True, local="ann", combine=SEARCH).label == "global+local:ann"
