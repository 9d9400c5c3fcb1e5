"""The round that validation chooses: at server and clients, and for whoever reads the run."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import build_tiny_config
from loopback import Federation

from fedlora_app.adaptation import find_origin
from fedlora_app.config.loading import change_config, parse_config
from fedlora_app.config.schema import ConfigError
from fedlora_app.federation.messages import ABOUT_RECORD, METRIC_RECORD
from fedlora_app.report.page import write_report
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.reading import load_run

WEIGHTS = "adapter_model.safetensors"


def build_config(**changes):
    """Return an experiment of three rounds whose validation questions are those it is tested on."""
    raw = build_tiny_config().dump()
    for client in raw["federated"]["clients"]:
        client["local_validation"] = client["local_test"]
    raw["federated"] |= {"num_rounds": 3, "final": "best"} | changes
    raw["evaluation"] |= {"interval": 1}
    return parse_config(raw)


def prefer(server_round, score=0.5):
    """Return what makes clients report that they answer best in one round."""

    def tamper(message, reply):
        record = reply.content.metric_records.get(METRIC_RECORD, {})
        for key in list(record):
            if key.startswith("validation/") and not key.endswith("_n"):
                record[key] = score * (round_of(reply) == server_round)
        return reply

    return tamper


def round_of(reply):
    return reply.content.config_records[ABOUT_RECORD].get("server-round")


def weights_of(run, folder):
    return (run / folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def chosen(tiny_project, tmp_path_factory):
    """A run of which round 2 of 3 does best."""
    folder = tmp_path_factory.mktemp("chosen")
    federation = Federation(tiny_project, folder, build_config())
    federation.run(tamper=prefer(2))
    return federation


def test_final_holds_the_adapters_of_the_chosen_round_and_says_why(chosen):
    run = chosen.path
    assert weights_of(run, "final/global") == weights_of(run, "server/round_002")
    for client in ("ann", "bob"):
        ours = weights_of(run, f"final/clients/{client}")
        assert ours == weights_of(run, f"clients/{client}/round_002")
        assert ours != weights_of(run, f"clients/{client}/round_003")
    final = load_run(run).manifest["final"]
    assert final["validation_scores"] == {"1": 0.0, "2": 0.5, "3": 0.0}
    assert final["round"] == 2 and "missing" not in final
    assert final["why"] == (
        "final/ holds round 2 of 3, which does best on the validation questions: 0.500, and 0.000 "
        "in the last round."
    )


def test_commands_take_the_chosen_round(chosen, fedlora, tmp_path, unrendered):
    run = shutil.copytree(chosen.path, tmp_path / "run")
    saved = load_run(run)
    assert (saved.last_round, saved.final_round) == (3, 2)
    assert saved.evaluation_path(2) == run / "evaluation.json" != saved.evaluation_path(3)
    page = write_report(run).read_text()
    assert "final/ holds round 2 of 3" in page
    left = read_what_is_left(run)
    assert max(entry["round"] for entry in left.result_history) == 2 < len(left.history)
    (run / "evaluation.json").write_text(json.dumps({"round": 3}))
    assert any("not of the final one, 2" in problem for problem in read_what_is_left(run).problems)
    assert find_origin(run).describe()["round"] == 2


def test_clients_report_shares_of_their_validation_questions_and_nothing_else_of_them(chosen):
    history = json.loads((chosen.path / "history.json").read_text())
    told = {
        key
        for entry in history
        for key in entry["metrics"]
        if key.startswith("validation/") and entry["round"] > 0
    }
    names = ("n", "exact_match", "rank_accuracy")
    assert told == {f"validation/local_{name}" for name in names}
    of_base = [k for e in history if e["round"] == 0 for k in e["metrics"] if "validation" in k]
    assert of_base == []


def test_validation_questions_are_scored_as_test_questions_are(tiny_project, tmp_path):
    run = Federation(tiny_project, tmp_path, build_config(num_rounds=1)).run()
    history = json.loads((run / "history.json").read_text())
    scored = [e["metrics"] for e in history if e["phase"] == "evaluate" and e["round"] == 1]
    for metrics in scored:  # which are the same here
        for name in ("n", "exact_match", "rank_accuracy"):
            assert metrics[f"validation/local_{name}"] == metrics[f"global+local/local/{name}"]
    final = load_run(run).manifest["final"]
    assert final["round"] == 1 and "round 1 of 1, which does best" in final["why"]
    assert 0 < final["validation_scores"]["1"] < 1


def test_a_resumed_run_chooses_the_same_and_has_the_same_bytes(chosen, tmp_path, tiny_project):
    federation = Federation(tiny_project, tmp_path, build_config())
    tamper = prefer(2)

    def stop(message, reply):
        if round_of(reply) == 3:
            raise KeyboardInterrupt
        return tamper(message, reply)

    with pytest.raises(KeyboardInterrupt):
        federation.run(tamper=stop)
    federation.run(tamper=tamper, resume="run")
    ours, theirs = (load_run(f.path).manifest["final"] for f in (federation, chosen))
    assert ours == theirs
    for folder in ("final/global", "final/clients/ann", "final/clients/bob"):
        assert weights_of(federation.path, folder) == weights_of(chosen.path, folder)
    # More rounds take the choice back, and choose anew.
    more = change_config(federation.config, "federated.num_rounds=4")
    federation.run(config=more, tamper=prefer(4, 0.75), resume="run", **{"num-rounds": 4})
    assert load_run(federation.path).manifest["final"]["round"] == 4
    for folder in ("final/clients/ann", "final/clients/bob"):
        last = folder.replace("final/", "") + "/round_004"
        assert weights_of(federation.path, folder) == weights_of(federation.path, last)


def test_a_client_that_cannot_be_told_is_named(tiny_project, tmp_path, capsys):
    federation = Federation(tiny_project, tmp_path, build_config())
    tamper = prefer(1)

    def damage(message, reply):
        if round_of(reply) == 3:
            shutil.rmtree(federation.path / "clients" / "bob" / "round_001", ignore_errors=True)
        return tamper(message, reply)

    run = federation.run(tamper=damage)
    assert load_run(run).manifest["final"]["missing"] == ["bob"]
    out = capsys.readouterr().out
    assert "bob could not be told that round 1 is the final one" in out
    assert weights_of(run, "final/clients/ann") == weights_of(run, "clients/ann/round_001")


def test_no_round_is_chosen_before_a_client_has_come(tiny_project, tmp_path):
    config = change_config(build_config(), "federated.clients.1.first_round=2")
    run = Federation(tiny_project, tmp_path, config).run(tamper=prefer(1))
    final = load_run(run).manifest["final"]
    assert final["round"] == 2 and set(final["validation_scores"]) == {"2", "3"}
    assert weights_of(run, "final/clients/bob") == weights_of(run, "clients/bob/round_002")


def test_one_adapter_for_all_is_chosen_too_and_no_client_is_asked(tiny_project, tmp_path):
    federation = Federation(tiny_project, tmp_path, build_config(mode="fedavg"))
    run = federation.run(tamper=prefer(1))
    assert weights_of(run, "final/global") == weights_of(run, "server/round_001")
    assert not (run / "final" / "clients").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("federated.clients.0.local_validation=null", "validation questions, and there are none"),
        ("evaluation.interval=0", "with evaluation.interval 0 none is"),
        ("federated.keep_rounds=2", "federated.keep_rounds keeps those of 2 of 3"),
        ("training.schedule=joint", "in training.schedule joint the local ones are fitted"),
        ("federated.mode=finetuned adapters.local.rank=4 adapters.local.alpha=8", "finetuned"),
    ],
)
def test_what_it_cannot_be_had_with_is_refused(changes, message):
    config = build_config()
    changes += " federated.clients.1.local_validation=null" * ("validation=null" in changes)
    with pytest.raises(ConfigError, match=message):
        change_config(config, changes)
    assert change_config(config, "federated.keep_rounds=3").federated.final == "best"
