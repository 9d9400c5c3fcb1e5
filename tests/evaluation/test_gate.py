from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil

import pytest
import torch
from conftest import DEMO_MODEL, build_tiny_config
from loopback import Federation
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from fedlora_app.config.schema import GLOBAL, LOCAL, AdaptersConfig
from fedlora_app.data.client_files import build_question_sets
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.records import DataError, Record
from fedlora_app.demo.civic import DOCUMENT, DURATION, FEE, OFFICE
from fedlora_app.evaluation import gate_fit, memory
from fedlora_app.evaluation.answering import OPEN_ABOVE, Answering
from fedlora_app.evaluation.choices import Cell, Evaluator, open_round, open_store
from fedlora_app.evaluation.feature_space import Space
from fedlora_app.evaluation.gate_files import ABOUT_FILE, TENSORS_FILE, load_gate, save_gate
from fedlora_app.evaluation.gate_fit import FactFeatures, choose_wordings, fit_gate, separate
from fedlora_app.evaluation.gate_report import describe_gate
from fedlora_app.evaluation.names import EXACT_MATCH, PMI
from fedlora_app.evaluation.prompt_features import compute_features
from fedlora_app.evaluation.reported import collect_reports
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.scores import Score, collect_outcomes
from fedlora_app.evaluation.scoring import Prompt, score_prompts
from fedlora_app.evaluation.tables import find_failed
from fedlora_app.foundation.errors import UserError
from fedlora_app.model.adapters import activate, attach_adapters, scaled_local
from fedlora_app.model.base import ModelError
from fedlora_app.runs.reading import load_run

SYSTEM = "You help."
LOCAL_RECORDS = [
    Record(f"What is the penalty for {what}?", f"A fine for {what}.")
    for what in ("noise at night", "a lost key", "late books", "wild parking", "a dirty yard")
]
UNIVERSAL_RECORDS = [
    Record(f"How much does {what} cost?", f"Ten dollars for {what}.")
    for what in ("a passport", "a visa", "a birth certificate", "a fishing licence")
]
TOPICS = [
    *("a passport", "a visa", "a dog tax", "a fishing licence", "a boat", "a stall", "a birth"),
    *("a tree", "a marriage", "a parking place", "a pram", "a garden"),
]
ATTRIBUTES = (FEE, DURATION, DOCUMENT, OFFICE)


def entangle(seed: int = 0) -> tuple[list[Record], list[Record], list[str], list[str]]:
    """Local and universal questions of the same wordings about other topics, and held-out
    wordings of the local ones; then questions about topics that are neither."""
    topics = list(TOPICS)
    random.Random(seed).shuffle(topics)
    parts = topics[:4], topics[4:8], topics[8:]
    local, universal = (
        [
            Record(attribute.ask(topic, wording), attribute.reply(topic, "x"))
            for topic in part
            for attribute in ATTRIBUTES
            for wording in range(6)
        ]
        for part in parts[:2]
    )
    held = [a.ask(topic, w) for topic in parts[0] for a in ATTRIBUTES for w in (7, 8)]
    unknown = [a.ask(topic, w) for topic in parts[2] for a in ATTRIBUTES for w in (7, 8)]
    return local, universal, held, unknown


@pytest.fixture(scope="module")
def adapted():
    """The demo's base model, which knows the language, with random adapters."""
    config = {name: {"rank": 4, "alpha": 8} for name in (GLOBAL, LOCAL)}
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    model = attach_adapters(base, AdaptersConfig.model_validate(config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture
def gate(adapted, tokenizer):
    return fit_gate(adapted, tokenizer, SYSTEM, LOCAL_RECORDS, UNIVERSAL_RECORDS)


def encode(tokenizer, *questions: str) -> list[list[int]]:
    return [encode_prompt(tokenizer, SYSTEM, question) for question in questions]


def test_the_gate_opens_for_local_questions(adapted, tokenizer, gate):
    local = encode(tokenizer, "What is the penalty for noise at noon?")
    universal = encode(tokenizer, "How much does a hunting licence cost?")
    assert gate.weigh(adapted, local + universal).tolist() == [1, 0]
    open_, closed = gate.compute_openness(adapted, local + universal).tolist()
    assert open_ > 0.8 and closed < 0.2
    assert not gate.figures.by_fact and gate.figures.purity == 1
    assert gate.figures.opens_for_local == gate.figures.closes_for_universal == 1


def test_white_space_around_training_questions_moves_no_gate(adapted, tokenizer, gate):
    """As it moves none around a question that is judged."""
    spaced = [
        [
            dataclasses.replace(record, instruction=f"\n {record.instruction}  ")
            for record in records
        ]
        for records in (LOCAL_RECORDS, UNIVERSAL_RECORDS)
    ]
    other = fit_gate(adapted, tokenizer, SYSTEM, *spaced)
    for means, expected in zip(other.means, gate.means, strict=True):
        assert torch.equal(means, expected)


def test_entangled_questions_are_told_apart_by_their_facts(adapted, tokenizer):
    """The same wordings about other things, where the mean of each kind says nothing."""
    local, universal, held, unknown = entangle()
    gate = fit_gate(adapted, tokenizer, SYSTEM, local, universal)
    assert gate.figures.by_fact and gate.figures.purity < 0.9 and gate.floor == -1
    asked = [[r.instruction for r in local], [r.instruction for r in universal], held, unknown]
    opened = [gate.weigh(adapted, encode(tokenizer, *questions)).mean() for questions in asked]
    assert opened[0] > 0.9 and opened[1] < 0.1
    assert opened[2] > opened[3] + 0.2  # a model of 1.1 M parameters; larger ones see more


def test_one_local_fact_is_not_every_question(adapted, tokenizer):
    """Its own wordings alone do not say how near is near enough; other facts' questions do."""
    local, universal, *_ = entangle()
    one_each = list({record.output: record for record in universal}.values())
    gate = fit_gate(adapted, tokenizer, SYSTEM, local[:6], one_each)
    assert gate.figures.by_fact and gate.figures.closes_for_unknown is not None
    asked = [[r.instruction for r in local[:6]], [r.instruction for r in one_each]]
    opened = [gate.weigh(adapted, encode(tokenizer, *questions)).mean() for questions in asked]
    assert opened[0] > 0.6 and opened[1] < 0.1


def test_figures_of_an_entangled_gate_say_how_well_it_separates(adapted, tokenizer):
    local, universal, *_ = entangle()
    figures = fit_gate(adapted, tokenizer, SYSTEM, local, universal).figures
    assert set(figures.metrics()) == {f"gate/{field.name}" for field in dataclasses.fields(figures)}
    assert all(0 <= value <= 1 for value in figures.metrics().values())
    assert figures.opens_for_local > 0.5 < figures.closes_for_unknown


def test_one_universal_question_is_enough_to_stay_closed_for():
    """None can be held out of it, so that by facts nothing would speak against opening."""
    generator = torch.Generator().manual_seed(0)
    own, shared, other = (5 * torch.randn(1, 8, generator=generator).double() for _ in range(3))
    wordings = own + torch.randn(3, 8, generator=generator).double()
    no_tokens = frozenset()
    gate = separate(
        [
            FactFeatures(True, (wordings, wordings), (no_tokens,) * 3),
            FactFeatures(False, (shared, shared), (no_tokens,)),
        ]
    )
    across = torch.nn.functional.normalize(own - shared, dim=-1)
    elsewhere = other - other @ across.T * across  # and yet the nearer to the universal one
    asked = torch.cat([own, shared, elsewhere + 0.4 * own + 0.6 * shared])
    opens = gate.judge((asked, asked), [no_tokens] * 3) > OPEN_ABOVE
    assert opens.tolist() == [True, False, False]


@pytest.mark.parametrize("by_fact", [True, False])
def test_it_is_the_same_gate_however_many_facts_are_compared_at_once(monkeypatch, by_fact):
    generator = torch.Generator().manual_seed(0)
    facts = [
        FactFeatures(number % 2 == 0, tuple(centre + noise), (frozenset(),) * noise.shape[1])
        for number, centre in enumerate(torch.randn(9, 2, 1, 8, generator=generator).double())
        for noise in torch.randn(1, 2, 1 + number % 4, 8, generator=generator).double()
    ]
    expected = separate(facts, by_fact)
    monkeypatch.setattr(gate_fit, "FACTS_AT_ONCE", 2)
    found = separate(facts, by_fact)
    assert found.figures == expected.figures
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=1e-3, atol=1e-3)


def test_what_no_question_was_held_out_for_is_no_figure(adapted, tokenizer):
    """Local facts with several wordings, universal ones with one."""
    local, *_ = entangle()
    figures = fit_gate(adapted, tokenizer, SYSTEM, local, UNIVERSAL_RECORDS).figures
    assert figures.by_fact and figures.closes_for_universal is None
    assert "gate/closes_for_universal" not in figures.metrics()
    assert "universal" not in describe_gate(dataclasses.asdict(figures))


@pytest.mark.parametrize(
    ("numbers", "missing"), [((1, 5), ["local"]), ((5, 1), ["universal"]), ((5, 5), [])]
)
def test_a_kinds_only_fact_was_seen_and_is_no_figure(adapted, tokenizer, numbers, missing):
    num_local, num_universal = numbers
    local, universal = LOCAL_RECORDS[:num_local], UNIVERSAL_RECORDS[:num_universal]
    figures = fit_gate(adapted, tokenizer, SYSTEM, local, universal).figures
    assert not figures.by_fact
    shares = {"local": figures.opens_for_local, "universal": figures.closes_for_universal}
    assert [name for name, share in shares.items() if share is None] == missing
    said = describe_gate({k.removeprefix("gate/"): v for k, v in figures.metrics().items()})
    assert [n for n in shares if f"a single {n} fact cannot be held out" in said] == missing
    assert "None" not in said and ("its own" in said) == ("local" not in missing)


def test_what_is_of_neither_kind_is_not_local(adapted, tokenizer, gate):
    far = encode(tokenizer, "Write a poem about the sea.", "12 times 12?", "Who wrote Hamlet?")
    assert gate.floor > -1
    assert gate.weigh(adapted, far).sum() <= 1
    by_kind = dataclasses.replace(gate, floor=torch.tensor(-1.0), _known={})
    assert by_kind.weigh(adapted, far).sum() > 1  # as it would be without that


def test_one_kind_alone_has_no_gate(adapted, tokenizer):
    assert fit_gate(adapted, tokenizer, SYSTEM, LOCAL_RECORDS, []) is None
    assert fit_gate(adapted, tokenizer, SYSTEM, [], UNIVERSAL_RECORDS) is None


@pytest.mark.parametrize("numbers", [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_few_questions_are_enough_for_a_gate(adapted, tokenizer, numbers):
    num_local, num_universal = numbers
    local, universal = LOCAL_RECORDS[:num_local], UNIVERSAL_RECORDS[:num_universal]
    gate = fit_gate(adapted, tokenizer, SYSTEM, local, universal)
    own = gate.weigh(adapted, encode(tokenizer, *(r.instruction for r in local)))
    other = gate.weigh(adapted, encode(tokenizer, *(r.instruction for r in universal)))
    assert own.mean() > other.mean()


def test_wordings_of_one_fact_stay_together():
    records = [Record(f"{w} {fact}?", f"{fact}.") for fact in "abc" for w in ("What", "Which")]
    assert choose_wordings(records, all_facts=True) == [
        [f"What {fact}?", f"Which {fact}?"] for fact in "abc"
    ]
    named = [Record(r.instruction, r.output, fact="one") for r in records]
    assert len(choose_wordings(named, all_facts=True)) == 1
    many = [Record(f"{w}?", f"{w // 5}.") for w in range(10_000)]
    assert len(choose_wordings(many, all_facts=True)) == 2000
    assert all(len(questions) == 3 for questions in choose_wordings(many, all_facts=True))
    some = choose_wordings(many, all_facts=False)
    assert sum(map(len, some)) <= 4096 and all(len(questions) == 5 for questions in some)


def test_a_space_is_the_inverse_root_of_the_covariance_within_groups():
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(4, 6, dtype=torch.double, generator=generator) for _ in range(5)]
    space = Space.fit(groups)
    deviations = torch.cat([(group - group.mean(0)) * (4 / 3) ** 0.5 for group in groups])
    covariance = deviations.T @ deviations / len(deviations)
    size = covariance.diagonal().mean()
    regularised = 0.7 * covariance + 0.3 * size * torch.eye(6, dtype=torch.double)
    x, y = torch.randn(2, 3, 6, dtype=torch.double, generator=generator)
    centre = torch.stack([group.mean(0) for group in groups]).mean(0)
    inverse = torch.linalg.inv(regularised)

    def product(a, b):
        return ((a - centre) @ inverse * (b - centre)).sum(-1)

    expected = product(x, y) / (product(x, x) * product(y, y)).sqrt()
    found = (space.project(x) * space.project(y)).sum(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_gate_does_not_depend_on_the_adapters(adapted, tokenizer, gate):
    activate(adapted, (GLOBAL, LOCAL))
    prompts = encode(tokenizer, "Why?", "What is the penalty for noise, and where is it paid?")
    before = gate.compute_openness(adapted, prompts)
    changed = copy.deepcopy(adapted)
    for name, parameter in changed.named_parameters():
        if "lora" in name:
            parameter.data.add_(1.0)
    forgetful = dataclasses.replace(gate, _known={})
    torch.testing.assert_close(forgetful.compute_openness(changed, prompts), before)


def test_neighbours_change_no_feature(adapted, tokenizer):
    prompts = encode(tokenizer, "Why?", "A much longer question about nothing at all, is it?")
    together = compute_features(adapted, prompts)
    for index, prompt in enumerate(prompts):
        for alone, expected in zip(compute_features(adapted, [prompt]), together, strict=True):
            torch.testing.assert_close(alone[0], expected[index], atol=1e-5, rtol=0)


def test_long_prompts_go_in_smaller_batches(adapted, tokenizer, monkeypatch):
    prompts = encode(tokenizer, *(f"{'Why and ' * count}why?" for count in range(1, 9)))
    expected = compute_features(adapted, prompts)
    sizes = []
    embedding = adapted.get_base_model().get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    most = 2 * max(map(len, prompts))
    monkeypatch.setattr(memory, "MAX_TOKENS", most)
    found = compute_features(adapted, prompts)
    handle.remove()
    assert len(sizes) > 1 and max(sizes) <= most
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_layers_may_have_another_name_and_place(tokenizer):
    size = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **size)
    model = attach_adapters(OPTForCausalLM(config).eval(), AdaptersConfig())
    assert not hasattr(model.get_base_model().base_model, "layers")
    middle, last = compute_features(model, encode(tokenizer, "Why?"))
    assert middle.shape == last.shape == (1, 32)


def test_a_model_without_a_list_of_layers_has_no_gate(adapted, tokenizer, monkeypatch):
    monkeypatch.setattr(adapted.get_base_model().config, "num_hidden_layers", 99)
    with pytest.raises(ModelError, match=r"adapters\.gate: .* Set it to none"):
        compute_features(adapted, encode(tokenizer, "Why?"))


def test_each_row_is_gated_by_its_own_prompt(adapted, tokenizer, gate):
    prompts = [
        Prompt(SYSTEM, "What is the penalty for loud music?", ("A fine.", "None.")),
        Prompt(SYSTEM, "How much does a hunting licence cost?", ("Ten.", "Twelve dollars.")),
        Prompt(SYSTEM, "Why?", ("So.",)),
    ]
    activate(adapted, (GLOBAL, LOCAL))
    settings = {"batch_size": 8, "max_new_tokens": 6}
    gated = score_prompts(adapted, tokenizer, prompts, combiner=gate, **settings)
    for prompt, answered in zip(prompts, gated, strict=True):
        weight = gate.weigh(adapted, encode(tokenizer, prompt.question)).item()
        assert weight == (answered.openness > 0.5)
        with scaled_local(adapted, weight):
            (expected,) = score_prompts(adapted, tokenizer, [prompt], **settings)
        assert answered.log_likelihoods == pytest.approx(expected.log_likelihoods, abs=1e-4)
        assert answered.generated == expected.generated


def test_the_prompt_that_a_question_is_asked_with_does_not_open_a_gate(adapted, tokenizer, gate):
    """Controls and conversations bring others, which would shift what the base model sees."""
    prompts = [
        Prompt(system, question, ("A fine.", "None."))
        for question in ("What is the penalty for noise at noon?", "How much does a boat cost?")
        for system in (SYSTEM, "", "Two lines.\nAbout Northgate, and the ways of its people.")
    ]
    settings = {"batch_size": 8, "max_new_tokens": 2}
    answers = score_prompts(adapted, tokenizer, prompts, combiner=gate, **settings)
    openness = [answered.openness for answered in answers]
    assert len(set(openness[:3])) == len(set(openness[3:])) == 1 and openness[0] > openness[3]


def forget_hash(folder) -> None:
    content = json.loads((folder / ABOUT_FILE).read_text())
    del content["sha256"]
    (folder / ABOUT_FILE).write_text(json.dumps(content))


ABOUT = {"base_model": "b", "local_train": "l", "universal_train": "u", "system_prompt": "s"}


def test_a_kept_gate_is_the_same_gate(adapted, tokenizer, gate, tmp_path):
    save_gate(tmp_path, gate, ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {ABOUT_FILE, TENSORS_FILE}
    kept = load_gate(tmp_path, ABOUT)
    assert kept.figures == gate.figures
    prompts = encode(tokenizer, "Why?", "What is the penalty for noise?", "How much is a visa?")
    assert torch.equal(
        kept.compute_openness(adapted, prompts), gate.compute_openness(adapted, prompts)
    )


@pytest.mark.parametrize("name", [*ABOUT, "format", "file", "json", "tensor"])
def test_a_gate_of_something_else_is_not_read(gate, tmp_path, name):
    save_gate(tmp_path, gate, ABOUT)
    about = dict(ABOUT)
    if name in about:
        about[name] = "other"
    elif name == "format":
        content = json.loads((tmp_path / ABOUT_FILE).read_text())
        (tmp_path / ABOUT_FILE).write_text(json.dumps(content | {"format": 99}))
    elif name == "file":
        (tmp_path / TENSORS_FILE).unlink()
    else:
        path = tmp_path / (ABOUT_FILE if name == "json" else TENSORS_FILE)
        path.write_bytes(path.read_bytes()[:20])
    assert load_gate(tmp_path, about) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("middle.centre", lambda tensor: tensor[1:]),
        ("last.means", lambda tensor: tensor[1:]),
        ("last.means", lambda tensor: tensor * float("nan")),
        ("last.basis", lambda tensor: tensor.half()),
        ("coefficients", lambda tensor: tensor[:2]),
        ("floor", lambda tensor: tensor[None]),
        ("foreign", lambda tensor: tensor.float()),
        ("foreign", lambda tensor: tensor[None]),
        ("is_local", lambda tensor: tensor.float()),
        ("is_local", torch.ones_like),
    ],
)
def test_tensors_that_no_gate_has_are_not_read(gate, tmp_path, name, change):
    save_gate(tmp_path, gate, ABOUT)
    forget_hash(tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, tmp_path / TENSORS_FILE)
    assert load_gate(tmp_path, ABOUT) is None


def test_other_tensors_than_were_written_are_not_read(adapted, tokenizer, gate, tmp_path):
    """Gates of before have no hash; one of another base model's size says so when it is asked."""
    save_gate(tmp_path, gate, ABOUT)
    tensors = load_file(tmp_path / TENSORS_FILE)
    save_file(tensors | {"floor": tensors["floor"] - 2}, tmp_path / TENSORS_FILE)
    assert load_gate(tmp_path, ABOUT) is None
    for name in ("middle", "last"):
        for part in ("centre", "basis", "means"):
            axis = int(part == "means")
            narrow = tensors[f"{name}.{part}"].narrow(axis, 1, 31).contiguous()
            tensors[f"{name}.{part}"] = narrow
    save_file(tensors, tmp_path / TENSORS_FILE)
    forget_hash(tmp_path)
    with pytest.raises(UserError, match="features of 31 numbers, and the base model makes 128"):
        load_gate(tmp_path, ABOUT).compute_openness(adapted, encode(tokenizer, "Why?"))


@pytest.mark.parametrize("figures", [{"purity": "much"}, {"other": 1.0}])
def test_figures_that_no_gate_has_are_not_read(gate, tmp_path, figures):
    save_gate(tmp_path, gate, ABOUT)
    content = json.loads((tmp_path / ABOUT_FILE).read_text())
    content["figures"] |= figures
    (tmp_path / ABOUT_FILE).write_text(json.dumps(content))
    assert load_gate(tmp_path, ABOUT) is None


def test_json_without_end_is_not_read(gate, tmp_path):
    save_gate(tmp_path, gate, ABOUT)
    (tmp_path / ABOUT_FILE).write_text("[" * 100_000)
    assert load_gate(tmp_path, ABOUT) is None


@pytest.mark.parametrize("name", [None, ABOUT_FILE, TENSORS_FILE])
def test_no_link_leads_to_a_gate(gate, tmp_path, name):
    folder, elsewhere = tmp_path / "gate", tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_gate(elsewhere, gate, ABOUT)
    if name is None:
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        save_gate(folder, gate, ABOUT)
        assert load_gate(folder, ABOUT) is not None
        (folder / name).unlink()
        (folder / name).symlink_to(elsewhere / name)
    assert load_gate(folder, ABOUT) is None


@pytest.mark.parametrize(
    ("question_set", "openness", "is_right", "global_is_right", "expected"),
    [
        ("conflict", 0.9, False, False, "local"),
        ("local", 0.1, False, False, "gate"),
        ("universal", 0.9, False, True, "gate"),
        ("universal", 0.9, False, False, "global"),
        ("universal", 0.1, False, False, "global"),
        ("universal", 0.1, True, True, None),
        ("conflict", None, False, False, None),
    ],
)
def test_who_a_wrong_answer_is_due_to(question_set, openness, is_right, global_is_right, expected):
    def score(is_right, openness=None):
        return Score({EXACT_MATCH.name: is_right}, "", (), openness)

    shared = score(global_is_right)
    assert find_failed(question_set, score(is_right, openness), shared, EXACT_MATCH) == expected


@pytest.fixture(scope="module")
def gated_run(tiny_project, tmp_path_factory):
    config = build_tiny_config(adapters={"gate": "prompt"})
    return Federation(tiny_project, tmp_path_factory.mktemp("gated"), config).run()


def test_a_client_keeps_its_gate_and_reports_its_figures(gated_run):
    for client in ("ann", "bob"):
        folder = gated_run / "clients" / client / "gate"
        content = json.loads((folder / ABOUT_FILE).read_text())
        assert content["fitted_to"].keys() == ABOUT.keys()
    history = json.loads((gated_run / "history.json").read_text())
    reported = [e["metrics"] for e in history if e["phase"] == "evaluate" and e["round"] == 2]
    assert len(reported) == 2
    for metrics in reported:
        assert metrics["gate/opens_for_local"] >= 0.5
        assert 0 <= metrics["global+local/local/gate_open"] <= 1
        assert "global/local/gate_open" not in metrics


def test_pmi_compares_with_the_adapters_that_answered(gated_run, tiny_project, tmp_path):
    """Whatever the gate would make of the empty question under which a prior is taken."""
    saved = open_round(load_run(gated_run), tiny_project)
    client = saved.run.config.client("ann")
    sets = build_question_sets(client, saved.files["ann"])
    evaluator = Evaluator(saved, open_store(saved, tmp_path / "scores"), lambda *_: None)
    own, alone = saved.own("ann"), Answering(with_global=True)
    seen = set()
    for name, questions in sets.items():
        cells = [
            Cell("ann", name, who, client.system_prompt, tuple(questions))
            for who in (own, dataclasses.replace(own, combine="scale"), alone)
        ]
        by_cell = evaluator.evaluate(cells)
        for gated, pair, shared in zip(*(by_cell[cell] for cell in cells), strict=True):
            answered_by = pair if gated.openness > OPEN_ABOVE else shared
            assert gated.value(PMI) == pytest.approx(answered_by.value(PMI), abs=1e-4)
            seen.add(gated.openness > OPEN_ABOVE)
        reports = collect_reports(json.loads((gated_run / "history.json").read_text()))
        values = collect_outcomes(by_cell[cells[0]], PMI)
        reported = reports["ann"][f"{GLOBAL}+{LOCAL}/{name}/{PMI.reported}"]
        assert reported == pytest.approx(sum(values) / len(values))
    assert seen == {True, False}


def test_a_kept_gate_needs_no_data(gated_run, tiny_project, tmp_path):
    """Who asks a finished run may not have what it was trained on, or have it changed since."""
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    shutil.copytree(gated_run, tmp_path / "run")
    run = load_run(tmp_path / "run")
    for file in ("ann_local.json", "universal_test.json"):
        (project / file).unlink()
    saved = SavedModel(run, 2, project)
    with saved.answering(saved.own("ann")) as (_, gate):
        kept = load_file(run.paths.gate("ann") / TENSORS_FILE)
        assert torch.equal(gate.coefficients, kept["coefficients"])
    shutil.rmtree(run.paths.gate("ann"))
    other = SavedModel(run, 2, project)
    with pytest.raises(DataError, match="ann_local"), other.answering(other.own("ann")):
        pass
