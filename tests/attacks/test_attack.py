"""What a server can tell from kept updates, by the command that users type, on tiny runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, build_tiny_config, build_tiny_model
from loopback import Federation

from fedlora_app.attacks.limits import largest_auc
from fedlora_app.attacks.observed import apply_update, observe
from fedlora_app.attacks.records import Side, Suspicion, collect_suspicions
from fedlora_app.attacks.results import (
    ALL_ROUNDS,
    AVERAGE,
    BEFORE,
    FACTS,
    HEADLINES,
    OTHERS,
    OWN,
    PRIVATE,
    SETS,
    UPDATE,
    choose_headline,
    exceeding,
    group,
)
from fedlora_app.attacks.scores import compare_with_gradients, input_subspaces
from fedlora_app.attacks.tokens import (
    Batch,
    find_batch,
    know_vocabulary,
    measure_tokens,
    score_tokens,
)
from fedlora_app.config.loading import change_config, load_config
from fedlora_app.config.schema import GLOBAL
from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.records import Record, RecordFile
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation.membership import Candidate
from fedlora_app.model.adapters import (
    activate,
    attach_adapters,
    build_initial_state,
    named_parameters,
    set_state,
)
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import load_run
from fedlora_app.training.losses import answer_log_likelihoods
from fedlora_app.training.shapes import build_shapes

CLIENTS = ("ann", "bob", "cy")


def configure(overrides: str = "", **federated):
    """Return the tiny experiment of three clients whose updates are kept, without evaluation."""
    changes = {"federated": {"keep_uploads": True, **federated}, "evaluation": {"interval": 0}}
    config = build_tiny_config(CLIENTS, **changes)
    return change_config(config, f"training.learning_rate=0.02 {overrides}")


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory):
    """Return the tiny project, with facts of which each client has some that no other has."""
    folder = shutil.copytree(tiny_project, tmp_path_factory.mktemp("attacks") / "project")
    things = ["hat", "key", "cup", "map", "pen", "bag", "box", "cap", "pot"]
    places = ["red", "blue", "green", "black", "white", "brown", "red", "blue", "green"]
    for index, client in enumerate(CLIENTS):
        own = slice(3 * index, 3 * index + 3)
        path = folder / f"{client}_universal.json"
        records = json.loads(path.read_text())
        records += [
            {"instruction": f"Where is the {t}?", "output": f"It is {p}.", "fact": t}
            for t, p in zip(things[own], places[own], strict=True)
        ]
        path.write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def runs(project):
    """Return runs by name, made when first asked for."""
    made = {}

    def run(name: str, **settings):
        if name not in made:
            config = configure(**settings)
            made[name] = Federation(project, project / "results", config).run(name)
        return made[name]

    return run


@pytest.fixture(scope="module")
def dual(runs):
    return runs("dual", overrides="training.global_epochs=8")


def test_an_update_leads_to_what_the_client_had_trained(dual, project):
    run = load_run(dual)
    model, _ = build_shapes(run.config, project)
    observed = observe(run, model, 2)
    assert set(observed.updates) == set(observed.reached) == set(CLIENTS)
    for client in CLIENTS:
        for key, tensor in observed.reached[client].items():
            assert torch.equal(tensor, observed.before[key] + observed.updates[client][key])
    weights = {"ann": 7, "bob": 7, "cy": 6}
    for key, tensor in observed.mean_update.items():
        mean = sum(weights[c] * observed.updates[c][key] for c in CLIENTS) / 20
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)


def test_what_does_not_travel_stays_as_it_was(runs, project):
    """Of a factor that alternates, and of ranks that a client does not have."""
    run = load_run(runs("alternate", aggregation="alternate"))
    model, _ = build_shapes(run.config, project)
    observed = observe(run, model, 1)
    for key, tensor in observed.reached["ann"].items():
        assert torch.equal(tensor, observed.before[key]) == (".lora_A." in key)
    raw = configure(aggregation="svd").dump()
    raw["federated"]["clients"][1]["rank"] = 2
    config = type(run.config).model_validate(raw)
    narrow = {k: torch.ones(2, 3) if ".lora_A." in k else torch.ones(5, 2) for k in ("x.lora_A.w",)}
    before = {"x.lora_A.w": torch.zeros(4, 3)}
    reached = apply_update(config, "bob", before, narrow)["x.lora_A.w"]
    assert reached.tolist() == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]


def test_one_update_tells_which_facts_a_client_has(dual, fedlora, project, monkeypatch):
    monkeypatch.chdir(project)
    status, out, err = fedlora("attack", dual)
    assert status == 0, err
    found = json.loads((dual / "attack.json").read_text())
    assert found["rounds"] == [1, 2] and found["assumptions"] and found["not_tried"]
    by_set = group(found["records"], "client", "set")
    assert set(by_set) == {(client, name) for client in CLIENTS for name in SETS}
    for client in CLIENTS:
        best = choose_headline(by_set[client, FACTS], HEADLINES[FACTS])
        own, others = (best[source]["auc"]["value"] for source in (UPDATE, OTHERS))
        assert own > 0.7 and own > others + 0.3
        assert best[UPDATE]["rounds"] == ALL_ROUNDS and best[UPDATE]["was_trained"]
        assert not by_set[client, "local_answers"][0]["was_trained"]
    sources = {row["source"] for row in found["records"]}
    assert sources == {UPDATE, OTHERS, AVERAGE}
    asked = {(r["whose"], r["prompt"], r["source"]) for r in found["texts"]}
    assert {(w, p, s) for w in (OWN, OTHERS, PRIVATE) for p in ("nothing", "question")
            for s in (UPDATE, AVERAGE, BEFORE)} == asked  # fmt: skip
    assert {row["among"] for row in found["tokens"]} == {"vocabulary", "domain"}
    assert found["canaries"] == [] and "fedlora check CONFIG --plant" in out
    assert "Told apart, AUC in %" in out and "Answers given back" in out
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("Written"))
    page = (dual / "report.html").read_text()
    assert "What an update gives away" in page and "own update" in page


def test_attacked_runs_are_put_into_a_table(dual, fedlora, tmp_path, monkeypatch):
    """A run per seed, by the attack that was chosen for each set."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.privacy import COLUMNS, describe, measure

    assert fedlora("attack", dual, "--texts", "2", "--sample", "4")[0] == 0
    runs = [tmp_path / f"tiny-seed{seed}" for seed in (1, 2, 3)]
    for run in runs:
        run.mkdir()
        shutil.copy(dual / "attack.json", run)
    (row,) = (table := measure(runs))["rows"]
    assert (row["setting"], row["seeds"]) == ("tiny", 3)
    own, others = (row[f"{FACTS}/{source}"]["value"] for source in (UPDATE, OTHERS))
    assert own > others + 0.3
    heading, _, line = describe(table).splitlines()[-3:]
    assert heading.count("|") == line.count("|") == len(COLUMNS) + 3
    (runs[0] / "attack.json").unlink()
    with pytest.raises(RunDirectoryError, match="Make it: fedlora attack"):
        measure(runs)


def test_local_answers_show_in_updates_that_were_trained_on_them(runs, fedlora, project):
    """The same attack that finds nothing where the local phase stays at the client."""
    run = runs("fedavg", mode="fedavg", overrides="training.global_epochs=12")
    status, out, err = fedlora("attack", run, "--round", "2", "--json", "--texts", "2")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["rounds"] == [2] and found == json.loads((run / "attack.json").read_text())
    for (client,), rows in group(found["records"], "client").items():
        those = [row for row in rows if row["set"] == "local_answers"]
        assert choose_headline(those, HEADLINES["local_answers"])[UPDATE]["auc"]["value"] > 0.9, (
            client
        )
        assert all(row["was_trained"] for row in rows)


@pytest.mark.minutes
@pytest.mark.parametrize("rule", ["alternate", "freeze-a", "residual", "median"])
def test_attacks_take_every_kind_of_update(rule, runs, fedlora):
    run = runs(rule, aggregation=rule)
    status, out, err = fedlora("attack", run, "--json", "--texts", "2", "--sample", "4")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {row["client"] for row in found["records"]} == set(CLIENTS)
    has_a = any(row["attack"] == "projection" for row in found["records"])
    assert has_a == (rule != "freeze-a")


@pytest.mark.minutes
def test_canaries_that_were_planted_are_measured(project, fedlora, monkeypatch):
    monkeypatch.chdir(project)
    config = configure("training.global_epochs=30 federated.num_rounds=1")
    (project / "plain.yaml").write_text(yaml.safe_dump(config.dump()))
    _, _, err = fedlora("check", "plain.yaml", "--plant", "3", "--output", "planted")
    assert "with 18 canaries" in err
    planted = load_config(project / "planted" / "experiment.yaml")
    run = Federation(project, project / "results", planted).run("planted")
    status, out, err = fedlora("attack", run, "--texts", "2", "--sample", "4")
    assert status == 0, err
    rows = json.loads((run / "attack.json").read_text())["canaries"]
    bits = {(r["client"], r["role"], r["source"]): r["mean"]["value"] for r in rows}
    for client in CLIENTS:
        assert bits[client, "universal", UPDATE] > bits[client, "universal", BEFORE]
    assert "Exposure of canaries" in out


def test_noise_that_was_switched_off_shows(runs, fedlora, project):
    """A run whose settings promise noise, and whose updates have none, tells more than may be."""
    honest = runs("fedavg", mode="fedavg", overrides="training.global_epochs=12")
    copy = shutil.copytree(honest, project / "results" / "promised")
    config = json.loads((copy / "config.json").read_text())
    config["privacy"] |= {"unit": "client", "noise": "client", "clip_norm": 1.0}
    config["privacy"] |= {"epsilon": 0.1, "delta": 1e-6}
    (copy / "config.json").write_text(json.dumps(config))
    status, out, err = fedlora("attack", copy, "--texts", "2")
    assert status == 0, err
    limit = json.loads((copy / "attack.json").read_text())["limit"]
    assert limit["unit"] == "client" and limit["epsilon"] <= 0.1
    assert limit["auc"] == pytest.approx(largest_auc(limit["epsilon"], 1e-6, 2))
    assert limit["auc"] < 0.56
    assert "the noise is not what the settings say" in " ".join(out.split())
    shutil.rmtree(copy)


@pytest.mark.minutes
def test_noise_that_is_there_keeps_within_what_epsilon_allows(runs, fedlora):
    privacy = {"unit": "client", "noise": "client", "clip_norm": 1.0, "epsilon": 1.0}
    settings = " ".join(f"privacy.{k}={v}" for k, v in {**privacy, "delta": 1e-6}.items())
    run = runs("noisy", overrides=f"training.global_epochs=8 {settings}")
    status, out, err = fedlora("attack", run, "--texts", "2")
    assert status == 0, err
    found = json.loads((run / "attack.json").read_text())
    assert found["limit"] and not exceeding(found["records"], found["limit"])
    assert "the noise is not what the settings say" not in " ".join(out.split())


@pytest.mark.parametrize(
    ("epsilon", "delta", "units", "expected"),
    [(0, 0, 1, 0.5), (1, 0, 1, 0.7310586), (0.5, 0.05, 1, 0.6592695), (0.5, 0.01, 2, 0.7451169)],
)
def test_what_epsilon_allows_is_the_area_below_its_roc(epsilon, delta, units, expected):
    assert largest_auc(epsilon, delta, units) == pytest.approx(expected, abs=1e-6)
    assert largest_auc(2000.0, 1e-5, units) == pytest.approx(1)


def test_a_run_without_updates_is_refused(runs, fedlora, project):
    bare = runs("bare", keep_uploads=False)
    status, _, err = fedlora("attack", bare)
    assert status == 2 and "has not kept what its clients sent" in err
    alone = runs("alone", mode="local-only")
    status, _, err = fedlora("attack", alone)
    assert status == 2 and "clients send a server no updates" in err
    kept = runs("dual", overrides="training.global_epochs=8")
    status, _, err = fedlora("attack", kept, "--round", "9")
    assert status == 2 and "has no updates of round 9; it has those of rounds 1 to 2" in err


def test_a_changed_update_is_named(dual, fedlora, project, tmp_path):
    copy = shutil.copytree(dual, project / "results" / "changed")
    file = copy / "server" / "round_002" / "uploads" / "bob.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    status, _, err = fedlora("attack", copy)
    assert status == 2 and "bob.safetensors" in err
    shutil.rmtree(copy)


class TestOneGradient:
    """Before AdamW a gradient gives away what it was made of, and the meter must see it."""

    @pytest.fixture(scope="class")
    def model(self, tokenizer):
        torch.manual_seed(0)
        base = build_tiny_model(len(tokenizer), num_hidden_layers=1)
        config = build_tiny_config(adapters={"global": {"rank": 24, "alpha": 48}}).adapters
        return attach_adapters(base, config)

    def gradient(self, model, state, examples):
        set_state(model, GLOBAL, state)
        activate(model, [GLOBAL], [GLOBAL])
        for example in examples:
            (-answer_log_likelihoods(model, [example])[0].mean()).backward()
        found = {k: -p.grad.clone() for k, p in named_parameters(model, GLOBAL).items()}
        model.zero_grad(set_to_none=True)
        activate(model, [GLOBAL])
        return found

    @pytest.fixture(scope="class")
    def start(self, model):
        state = build_initial_state(model, GLOBAL, 1)
        generator = torch.Generator().manual_seed(2)
        return {k: torch.randn(t.shape, generator=generator) * 0.1 for k, t in state.items()}

    def test_its_tokens_lie_in_its_input_subspace(self, model, start, tokenizer):
        trained = [encode_example(tokenizer, "", Record("Name the red office.", "It is red."))]
        update = self.gradient(model, start, trained)
        distinct = {t for t in trained[0].input_ids}
        scores = score_tokens(know_vocabulary(model, len(tokenizer)), start, update)
        batch = find_batch(tokenizer, "", trained, [])
        assert batch.present and batch.present < distinct
        rows = {(r["attack"], r["among"]): r for r in measure_tokens(scores, batch)}
        rank = max(basis.shape[1] for basis in input_subspaces(update).values())
        assert rank <= 24
        assert rows["input", "vocabulary"]["auc"]["value"] > 0.95
        assert rows["input", "domain"]["auc"]["value"] is None  # nothing else was given

    def test_above_the_lowest_layer_only_writing_is_seen(self, tokenizer):
        base = build_tiny_model(len(tokenizer), num_hidden_layers=2)
        config = build_tiny_config(
            adapters={"global": {"rank": 4, "alpha": 8, "first_layer": 1}}
        ).adapters
        model = attach_adapters(base, config)
        state = build_initial_state(model, GLOBAL, 1)
        update = {k: torch.ones_like(t) for k, t in state.items()}
        known = know_vocabulary(model, len(tokenizer))
        assert known.inputs is None and set(score_tokens(known, state, update)) == {"output"}

    def test_its_records_are_aligned_with_it(self, model, start, tokenizer):
        examples = [
            encode_example(tokenizer, "", Record(f"Which office is {c}?", f"The {c} one."))
            for c in ("red", "blue", "green", "black")
        ]
        update = self.gradient(model, start, examples[:2])
        found = compare_with_gradients(model, start, {"x": update}, examples)["alignment"]["x"]
        assert min(found[:2]) > max(found[2:])


def test_scores_that_are_all_alike_find_no_token():
    batch = Batch(frozenset(range(40)), frozenset(range(40, 200)), frozenset())
    for row in measure_tokens({"effect": np.zeros(1000)}, batch):
        assert row["auc"]["value"] == 0.5
        assert row["precision"]["value"] == pytest.approx(row["chance"])


def test_data_that_were_changed_since_are_refused(dual, fedlora, project):
    path = project / "ann_universal.json"
    kept = path.read_text()
    path.write_text(kept.replace("one.", "other one."))
    status, _, err = fedlora("attack", dual)
    path.write_text(kept)
    assert status == 2 and "not those that the run began with: universal_train" in err


def test_a_fact_counts_once_however_many_records_it_has():
    def side(facts):
        return Side(tuple(Candidate("", f, str(i)) for i, f in enumerate(facts)), tuple(facts))

    members, others = side(["a", "a", "a", "b"]), side(["c", "d", "d"])
    suspicion = Suspicion("ann", FACTS, members, others, was_trained=True)
    scores = {c: 1.0 for c in members.candidates} | {c: 0.0 for c in others.candidates}
    measured = suspicion.measure(scores)
    assert measured["auc"]["value"] == 1 and measured["auc"]["n"] == 4
    assert measured["pairs_won"] is None


def client_that_has(facts):
    """Return the files of a client with a universal record about each fact, and no other one."""
    records = [Record(f"Where is the {f}?", f"The {f} is red.", fact=f) for f in facts]
    files = [RecordFile(Path("of.json"), "", found) for found in (records, [])]
    return ClientFiles(*files, {})


def test_facts_that_a_client_shares_are_its_own_where_it_has_no_others(tokenizer):
    """Of three countries that train on two thirds each, no fact belongs to one alone."""
    has = {"ann": "hat key", "bob": "key cup", "cy": "cup hat pen"}
    files = {client: client_that_has(facts.split()) for client, facts in has.items()}
    found = collect_suspicions(tokenizer, files, build_tiny_config(CLIENTS), 10)
    sides = {s.client: (s.members.facts, s.nonmembers.facts) for s in found if s.name == FACTS}
    assert set(sides) == set(CLIENTS)
    ours, theirs = ({client: set(side[i]) for client, side in sides.items()} for i in (0, 1))
    assert ours == {"ann": {"hat", "key"}, "bob": {"key", "cup"}, "cy": {"pen"}}
    assert theirs == {"ann": {"cup", "pen"}, "bob": {"hat", "pen"}, "cy": {"key"}}
