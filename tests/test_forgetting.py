"""A client that is taken out of a finished run, by the command that users type."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation
from safetensors.torch import load_file, save_file
from test_aggregation import adapter_files, interrupt_in_round, server_state

from fedlora_app.config.loading import change_config, parse_config
from fedlora_app.config.participation import training_clients
from fedlora_app.config.schema import ConfigError
from fedlora_app.config.sharing import PERSONAL
from fedlora_app.federation.rules import RULES
from fedlora_app.forgetting import Forgetting, ForgettingError, configure_without
from fedlora_app.runs.reading import load_run
from fedlora_app.runs.resuming import find_resumption
from fedlora_app.strategy import RoundError
from fedlora_app.training.shapes import build_shapes

CLIENTS = ("ann", "bob", "cy")
OTHERS = ("bob", "cy")
WEIGHTS = "adapter_model.safetensors"


def configure(**federated):
    """Return the tiny experiment of three clients whose updates are kept, without evaluation."""
    changes = {"federated": {"keep_uploads": True, **federated}, "evaluation": {"interval": 0}}
    return build_tiny_config(CLIENTS, **changes)


def hash_all(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def open_forgetting(run, project, client):
    saved = load_run(run)
    model, _ = build_shapes(saved.config, project)
    return Forgetting(saved, client, configure_without(saved, client), project, model)


def say_nothing(*_):
    pass


@pytest.fixture(scope="module")
def project(tiny_project, tmp_path_factory):
    return shutil.copytree(tiny_project, tmp_path_factory.mktemp("forgetting") / "project")


@pytest.fixture(scope="module")
def kept(project):
    """A run with a gate, and a server optimizer whose state has to be made again too."""
    config = configure(server_optimizer="momentum", upload_dtype="bfloat16")
    config = change_config(config, "training.global_epochs=6 adapters.gate=prompt")
    return Federation(project, project / "results", config).run("kept")


@pytest.fixture(scope="module")
def written(kept, project):
    """The run without ann, as the command writes it."""
    target = kept.parent / "written"
    about = open_forgetting(kept, project, "ann").write(target, say_nothing)
    return target, about


def test_what_counted_is_kept_and_named(kept):
    run = load_run(kept)
    assert [entry["round"] for entry in run.manifest["rounds"]] == [0, 1, 2]
    for entry in run.manifest["rounds"][1:]:
        assert entry["weights"] == {"ann": 4, "bob": 4, "cy": 3}
        for client in CLIENTS:
            path = run.paths.upload(client, entry["round"])
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            assert sha256 == entry["adapters"][f"upload:{client}"]
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert not list(kept.rglob(".*.partial"))


def test_without_a_client_the_rest_is_averaged_again(kept, written):
    run, _ = written
    first = server_state(kept, 0)
    assert all(torch.equal(first[key], tensor) for key, tensor in server_state(run, 0).items())
    expected, velocity = first, dict.fromkeys(first, 0.0)
    for server_round in (1, 2):
        folder = kept / "server" / f"round_00{server_round}" / "uploads"
        bob, cy = (load_file(folder / f"{client}.safetensors") for client in OTHERS)
        for key in first:
            velocity[key] = 0.9 * velocity[key] + (4 * bob[key] + 3 * cy[key]) / 7
        expected = {key: tensor + velocity[key] for key, tensor in expected.items()}
        found = server_state(run, server_round)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
        assert any(
            not torch.equal(found[k], t) for k, t in server_state(kept, server_round).items()
        )
    final = run / "final" / "global" / WEIGHTS
    assert final.read_bytes() == (run / "server" / "round_002" / WEIGHTS).read_bytes()


def test_the_new_run_is_a_run_of_the_others_and_says_what_it_is(kept, written):
    run, about = written
    old, new = load_run(kept), load_run(run)
    assert new.config.client_ids == list(OTHERS) and new.config.data.conflict_clients == ["ann"]
    assert new.manifest["forgotten"] == about and new.manifest["finished"]
    assert (about["client"], about["run"], about["round"]) == ("ann", "kept", 2)
    assert about["global_adapter"] == old.adapter_sha256(2) != new.adapter_sha256(2)
    assert about["note"].startswith("An approximation: ") and about["rounds_without_update"] == []
    assert set(new.manifest["clients"]) == set(OTHERS)
    assert new.manifest["base_model"] == old.manifest["base_model"]
    assert not [path for path in run.rglob("*") if "ann" in path.name]
    for entry in new.manifest["rounds"]:
        assert not any(name.endswith(":ann") for name in entry["adapters"])
        assert "ann" not in entry.get("weights", {})
    for client in OTHERS:
        for folder in (f"clients/{client}/round_002", f"final/clients/{client}"):
            assert (run / folder / WEIGHTS).read_bytes() == (kept / folder / WEIGHTS).read_bytes()
        assert (run / "clients" / client / "gate" / "gate.json").exists()
    history = json.loads((run / "history.json").read_text())
    assert {entry["client"] for entry in history} == {*OTHERS, "(server)"}
    phases = {(e["round"], e["client"]): e["phase"] for e in history if e["phase"] == "evaluate"}
    assert {server_round for server_round, _ in phases} <= {0}
    (of_old,), (of_new,) = (
        [e["metrics"] for e in entries if e["round"] == 2 and e["phase"] == "aggregate"]
        for entries in (json.loads((kept / "history.json").read_text()), history)
    )
    assert of_old["global_norm"] != of_new["global_norm"]


def swap_cells(evaluation):
    return {(r["client"], r["question_set"], r["adapters"]): r for r in evaluation["swap_table"]}


def evaluate_with_global_of(new, run, fedlora):
    """Return the swap table of a run, one file of which is exchanged for another run's."""
    weights = f"server/round_002/{WEIGHTS}"
    shutil.copy(new / weights, run / weights)
    manifest = json.loads((run / "manifest.json").read_text())
    sha256 = load_run(new).adapter_sha256(2)
    manifest["rounds"][2]["adapters"]["global"] = sha256
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert fedlora("evaluate", run, "--core")[0] == 0
    return swap_cells(json.loads((run / "evaluation.json").read_text()))


def test_the_command_tells_what_changes_and_leaves_the_run_alone(kept, fedlora, unrendered):
    before = hash_all(kept)
    status, out, err = fedlora("forget", kept, "--client", "ann")
    run = kept.parent / "kept-without-ann"
    assert status == 0 and "INFO" not in out + err
    assert "make the run's own global adapters, to the byte" in out
    assert "Note: An approximation" in out and "still holds the updates of ann" in out
    assert re.search(r" ann +universal, own +1/1 +(0|100) -> ", out)
    assert re.search(r" others +local +9/5 +\d+ -> \d+ .* \d+ -> \d+ ", out)
    rows = {
        (row["asked"], row["question_set"]): row
        for row in json.loads((run / "forgetting.json").read_text())["rows"]
        if not row["of_forgotten_alone"]
    }
    assert len(rows) == 6
    # Every command reads the new run, and finds what the table says.
    assert fedlora("evaluate", run, "--core")[0] == 0
    assert hash_all(kept) == before
    copy = shutil.copytree(kept, kept.parent / "copy")
    assert fedlora("evaluate", copy, "--core")[0] == 0
    old, new = (json.loads((path / "evaluation.json").read_text()) for path in (copy, run))
    cells = swap_cells(old)
    for name in ("local", "conflict", "universal"):
        row = rows["ann", name]
        assert row["global_alone"]["before"]["value"] == cells["ann", name, "global"]["accuracy"]
        pair = cells["ann", name, "global+local:ann"]["accuracy"]
        assert row["own_adapters"]["before"]["value"] == pair
        assert row["own_adapters"]["after"] is None and row["global_alone"]["after"]["n"]
        shares = {(r["answered_by"], r["question_set"]): r["accuracy"] for r in new["shares"]}
        row = rows[None, name]
        assert row["global_alone"]["after"] == shares["global", name]
        assert row["own_adapters"]["after"] == shares["global+local:own", name]
    status, out, _ = fedlora("compare", copy, run)
    assert status == 0 and "have other clients" in out
    assert fedlora("ask", run, "--client", "bob", "What is the red rule?")[0] == 0
    target = kept.parent / "exported"
    assert fedlora("export", run, "--client", "cy", "--output", target)[0] == 0
    assert fedlora("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "ann of kept. An approximation" in page and "fedlora forget kept --client ann" in page
    assert "kept-without-ann: dual, finished, round 2/2" in fedlora("runs", kept.parent)[1]
    status, _, err = fedlora("forget", kept, "--client", "ann")
    assert status == 2 and "exists already and is left as it is" in err
    of_new_global = evaluate_with_global_of(run, copy, fedlora)
    for name in ("local", "conflict", "universal"):
        cell = of_new_global["ann", name, "global"]
        assert rows["ann", name]["global_alone"]["after"]["value"] == cell["accuracy"]


@pytest.fixture
def copy(kept, project):
    """A copy of the run, to be damaged."""
    run = shutil.copytree(kept, project / "results" / "damaged")
    yield run
    shutil.rmtree(run)


def raw_clients(raw):
    return raw["federated"]["clients"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "local-only"}, "no server averages updates"),
        ({"mode": "fedavg", "keep_uploads": False}, "has not kept its clients' updates"),
        ({"aggregation": "share-a", "keep_uploads": False}, "a global adapter of its own"),
        ({"aggregation": "median"}, "needs the updates of 3 clients and a round may have 2"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(copy, change, message):
    edit(copy / "config.json", lambda raw: raw["federated"].update(change))
    if change.get("aggregation"):
        edit(copy / "config.json", lambda raw: raw["federated"].update(server_optimizer="none"))
    with pytest.raises((ForgettingError, ConfigError), match=message):
        configure_without(load_run(copy), "ann")


def test_without_validation_questions_the_last_round_is_the_result(copy, tiny_project):
    def validate(raw):
        raw["federated"]["final"], raw["evaluation"]["interval"] = "best", 1
        raw["federated"]["clients"][0]["local_validation"] = "ann_local.json"

    edit(copy / "config.json", validate)
    assert configure_without(load_run(copy), "bob").federated.final == "best"
    assert configure_without(load_run(copy), "ann").federated.final == "last"


def test_who_is_nobody_or_alone_and_a_run_that_goes_on_are_refused(copy):
    with pytest.raises(ConfigError, match='No client is called "dora"'):
        configure_without(load_run(copy), "dora")
    edit(copy / "manifest.json", lambda raw: raw.update(finished=None))
    with pytest.raises(ForgettingError, match="has not finished. Finish it first"):
        configure_without(load_run(copy), "ann")
    edit(copy / "manifest.json", lambda raw: raw.update(finished="now"))
    edit(
        copy / "config.json",
        lambda raw: raw["federated"].update(clients=raw["federated"]["clients"][:1]),
    )
    edit(copy / "config.json", lambda raw: raw["data"].update(conflict_clients=["bob", "cy"]))
    with pytest.raises(ForgettingError, match="ann is the only client"):
        configure_without(load_run(copy), "ann")


def test_updates_that_are_not_what_they_were_are_found_and_nothing_is_written(copy, fedlora):
    upload = load_run(copy).paths.upload("bob", 2)

    def forget():
        status, _, err = fedlora("forget", copy, "--client", "ann", "--no-evaluate")
        assert status == 2 and not copy.with_name("damaged-without-ann").exists()
        assert not list(copy.parent.glob(".*partial*"))
        return err

    edit(copy / "manifest.json", lambda raw: raw["rounds"][2]["weights"].update(bob=5))
    err = forget()
    assert (
        "round 2 does not become the global adapter that the run has; they differ by up to" in err
    )
    edit(copy / "manifest.json", lambda raw: raw["rounds"][2]["weights"].pop("bob"))
    assert "does not say of round 2 which updates counted" in forget()
    edit(copy / "manifest.json", lambda raw: raw["rounds"][2]["weights"].update(bob=4))
    state = load_file(upload)
    save_file({key: tensor + 1e-3 for key, tensor in state.items()}, upload)
    assert f"{upload} is not the file that was written" in forget()
    upload.unlink()
    assert f"{upload} does not exist or is not a regular file. Expected the update" in forget()


def test_a_server_has_no_local_adapters_to_copy_and_nobody_to_ask(copy, project, fedlora):
    for folder in (copy / "clients", copy / "final" / "clients"):
        shutil.rmtree(folder)
    status, _, err = fedlora("forget", copy, "--client", "ann")
    assert status == 2 and err.endswith("To forget without asking anything: --no-evaluate\n")
    assert not copy.with_name("damaged-without-ann").exists()
    status, out, _ = fedlora("forget", copy, "--client", "ann", "--no-evaluate", "--name", "bare")
    assert status == 0 and "not in the new run: the local adapters of bob, cy." in out
    assert server_state(copy.with_name("bare"), 2).keys() == server_state(copy, 2).keys()


def test_one_client_after_the_other_is_forgotten(written, project, fedlora):
    run, _ = written
    status, out, _ = fedlora(
        "forget", run, "--client", "cy", "--no-evaluate", "--name", "bob-alone"
    )
    assert status == 0 and "%" not in out
    alone = run.with_name("bob-alone")
    about = load_run(alone).manifest["forgotten"]
    assert (about["client"], about["earlier"]["client"]) == ("cy", "ann")
    assert not (alone / "forgetting.json").exists()
    open_forgetting(run, project, "cy").check(say_nothing)
    first, after = server_state(alone, 0), server_state(alone, 1)
    sent = load_file(alone / "server" / "round_001" / "uploads" / "bob.safetensors")
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, first[key] + sent[key], rtol=0, atol=1e-6)


def test_more_rounds_go_on_without_the_client(written, project):
    run = shutil.copytree(written[0], project / "results" / "more")
    federation = Federation(project, run.parent, load_run(run).config)
    assert federation.run("more", resume="more", **{"num-rounds": 3}) == run
    manifest = load_run(run).manifest
    assert manifest["finished"] and manifest["forgotten"]["client"] == "ann"
    assert set(manifest["rounds"][3]["weights"]) == set(OTHERS)
    open_forgetting(run, project, "cy").check(say_nothing)  # with the optimizer's state


def test_a_stopped_run_keeps_the_same_and_a_round_of_one_client_stands_still(project, tmp_path):
    config = configure(aggregation="svd", fraction=0.34)
    whole = Federation(project, project / "results", config).run("whole")
    stopped = Federation(project, tmp_path, config)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=interrupt_in_round(2))
    assert adapter_files(stopped.run(resume=str(stopped.path))) == adapter_files(whole)
    (client,) = training_clients(config, 2)
    forgetting = open_forgetting(whole, project, client)
    forgetting.check(say_nothing)
    target = tmp_path / "new"
    about = forgetting.write(target, say_nothing)
    still = [n for n in (1, 2) if training_clients(config, n) == [client]]
    assert 2 in still and about["rounds_without_update"] == still
    ours, before = server_state(target, 2), server_state(target, 1)
    assert all(torch.equal(ours[key], before[key]) for key in ours)
    notes = list(forgetting.describe(about))
    assert any("no other client trained the global adapter" in note for note in notes)
    other = next(c for c in CLIENTS if c != client)
    again = open_forgetting(target, project, other)
    again.check(say_nothing)
    assert set(still) <= set(again.write(tmp_path / "newer", say_nothing)["rounds_without_update"])


def test_what_rounding_has_left_to_send_is_kept(project, tmp_path):
    run = Federation(project, project / "results", configure(upload_dtype="nf4")).run("rounded")
    target = project / "results" / "rounded-without-ann"
    open_forgetting(run, project, "ann").write(target, say_nothing)
    for client in OTHERS:
        left = load_run(target).paths.feedback(client, 2)
        assert left.read_bytes() == load_run(run).paths.feedback(client, 2).read_bytes()
    federation = Federation(project, target.parent, load_run(target).config)
    shutil.rmtree(load_run(target).paths.feedback("bob", 2).parent)
    with pytest.raises(RoundError, match=r"bob: \S+feedback\S+ does not exist"):
        federation.run("more", resume=str(target), **{"num-rounds": 3})


def test_a_median_of_what_is_left_is_refused(project, tmp_path):
    clients = (*CLIENTS, "dan")
    for name in ("local", "universal"):
        shutil.copy(project / f"cy_{name}.json", project / f"dan_{name}.json")
    federated = {"keep_uploads": True, "aggregation": "median", "min_clients": 3, "num_rounds": 1}
    config = build_tiny_config(clients, federated=federated, evaluation={"interval": 0})
    run = Federation(project, project / "results", config).run("median")
    open_forgetting(run, project, "cy").write(tmp_path / "three", say_nothing)

    def lose(manifest):
        entry = manifest["rounds"][1]
        del entry["weights"]["dan"], entry["adapters"]["upload:dan"]

    edit(run / "manifest.json", lose)
    with pytest.raises(ForgettingError, match="In round 1 2 updates of others are left"):
        open_forgetting(run, project, "cy").write(tmp_path / "two", say_nothing)


def test_an_epsilon_still_limits_the_rounds(project):
    privacy = {"unit": "client", "epsilon": 8.0, "clip_norm": 1.0, "delta": 1e-5}
    federated = {"keep_uploads": True, "weighting": "equal"}
    config = build_tiny_config(
        CLIENTS, federated=federated, evaluation={"interval": 0}, privacy=privacy
    )
    run = Federation(project, project / "results", config).run("private")
    target = run.with_name("private-without-ann")
    open_forgetting(run, project, "ann").write(target, say_nothing)
    open_forgetting(target, project, "bob").write(run.with_name("cy-alone"), say_nothing)
    for path in (run, target, run.with_name("cy-alone")):
        with pytest.raises(ConfigError, match="keeps 2 rounds within privacy.epsilon 8, and"):
            find_resumption(path.name, [path.parent], num_rounds=9)


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(RULES.keys() - set(PERSONAL)))
def test_under_every_rule_the_updates_make_the_run_s_own_adapters(rule, project, tmp_path):
    trims = {"trim_share": 0.34} if rule == "trimmed-mean" else {}
    settings = {"num_rounds": 1} if rule in ("median", "trimmed-mean") else {}
    run = Federation(project, tmp_path, configure(aggregation=rule, **trims, **settings)).run()
    saved = load_run(run)
    model, _ = build_shapes(saved.config, project)
    Forgetting(saved, "ann", saved.config, project, model).check(say_nothing)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mode": "fedavg"}, {"aggregation": "svd"}])
def test_one_adapter_for_all_or_one_of_a_lower_rank_is_asked_too(changes, project, fedlora):
    raw = configure(**changes).dump()
    raw_clients(raw)[0]["rank"] = 2 if "aggregation" in changes else None
    name = "-".join(changes.values())
    run = Federation(project, project / "results", parse_config(raw)).run(name)
    status, out, _ = fedlora("forget", run, "--client", "ann")
    assert status == 0
    assert bool(re.search("alone +change +adapters +change\n", out)) == ("mode" not in changes)
    new = run.with_name(f"{name}-without-ann")
    assert fedlora("evaluate", new, "--core")[0] == 0
    shares = json.loads((new / "evaluation.json").read_text())["shares"]
    of_global = {r["question_set"]: r["accuracy"] for r in shares if r["answered_by"] == "global"}
    for row in json.loads((new / "forgetting.json").read_text())["rows"]:
        if row["asked"] is None and not row["of_forgotten_alone"]:
            assert row["global_alone"]["after"] == of_global[row["question_set"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rounds": 1}, "federated.keep_rounds keeps 1 of 2"),
        ({"aggregation": "rest-of-world"}, "each client has a global adapter of its own"),
    ],
)
def test_what_forgetting_would_miss_is_refused_at_configuration(changes, message):
    with pytest.raises(ConfigError, match=message):
        configure(**changes)
    assert configure(keep_rounds=2).federated.keep_uploads
