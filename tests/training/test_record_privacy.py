"""DP-SGD on the global adapter, against autograd's own gradient of every single example."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import build_tiny_config, build_tiny_model
from loopback import Federation
from observation import find_windows
from torch.nn import functional
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fedlora_app.config.rounds import plan_round
from fedlora_app.config.schema import GLOBAL, AdaptersConfig, Config, ConfigError, TrainingConfig
from fedlora_app.data.tokens import Example
from fedlora_app.federation.accountant import noise_multiplier_for
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_adapters,
    get_state,
    lora_layers,
    scaled_adapters,
    set_state,
)
from fedlora_app.model.base import find_decoder
from fedlora_app.runs.client_folder import ClientFolder
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.training import record_privacy
from fedlora_app.training.clipping import ClippingError, clipping_examples
from fedlora_app.training.layout import choose_layout, pad
from fedlora_app.training.losses import compute_example_losses, compute_losses
from fedlora_app.training.packing import packed_attention
from fedlora_app.training.phase import set_checkpointing, train_phase
from fedlora_app.training.record_privacy import (
    RecordPrivacy,
    bind_to_base,
    hides_records,
    private_gradients,
    protect_records,
    sampling_rate,
)

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
LENGTHS = (2, 40, 17, 16, 5, 33)


def build_examples(lengths=LENGTHS, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    return [
        Example([rng.randrange(3, 200) for _ in range(length)], rng.randint(1, length - 1))
        for length in lengths
    ]


def fill(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def build_4bit(folder):
    settings = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4)).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as model.base does, and why
    return base


@pytest.fixture
def model(request, adapters_config, tmp_path):
    """A tiny model with filled adapters of which the global one learns, of one of several kinds."""
    kind = getattr(request, "param", "float32")
    base = build_4bit(tmp_path) if kind == "4bit" else build_tiny_model(256)
    if kind == "bfloat16":
        base = base.to(torch.bfloat16)
    model = fill(attach_adapters(base, adapters_config))
    activate(model, (GLOBAL,), (GLOBAL,))
    return model


def example_gradients(model, examples, lay_out=pad) -> list[list[torch.Tensor]]:
    """Autograd's gradients of each example's mean loss, alone and without what is tested."""
    found = []
    for example in examples:
        model.zero_grad()
        compute_losses(model, [example], None, lay_out)[0].mean().backward()
        found.append([p.grad.clone() for p in adapter_parameters(model, GLOBAL)])
    model.zero_grad()
    return found


def norm(gradients) -> float:
    return torch.stack([g.double().norm() for g in gradients]).norm().item()


def sum_clipped(model, examples, clip_norm, *, packing=True) -> tuple[list[float], list]:
    """Return the norms and the clipped sum, as a step without noise takes them."""
    lay_out = choose_layout(TrainingConfig(packing=packing))
    with ExitStack() as stack:
        if packing:
            stack.enter_context(packed_attention(model.get_base_model()))
        clipped = stack.enter_context(clipping_examples(model, clip_norm))
        losses, spans = compute_example_losses(model, examples, lay_out)
        norms = clipped.measure(losses, spans)
        clipped.add(*compute_example_losses(model, examples, lay_out))
    gradients = [p.grad.clone() for p in adapter_parameters(model, GLOBAL)]
    model.zero_grad()
    return norms.tolist(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("model", ["float32", "4bit"], indirect=True)
def test_norms_and_clipped_sums_are_those_of_single_examples(model, packing, checkpointing):
    examples = build_examples()
    alone = example_gradients(model, examples)
    expected = [norm(gradients) for gradients in alone]
    clip_norm = sorted(expected)[2]  # so that some are clipped and some are not
    model.train()
    set_checkpointing(model, checkpointing)
    norms, total = sum_clipped(model, examples, clip_norm, packing=packing)
    assert norms == pytest.approx(expected, rel=1e-5)
    weights = [min(1.0, clip_norm / n) for n in expected]
    assert len(set(weights)) == 4
    for ours, parts in zip(total, zip(*alone, strict=True), strict=True):
        explicit = sum(w * part for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(ours, explicit, rtol=1e-4, atol=1e-5 * explicit.abs().max())


def test_norms_are_exact_in_double_precision(adapters_config):
    """With a loss in double precision throughout, which the project's own is not."""
    model = fill(attach_adapters(build_tiny_model(256), adapters_config)).double()
    activate(model, (GLOBAL,), (GLOBAL,))
    examples, head = build_examples(), model.get_base_model().get_output_embeddings()

    def losses_of(some):
        batch = pad(some, torch.device("cpu"))
        base = model.get_base_model()
        states = find_decoder(base)(**batch.inputs, use_cache=False).last_hidden_state
        logits = head(states.flatten(0, 1)[batch.predicting])
        losses = functional.cross_entropy(logits, batch.targets, reduction="none")
        return torch.stack([part.mean() for part in losses.split(batch.counts)]), batch.spans

    expected = []
    for example in examples:
        model.zero_grad()
        losses_of([example])[0].sum().backward()
        expected.append(norm([p.grad for p in adapter_parameters(model, GLOBAL)]))
    with clipping_examples(model, 1.0) as clipped:
        norms = clipped.measure(*losses_of(examples))
    assert norms.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("model", ["float32", "bfloat16", "4bit"], indirect=True)
def test_leaving_an_example_out_changes_the_sum_by_no_more_than_the_bound(model):
    """What all of the privacy stands on; in bf16 too, whose roundings are a percent."""
    examples, clip_norm = build_examples(), 1e-2
    norms, total = sum_clipped(model, examples, clip_norm)
    assert min(norms) > clip_norm  # so that without a bound it would be more
    for index in range(len(examples)):
        _, without = sum_clipped(model, examples[:index] + examples[index + 1 :], clip_norm)
        changed = norm([a - b for a, b in zip(total, without, strict=True)])
        rounding = 0.05 if model.get_base_model().dtype == torch.bfloat16 else 1e-4
        assert changed == pytest.approx(clip_norm, rel=rounding)


def test_one_clipped_example_has_the_norm_of_the_bound_in_bf16(adapters_config):
    """A loss weighed before it runs back would be rounded otherwise than it was measured."""
    model = fill(attach_adapters(build_tiny_model(256).to(torch.bfloat16), adapters_config))
    activate(model, (GLOBAL,), (GLOBAL,))
    for example in build_examples():
        _, total = sum_clipped(model, [example], 0.0123)
        assert norm(total) == pytest.approx(0.0123, rel=1e-6)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_stand_still_count_for_nothing(model, factor):
    activate(model, (GLOBAL,), (GLOBAL,), [factor])
    examples = build_examples()
    expected = []
    for example in examples:
        model.zero_grad()
        compute_losses(model, [example], None, pad)[0].mean().backward()
        learning = [p for p in adapter_parameters(model, GLOBAL) if p.requires_grad]
        expected.append(norm([p.grad for p in learning]))
    model.zero_grad()
    with packed_attention(model.get_base_model()), clipping_examples(model, 1.0) as clipped:
        lay_out = choose_layout(TrainingConfig())
        norms = clipped.measure(*compute_example_losses(model, examples, lay_out))
    assert norms.tolist() == pytest.approx(expected, rel=1e-5)


# --- Steps: samples and noise ----------------------------------------------------------------


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=2, warmup_ratio=0.0
    ).model_copy(update=changes)


def steps_of(model, examples, privacy, training=None, about=()):
    training = training or settings()
    return private_gradients(model, examples, training, privacy, *about)


def test_every_example_is_drawn_by_itself_at_the_rate_that_is_accounted_for(model):
    examples = build_examples([4] * 20)
    assert sampling_rate(20, settings()) == 0.2 and sampling_rate(3, settings()) == 1.0
    with steps_of(model, examples, RecordPrivacy(1.0, 1.0, KEY)) as steps:
        batches = list(itertools.islice(steps.draw_batches(), 2000))
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    # Of a binomial law of 20 draws: mean 4, variance 3.2; a fixed size would have none.
    assert sizes.mean() == pytest.approx(4, abs=4 * (3.2 / 2000) ** 0.5)
    assert sizes.var() == pytest.approx(3.2, rel=0.15)
    assert (sizes == 0).any()
    places = {id(example): place for place, example in enumerate(examples)}
    counts = torch.zeros(20)
    for batch in batches:
        for example in batch:
            counts[places[id(example)]] += 1
    assert ((counts - 400).abs() < 5 * 320**0.5).all()


def gradients_of_a_step(model, examples, privacy, batch, step=0) -> list[torch.Tensor]:
    with (
        packed_attention(model.get_base_model()),
        steps_of(model, examples, privacy) as steps,
    ):
        steps.accumulate(step, batch, None)
    found = [p.grad.clone() for p in adapter_parameters(model, GLOBAL)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("num_drawn", [0, 3])
def test_the_noise_is_there_and_as_large_as_it_should_be(model, num_drawn):
    """Around the clipped sum over the expected number, which is four whatever was drawn."""
    examples = build_examples([6] * 20)
    batch = examples[:num_drawn]
    noisy = gradients_of_a_step(model, examples, RecordPrivacy(0.1, 2.0, KEY), batch)
    plain = gradients_of_a_step(model, examples, RecordPrivacy(0.1, 0.0, KEY), batch)
    if batch:
        expected = [gradient / 4 for gradient in sum_clipped(model, batch, 0.1)[1]]
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-7)
    else:
        assert norm(plain) == 0
    noise = torch.cat([(a - b).flatten() for a, b in zip(noisy, plain, strict=True)])
    assert len(noise) > 3000
    # Of 3,000 and more numbers the deviation is within 6 % in all but one of a million tries.
    assert noise.std() == pytest.approx(2.0 * 0.1 / 4, rel=0.06)
    assert abs(noise.mean()) < 5 * noise.std() / len(noise) ** 0.5


def test_every_step_and_tensor_has_noise_of_its_own(model):
    examples, privacy = build_examples([6] * 20), RecordPrivacy(0.1, 2.0, KEY)
    steps = [
        torch.cat([g.flatten() for g in gradients_of_a_step(model, examples, privacy, [], step)])
        for step in range(2)
    ]
    assert len(torch.cat(steps).unique()) > 0.99 * len(torch.cat(steps))


def train(model, examples, privacy=None, **changes):
    training = settings(**changes.pop("settings", {}))
    arguments = {
        "active": (GLOBAL,),
        "trainable": (GLOBAL,),
        "num_steps": 3,
        "run_span": (0.0, 1.0),
        "weight_decays": {GLOBAL: 0.0},
        "seed": 1,
    }
    return train_phase(model, examples, training, privacy=privacy, **(arguments | changes))


def trained(model, start, *args, **kwargs):
    set_state(model, GLOBAL, start)
    train(model, *args, **kwargs)
    return get_state(model, GLOBAL)


def equal(one, other) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_the_same_phase_has_the_same_noise_and_any_other_phase_another(model):
    """The difference of two updates with the same noise would have none."""
    start, examples = get_state(model, GLOBAL), build_examples([6] * 12)
    privacy = RecordPrivacy(0.1, 1.0, KEY)
    first = trained(model, start, examples, privacy)
    torch.rand(3)  # the global generator's position must not matter
    assert equal(first, trained(model, start, examples, privacy))
    assert not equal(first, trained(model, start, examples, RecordPrivacy(0.1, 1.0, OTHER_KEY)))

    def noise(model=model, examples=examples, privacy=privacy, **changes):
        about = changes.pop("about", ())
        with steps_of(model, examples, privacy, settings(**changes), about) as steps:
            steps.accumulate(0, [], None)
        found = torch.cat([p.grad.flatten() for p in adapter_parameters(model, GLOBAL)])
        model.zero_grad()
        return found / privacy.noise_multiplier

    set_state(model, GLOBAL, start)
    usual = noise()
    assert torch.equal(usual, noise(batch_size=1, gradient_accumulation_steps=4))
    moved = start | {next(iter(start)): next(iter(start.values())) + 1e-6}
    others = [
        noise(examples=examples[1:]),
        noise(privacy=RecordPrivacy(0.1, 2.0, KEY)),
        noise(learning_rate=2e-2),
        noise(about=("another round",)),
    ]
    with scaled_adapters(model, {GLOBAL: 0.5}):  # as another alpha would
        others.append(noise())
    others.append(noise(privacy=RecordPrivacy(0.1, 1.0, bind_to_base(KEY, "another base"))))
    set_state(model, GLOBAL, moved)  # what a server might send once more for the same round
    others.append(noise())
    for other in others:
        assert abs(torch.corrcoef(torch.stack([usual, other]))[0, 1]) < 0.1  # else it is 1


def test_without_noise_and_with_a_wide_bound_it_is_sgd_on_the_examples_means(model):
    """Nothing but what is asked for is different: all drawn, no bound reached, no noise."""
    start, examples = get_state(model, GLOBAL), build_examples([6, 9, 12])
    ours = trained(model, start, examples, RecordPrivacy(1e9, 0.0, KEY), num_steps=1)
    set_state(model, GLOBAL, start)
    activate(model, (GLOBAL,), (GLOBAL,))
    alone = example_gradients(model, examples)
    for place, parameter in enumerate(adapter_parameters(model, GLOBAL)):
        parameter.grad = sum(gradients[place] for gradients in alone) / len(examples)
    parameters = adapter_parameters(model, GLOBAL)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0).step()
    for key, tensor in get_state(model, GLOBAL).items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"gradient_checkpointing": True},
        {"batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_how_a_step_is_computed_changes_no_draw_and_no_noise(model, changes, monkeypatch):
    monkeypatch.setattr(record_privacy, "IMMATERIAL", record_privacy.IMMATERIAL | {"packing"})
    start, examples = get_state(model, GLOBAL), build_examples([6, 9, 12, 4, 30, 7])
    privacy = RecordPrivacy(0.5, 0.5, KEY)
    plain = trained(model, start, examples, privacy)
    for key, tensor in trained(model, start, examples, privacy, settings=changes).items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-3, atol=5e-5)


def test_states_of_lower_layers_are_kept_as_elsewhere():
    config = AdaptersConfig.model_validate({"global": {"first_layer": 1}})
    model = fill(attach_adapters(build_tiny_model(256), config))
    start, examples = get_state(model, GLOBAL), build_examples([6, 9, 12, 4, 30, 7])
    layer = model.get_base_model().model.layers[0]
    results, runs = [], []
    for keeps_states in (False, True):
        calls = []
        hook = layer.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        privacy, settings = RecordPrivacy(0.5, 0.5, KEY), {"num_steps": 12}
        results.append(
            trained(model, start, examples, privacy, keeps_states=keeps_states, **settings)
        )
        hook.remove()
        runs.append(len(calls))
    assert runs[1] < runs[0]
    for key, tensor in results[0].items():
        torch.testing.assert_close(results[1][key], tensor, rtol=1e-3, atol=5e-5)


def test_the_pull_towards_the_received_adapter_has_no_noise_and_no_bound(model):
    start, examples = get_state(model, GLOBAL), build_examples([6] * 8)
    privacy = RecordPrivacy(1e-9, 0.0, KEY)  # which leaves nothing else
    pulled = trained(model, start, examples, privacy, settings={"proximal_mu": 10.0})
    plain = trained(model, start, examples, privacy)
    assert not equal(pulled, plain)


def test_what_tells_of_the_records_is_withheld(model):
    result = train(model, build_examples([6] * 8), RecordPrivacy(0.1, 1.0, KEY))
    assert result.train_loss is result.final_train_loss is None
    assert result.num_tokens is result.num_answer_tokens is None
    assert (result.num_examples, result.num_steps) == (8, 3)


# --- What cannot be bounded is refused ---------------------------------------------------------


def test_other_parts_that_learn_are_refused(model):
    model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with (
        pytest.raises(ClippingError, match=r"embed_tokens.weight would too\. Choose others"),
        clipping_examples(model, 1.0),
    ):
        pass


def test_an_adapter_on_the_output_layer_is_refused(adapters_config):
    base = build_tiny_model(256, tie_word_embeddings=False)
    changes = {"target_modules": ["lm_head", "q_proj"]}
    config = AdaptersConfig.model_validate({"global": changes, "local": changes})
    model = attach_adapters(base, config)
    with pytest.raises(ClippingError, match="the output layer, which is run on answers only"):
        train(model, build_examples([6]), RecordPrivacy(1.0, 1.0, KEY))


def test_layers_that_are_run_twice_or_on_some_tokens_are_refused(model, monkeypatch):
    layers = model.get_base_model().model.layers
    mlp, run = layers[0].mlp, type(layers[0].mlp).forward
    examples, privacy = build_examples([6, 9]), RecordPrivacy(1.0, 1.0, KEY)
    for forward in (
        lambda states: run(mlp, run(mlp, states)),
        lambda states: torch.cat([run(mlp, states[:, :4]), states[:, 4:]], dim=1),
    ):
        monkeypatch.setattr(mlp, "forward", forward)
        with pytest.raises(ClippingError, match="on a part of the tokens, or more than once"):
            train(model, examples, privacy)
    assert all("forward" not in part[GLOBAL].__dict__ for part in _parts(model))


def _parts(model):
    return [part for layer in lora_layers(model, GLOBAL) for part in (layer.lora_A, layer.lora_B)]


def test_weights_that_are_used_without_their_layer_are_refused(model, monkeypatch):
    """As PEFT does for a mixture's experts: such a gradient would pass by without a bound."""
    layer = lora_layers(model, GLOBAL)[0]
    weight = layer.lora_A[GLOBAL].weight
    plain = type(layer).forward

    def forward(inputs):
        return plain(layer, inputs) + 0.01 * (inputs @ weight.T).sum()

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(ClippingError, match="learns by other ways than its linear layers"):
        train(model, build_examples([6, 9]), RecordPrivacy(1.0, 1.0, KEY))


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_dropout_is_refused(where):
    """Its random numbers would tell how many examples lie before one."""
    dropouts = {"attention_dropout": 0.1} if where == "base" else {}
    config = AdaptersConfig.model_validate({"global": {"dropout": 0.1 * (where == "adapter")}})
    model = attach_adapters(build_tiny_model(256, **dropouts), config)
    with pytest.raises(ClippingError, match="Dropout"):
        train(model, build_examples([6]), RecordPrivacy(1.0, 1.0, KEY))
    local_only = AdaptersConfig.model_validate({"local": {"dropout": 0.1}})
    model = attach_adapters(build_tiny_model(256), local_only)
    train(model, build_examples([6]), RecordPrivacy(1.0, 1.0, KEY))


def test_a_gradient_that_is_not_finite_is_refused(model):
    adapter_parameters(model, GLOBAL)[0].data.fill_(float("inf"))
    with pytest.raises(ClippingError, match="not finite"):
        train(model, build_examples([6, 6]), RecordPrivacy(1.0, 1.0, KEY))


# --- A federation ------------------------------------------------------------------------------

RECORD = {"unit": "record", "clip_norm": 0.1, "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.mark.parametrize("mode", ["fedavg", pytest.param("dual", marks=pytest.mark.minutes)])
def test_a_private_run_resumes_to_the_byte_and_withholds_losses(tiny_project, tmp_path, mode):
    config = build_tiny_config(federated={"mode": mode}, privacy=RECORD)
    number = itertools.count(1)

    def keep(message, reply):
        # Both have trained in the second round, and the server has not counted it.
        if next(number) == (10):
            shutil.copytree(tmp_path / "whole" / "run", tmp_path / "stopped" / "run")
        return reply

    whole = Federation(tiny_project, tmp_path / "whole", config)
    run = whole.run(tamper=keep)
    keys = {path.parent.name: path.read_bytes() for path in run.glob("clients/*/secret.key")}
    assert set(keys) == {"ann", "bob"} and keys["ann"] != keys["bob"]
    assert {path.stat().st_mode & 0o777 for path in run.glob("clients/*/secret.key")} == {0o600}
    sent = b"".join(grid.bytes_received() + grid.bytes_sent() for grid in whole.grids)
    assert not find_windows([np.frombuffer(key, np.uint8) for key in keys.values()], sent)

    stopped = Federation(tiny_project, tmp_path / "stopped", config)
    assert adapters_in(stopped.path) != adapters_in(run)
    stopped.run(resume="run")
    assert adapters_in(stopped.path) == adapters_in(run)

    history = json.loads((run / "history.json").read_text())
    names = {name for entry in history for name in entry["metrics"]}
    hidden = {"train_loss", "final_train_loss", "num_tokens", "num_answer_tokens"}
    assert not names & {f"train_global/{name}" for name in hidden}
    assert {"train_global/num_examples", "update_norm"} <= names
    assert ("train_local/train_loss" in names) == (mode == "dual")


def adapters_in(run) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


@pytest.mark.minutes
def test_another_key_is_another_run(tiny_project, tmp_path):
    config = build_tiny_config(privacy=RECORD, federated={"num_rounds": 1})
    runs = [Federation(tiny_project, tmp_path / name, config).run() for name in ("one", "two")]
    ours, theirs = ((run / "final/global/adapter_model.safetensors").read_bytes() for run in runs)
    assert ours != theirs  # of one seed, which would give the noise away


def test_a_phase_of_both_adapters_hides_nothing():
    raw = build_tiny_config(privacy=RECORD).dump()
    raw["training"]["schedule"] = "joint"
    config = Config.model_validate(raw)  # parse_config refuses it before
    with pytest.raises(ConfigError, match="joint trains both adapters at once"):
        protect_records(plan_round(config, 1).train, config.privacy, 2.0, KEY)


def test_only_phases_of_the_global_adapter_hide_records():
    config = build_tiny_config(privacy=RECORD)
    plan, privacy = plan_round(config, 1), config.privacy
    assert hides_records(plan.train, privacy) and not hides_records(plan.personalise, privacy)
    assert not hides_records(plan.train, build_tiny_config().privacy)
    assert protect_records(plan.train, privacy, 2.0, KEY) == RecordPrivacy(0.1, 2.0, KEY)
    assert protect_records(plan.train, privacy, None, KEY) == RecordPrivacy(0.1, 0.0, KEY)


@pytest.mark.minutes
def test_a_client_s_noise_follows_from_epsilon(tiny_project, tmp_path):
    """Clients of other numbers of records have other noise for one epsilon."""
    privacy = RECORD | {"noise_multiplier": None, "epsilon": 3.0}
    config = build_tiny_config(("ann", "cy"), privacy=privacy, federated={"num_rounds": 1})
    found = {
        c: noise_multiplier_for(config, c, n) for c, n in {"ann": (4, 3), "cy": (3, 5)}.items()
    }
    assert found["ann"] != found["cy"] and min(found.values()) > 0.5
    run = Federation(tiny_project, tmp_path, config).run()
    history = json.loads((run / "history.json").read_text())
    spent = [e["metrics"] for e in history if e["phase"] == "privacy"]
    assert spent and max(v for m in spent for k, v in m.items() if "epsilon" in k) <= 3.0


def test_a_key_that_is_damaged_is_refused(tmp_path):
    folder = ClientFolder(RunPaths(tmp_path), "ann", "model")
    key = folder.read_or_make_secret_key()
    assert key == folder.read_or_make_secret_key() and len(key) == 32
    (tmp_path / "clients/ann/secret.key").write_bytes(key[:5])
    with pytest.raises(RunDirectoryError, match="is damaged: expected 32 bytes"):
        folder.read_or_make_secret_key()
