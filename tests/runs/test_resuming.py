"""A run that was stopped anywhere and continued is the run that nobody stopped."""

from __future__ import annotations

import json
import platform
import re
import shutil
from functools import cache
from itertools import count
from pathlib import Path

import pytest
from conftest import ALIKE, build_tiny_config
from flwr.app import Error, Message, MessageType
from full_disk import limit_files, no_larger_files_than
from loopback import Federation

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import ConfigError
from fedlora_app.evaluation.choices import open_round
from fedlora_app.foundation import files as storage
from fedlora_app.foundation.files import WEIGHTS_FILE, hash_file
from fedlora_app.foundation.project import hash_package
from fedlora_app.runs import directory as run_directory
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.partial import read_what_is_left
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import load_run
from fedlora_app.runs.resuming import describe_other_software
from fedlora_app.runs.settings import read_settings
from fedlora_app.strategy import GlobalAdapterFedAvg, RoundError

MEASURED = re.compile(r"seconds|peak_memory|^bytes_(up|down)$|^time$|^process$")


class Stopped(BaseException):
    """Ends a run as abruptly as something in its own process can."""


def stop_at(number: int):
    """Return what stops a run at its n-th message, before or after the client has done it."""
    seen = 0

    def tamper(message, reply):
        nonlocal seen
        seen += 1
        if seen == number:
            raise Stopped
        return reply

    return tamper


def snapshot(run: Path) -> dict[str, object]:
    """Return everything that a run is to repeat, without what clocks and processes say."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not MEASURED.search(k)}
        return [strip(entry) for entry in value] if isinstance(value, list) else value

    found: dict[str, object] = {
        str(path.relative_to(run)): hash_file(path)
        for path in sorted(run.rglob("*.safetensors"))
        if ".partial" not in str(path)
    }
    found["history"] = strip(json.loads((run / "history.json").read_text()))
    events = (run / "metrics.jsonl").read_text().splitlines()
    found["events"] = [strip(json.loads(line)) for line in events]
    manifest = json.loads((run / "manifest.json").read_text())
    found["rounds"] = [strip(e) | {"completed": 0} for e in manifest["rounds"]]
    found["config"] = (run / "config.json").read_text()
    assert manifest["finished"]
    return found


KINDS = {
    "phased": {},
    "evaluated": {"evaluation": {"interval": 1}},  # after every round
    "joint": {"training": {"schedule": "joint"}},
    "nf4": {"federated": {"upload_dtype": "nf4"}},
    "fedavg": {"federated": {"mode": "fedavg"}},
    "finetuned": {"federated": {"mode": "finetuned"}, "adapters": ALIKE},
    "local-only": {"federated": {"mode": "local-only"}},
    "centralized": {"federated": {"mode": "centralized"}},
}


@pytest.fixture(scope="module")
def whole_run(tiny_project, tmp_path_factory):
    """Return a folder with a whole run of a kind and with what it had written at each message."""

    @cache
    def make(kind):
        folder, numbers = tmp_path_factory.mktemp(kind), count(1)

        def keep(message, reply):
            number = next(numbers)
            if (folder / "run").exists():
                shutil.copytree(folder / "run", folder / f"stopped_{number}")
            return reply

        Federation(tiny_project, folder, build_tiny_config(**KINDS[kind])).run(tamper=keep)
        return folder

    return make


@pytest.fixture(scope="module")
def undisturbed(whole_run):
    """Return the snapshot of a whole run of a kind."""
    return cache(lambda kind="phased": snapshot(whole_run(kind) / "run"))


@pytest.fixture
def stopped_at(whole_run, tiny_project, tmp_path):
    """Return a federation whose run was killed at a message: what it had written is all."""

    def stop(number, kind="phased", project=tiny_project, folder=tmp_path):
        shutil.copytree(whole_run(kind) / f"stopped_{number}", folder / "run")
        return Federation(project, folder, build_tiny_config(**KINDS[kind]))

    return stop


def stopped_run(project, folder, number, config=None):
    """Return a federation whose run an exception stopped at a message."""
    federation = Federation(project, folder, config or build_tiny_config())
    with pytest.raises(Stopped):
        federation.run("run", tamper=stop_at(number))
    return federation


# Messages: 2 registrations, 2 evaluations of the base, then 2 trains and 2 evaluations per round.
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *(("phased", number) for number in (3, 5, 12)),
        *(("evaluated", number) for number in (8, 10)),
        *(pytest.param("phased", number, marks=pytest.mark.slow) for number in (4, 6, 7, 9, 11)),
        *(("joint", number) for number in (9, 11)),
        pytest.param("joint", 6, marks=pytest.mark.slow),
        ("nf4", 10),  # both clients have kept anew what is left, and only one of them has sent it
        ("fedavg", 7),
        ("finetuned", 12),
        pytest.param("finetuned", 7, marks=pytest.mark.slow),
        *(pytest.param(mode, 7, marks=pytest.mark.slow) for mode in ("local-only", "centralized")),
    ],
)
def test_a_run_killed_at_any_message_ends_in_the_same_bytes(
    stopped_at, tmp_path, undisturbed, kind, number
):
    stopped_at(number, kind).run("run", resume="run")
    assert snapshot(tmp_path / "run") == undisturbed(kind)


def test_so_does_one_that_an_exception_stopped(tiny_project, tmp_path, undisturbed):
    stopped_run(tiny_project, tmp_path, 8).run("run", resume="latest")
    assert snapshot(tmp_path / "run") == undisturbed()


def test_so_does_one_that_was_killed_when_all_rounds_were_done(
    tiny_project, tmp_path, undisturbed, monkeypatch
):
    def stop(*args):
        raise Stopped

    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(GlobalAdapterFedAvg, "save_final", stop)
        federation.run("run")
    federation.run(resume="run")
    assert snapshot(tmp_path / "run") == undisturbed()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        ('[{"x": 1}]', "cannot be read"),
        ('[{"round": 0, "client": "ann", "phase": "evaluate", "metrics": {}}]', "lacks round 1"),
        ('[{"round": 0}, {"round": 1}]', "lacks client"),
    ],
)
def test_a_history_that_is_damaged_is_refused_before_anything_changes(
    stopped_at, tmp_path, content, message
):
    federation = stopped_at(10)
    run = tmp_path / "run"
    if content is None:
        (run / "history.json").unlink()
    else:
        (run / "history.json").write_text(content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunDirectoryError, match=message):
        federation.run("run", resume="run", **{"num-rounds": 3})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_cannot_be_cut_to_the_rounds_that_it_has(stopped_at, tmp_path):
    """It would end without a last evaluation and without final local adapters."""
    federation = stopped_at(10)  # round 1 of 2 is complete
    with pytest.raises(ConfigError, match="no round is left to end the run with"):
        federation.run("run", resume="run", **{"num-rounds": 1})


def test_what_may_change_is_taken_from_the_settings_that_are_given(stopped_at, tmp_path):
    federation = stopped_at(10)
    config = build_tiny_config(federated={"keep_rounds": 1})
    federation.run("run", config, resume="run")
    kept = [path.name for path in (tmp_path / "run" / "server").iterdir()]
    assert kept == ["round_002"]


def test_what_trains_nothing_may_change_and_stands_in_the_manifest(
    stopped_at, undisturbed, tmp_path, capsys
):
    federation = stopped_at(10)
    changed = {"evaluation": {"batch_size": 1, "max_new_tokens": 2}}
    run = federation.run("run", build_tiny_config(**changed), resume="run")
    [stop] = json.loads((run / "manifest.json").read_text())["resumed"]
    assert stop["after_round"] == 1
    assert stop["changes"] == {
        "evaluation.batch_size": [64, 1],
        "evaluation.max_new_tokens": [3, 2],
    }
    assert "From here on evaluation.batch_size is 1, and was 64." in capsys.readouterr().out
    hashes = {k: v for k, v in snapshot(run).items() if k.endswith(WEIGHTS_FILE)}
    assert hashes == {k: v for k, v in undisturbed().items() if k.endswith(WEIGHTS_FILE)}


def test_overrides_alone_change_the_runs_own_configuration(stopped_at, tmp_path, root, monkeypatch):
    stopped_at(10)
    monkeypatch.chdir(root)
    given = {"config": "conf/demo.yaml", "num-rounds": 0, "mode": "", "run-name": ""}
    given |= {"output-dir": str(tmp_path), "resume": "run"}
    settings = read_settings(given | {"overrides": "evaluation.batch_size=8"})
    assert settings.config.evaluation.batch_size == 8
    assert settings.config.training == build_tiny_config().training
    with pytest.raises(ConfigError, match="training.learning_rate: 0.01 in the run, 1.0 given"):
        read_settings(given | {"overrides": "training.learning_rate=1.0"})


def test_final_adapters_are_never_those_of_a_run_with_fewer_rounds(tiny_project, tmp_path):
    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    federation.run("run")
    with pytest.raises(Stopped):
        federation.run("run", tamper=stop_at(7), resume="run", **{"num-rounds": 4})
    final = tmp_path / "run" / "final"  # the seventh message had ann personalise
    assert not (final / "global").exists() and not (final / "clients" / "ann").exists()


def test_a_client_that_missed_the_last_round_answers_with_what_it_had(
    tiny_project, tmp_path, capsys
):
    def fail(message, reply):
        task = message.content.config_records["task"]
        if (task["client_id"], task["server_round"]) == ("bob", 2):
            return Message(Error(0, "gone"), reply_to=message)
        return reply

    config = build_tiny_config(federated={"min_clients": 1})
    run = Federation(tiny_project, tmp_path, config).run("run", tamper=fail)
    saved = load_run(run)
    assert saved.last_round == 2
    assert (saved.local_round(2, "ann"), saved.local_round(2, "bob")) == (2, 1)
    opened = open_round(saved, tiny_project)
    assert opened.hashes["local:bob"] == saved.adapter_sha256(1, "bob")
    problems = "\n".join(read_what_is_left(run).problems)
    for text in (capsys.readouterr().out, problems):
        assert "bob did not report in the last round" in text
        assert "its local adapter of round 1, clients/bob/round_001." in text
        assert "ann did not report" not in text


def test_a_report_lost_in_the_last_joint_round_leaves_the_adapter_of_the_round_before(
    tiny_project, tmp_path
):
    """What the client has written in that round is not what the server knows of."""

    def lose(message, reply):
        task = message.content.config_records["task"]
        is_evaluation = message.metadata.message_type == MessageType.EVALUATE
        if is_evaluation and (task["client_id"], task["server_round"]) == ("bob", 2):
            return Message(Error(0, "gone"), reply_to=message)
        return reply

    config = build_tiny_config(training={"schedule": "joint"}, federated={"min_clients": 1})
    federation = Federation(tiny_project, tmp_path, config)
    run = federation.run("run", tamper=lose)
    opened = open_round(load_run(run), tiny_project)
    assert opened.hashes["local:bob"] == opened.run.adapter_sha256(1, "bob")
    federation.run("run", config, resume="run", **{"num-rounds": 3})
    saved = load_run(run)
    assert saved.local_round(3, "bob") == 3 and saved.adapter_sha256(3, "bob")


def test_a_run_s_name_may_hold_an_at_sign(stopped_at, tmp_path):
    folder = tmp_path / "me@home"
    federation = stopped_at(10, folder=folder)
    federation.run("run", resume=str(folder / "run"))
    with pytest.raises(RunDirectoryError, match="there is no run"):
        federation.run("run", resume="x" * 300)


def test_a_run_stopped_twice_while_it_writes_ends_in_the_same_bytes(
    tiny_project, tmp_path, undisturbed, monkeypatch
):
    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    for name in ("_write_manifest", "complete_round"):
        original = getattr(RunDirectory, name)

        def stop(self, *args, _original=original, **facts):
            if self.manifest["rounds"] and len(self.manifest["rounds"]) >= 1:
                raise Stopped
            return _original(self, *args, **facts)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(RunDirectory, name, stop)
            again = (tmp_path / "run").exists()
            resume = {"resume": "run"} if again else {}
            federation.run("run", **resume)
    federation.run("run", resume="run")
    assert snapshot(tmp_path / "run") == undisturbed()


@pytest.mark.parametrize(
    "number", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5))]
)
def test_a_rewind_that_stops_at_any_write_can_be_resumed(
    stopped_at, tmp_path, undisturbed, monkeypatch, number
):
    """Manifest, configuration, history, its table and the events are written in its course."""
    federation = stopped_at(11)  # rounds 0 and 1 are complete
    original, writes = run_directory.write_atomically, 0

    def stop(path, text):
        nonlocal writes
        writes += 1
        if writes == number:
            raise Stopped
        original(path, text)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_directory, "write_atomically", stop)
        patch.setattr(run_directory, "write_json", lambda p, v: stop(p, storage._dump(v)))
        federation.run("run", resume="run@0")
    shutil.copytree(tmp_path / "run", tmp_path / "other" / "run")
    federation.run("run", resume="run")
    assert snapshot(tmp_path / "run") == undisturbed()
    federation.output_dir = tmp_path / "other"  # of the clients
    federation.run("run", resume=str(tmp_path / "other" / "run@0"))
    assert snapshot(tmp_path / "other" / "run") == undisturbed()


def test_a_history_that_lacks_a_round_names_the_round_before_it(stopped_at, tmp_path):
    federation = stopped_at(11)
    path = tmp_path / "run" / "history.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([entry for entry in entries if entry["round"] == 0]))
    with pytest.raises(RunDirectoryError, match=r"lacks round 1\.(?s:.*)resume='[^']*run@0'\)$"):
        federation.run("run", resume="run")
    federation.run("run", resume="run@0")


def test_more_rounds_can_be_added_to_a_finished_run(tiny_project, tmp_path, undisturbed, capsys):
    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    federation.run("run")
    resume = {"resume": "run"}
    with pytest.raises(ConfigError, match="has finished its 2 rounds"):
        federation.run("run", **resume)
    with pytest.raises(ConfigError, match="2 rounds are complete and num-rounds is 1"):
        federation.run("run", **resume, **{"num-rounds": 1})
    federation.run("run", **resume, **{"num-rounds": 3})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [entry["round"] for entry in manifest["rounds"]] == [0, 1, 2, 3]
    assert "learning rate follows the schedule of the new total" in capsys.readouterr().out
    kept = snapshot(tmp_path / "run")
    for name, value in undisturbed().items():
        if "round_" in name:
            assert kept[name] == value


def test_settings_that_differ_from_the_run_are_refused_with_their_keys(stopped_at, tmp_path):
    federation = stopped_at(7)
    resume = {"resume": "run"}
    with pytest.raises(ConfigError, match=r"training\.learning_rate: 0\.01 in the run, 0\.5 given"):
        federation.run("run", **resume, overrides="training.learning_rate=0.5")
    with pytest.raises(ConfigError, match="federated.mode"):
        federation.run("run", **resume, mode="fedavg")
    with pytest.raises(ConfigError, match="run-name has no effect"):
        federation.run("run", **resume, **{"run-name": "other"})
    assert (tmp_path / "run" / "server" / "round_000").exists()


def test_changed_data_are_refused_by_client_and_file(stopped_at, tiny_project, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    federation = stopped_at(7, project=project, folder=tmp_path / "results")
    path = project / "ann_local.json"
    path.write_text(path.read_text().replace("ann says", "ann wrote"))
    before = hash_file(tmp_path / "results" / "run" / "manifest.json")
    with pytest.raises(ConfigError, match="ann: local, local_train"):
        federation.run("run", resume="run")
    assert hash_file(tmp_path / "results" / "run" / "manifest.json") == before


def change_data_after(kind: str, path: Path):
    """Return what changes a file when bob has done his part of round 1."""

    def tamper(message, reply):
        task = message.content.config_records["task"]
        now = (message.metadata.message_type, task["client_id"], task["server_round"])
        if now == (kind, "bob", 1):
            path.write_text(path.read_text().replace("red", "rose"))
        return reply

    return tamper


@pytest.mark.parametrize(
    ("kind", "name", "roles"),
    [
        pytest.param(
            *(MessageType.TRAIN, "ann_universal.json", "universal_train (ann_universal.json)"),
            marks=pytest.mark.slow,
        ),
        (
            MessageType.EVALUATE,
            "ann_local.json",
            "local (ann_local.json), local_train (ann_local.json)",
        ),
        (MessageType.EVALUATE, "universal_test.json", "universal (universal_test.json)"),
    ],
)
def test_data_that_change_during_a_run_are_refused_and_named(
    tiny_project, tmp_path, undisturbed, kind, name, roles
):
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    path = project / name
    content = path.read_text()
    federation = Federation(project, tmp_path, build_tiny_config())
    with pytest.raises(RoundError) as caught:
        federation.run("run", tamper=change_data_after(kind, path))
    told = f"ann: these data files are not those that the run began with: {roles}. Restore them"
    assert told in str(caught.value)
    with pytest.raises(ConfigError, match="these files are not those that the run began with"):
        federation.run("run", resume="run")
    path.write_text(content)
    federation.run("run", resume="run")
    assert snapshot(tmp_path / "run") == undisturbed()


def test_an_update_from_changed_data_is_not_counted(tiny_project, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    config = build_tiny_config(federated={"min_clients": 1})
    tamper = change_data_after(MessageType.EVALUATE, project / "ann_local.json")
    run = Federation(project, tmp_path, config).run("run", tamper=tamper)
    history = json.loads((run / "history.json").read_text())
    phases = {(entry["client"], entry["phase"]) for entry in history if entry["round"] == 2}
    assert {phase for client, phase in phases if client == "ann"} == {"failure", "traffic"}
    assert ("bob", "evaluate") in phases


def change_weights(model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (model / "model.safetensors").write_bytes(content)


def change_configuration(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))


def change_template(model: Path) -> None:
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{# another #}" + template)


@pytest.mark.parametrize(
    "change",
    [change_weights, change_template, pytest.param(change_configuration, marks=pytest.mark.slow)],
)
def test_another_base_model_is_refused(stopped_at, tiny_project, tmp_path, change):
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    federation = stopped_at(7, project=project, folder=tmp_path / "results")
    change(project / "model")
    with pytest.raises(RoundError, match="do not hold the same base model") as caught:
        federation.run("run", resume="run")
    assert "older version" not in str(caught.value)


def test_a_run_of_a_version_with_another_fingerprint_says_how_to_go_on(
    stopped_at, tmp_path, undisturbed
):
    federation = stopped_at(7)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    about = manifest["base_model"]
    assert about.pop("fingerprint_covers")
    about["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(RoundError, match='delete "fingerprint" from "base_model"'):
        federation.run("run", resume="run")
    del about["fingerprint"]
    path.write_text(json.dumps(manifest))
    federation.run("run", resume="run")
    assert snapshot(tmp_path / "run") == undisturbed()


def test_what_a_run_goes_on_with_instead_is_noted(stopped_at, tmp_path, capsys):
    federation = stopped_at(7)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["package_sha256"] == hash_package()
    now, device = manifest["versions"], manifest["clients"]["bob"]["device"]
    changed = {
        "python": "3.0.1",
        "versions": now | {"torch": "0.1", "lost-package": "0.2"},
        "package_sha256": "a" * 64,
        "clients": {**manifest["clients"]},
    }
    changed["clients"]["bob"] |= {"device": "A GPU, 24.0 GiB"}
    path.write_text(json.dumps(manifest | changed))
    capsys.readouterr()
    federation.run("run", resume="run")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note")]
    expected = [
        ("python", "3.0.1", platform.python_version()),
        ("torch", "0.1", now["torch"]),
        ("lost-package", "0.2", "none"),
        ("other code of this project, sha256", "a" * 12, hash_package()[:12]),
        ("bob on", "A GPU, 24.0 GiB", device),
    ]
    assert notes == [
        f"Note: the run began with {name} {before}, and this is {found}; what follows may differ "
        "from an undisturbed run."
        for name, before, found in expected
    ]


def test_nothing_is_noted_where_nothing_changed_or_an_older_run_does_not_say(
    stopped_at, tmp_path, capsys
):
    federation = stopped_at(7)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    reports = manifest["clients"]
    assert not list(describe_other_software(manifest, reports))
    del manifest["package_sha256"]
    path.write_text(json.dumps(manifest))
    federation.run("run", resume="run")
    assert "Note: the run began" not in capsys.readouterr().out


@pytest.mark.parametrize(("part", "damage"), [("server", "cut"), ("clients/ann", "gone")])
def test_a_damaged_round_is_reported_and_the_one_before_it_used_on_demand(
    stopped_at, tmp_path, undisturbed, part, damage
):
    federation = stopped_at(11)
    weights = tmp_path / "run" / part / "round_001" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-7]) if damage == "cut" else weights.unlink()
    with pytest.raises((RunDirectoryError, RoundError)) as caught:
        federation.run("run", resume="run")
    assert "run@0')" in str(caught.value) and str(weights.parent) in str(caught.value)
    with pytest.raises(RunDirectoryError, match="no complete round '7'. Complete: 0, 1"):
        federation.run("run", resume="run@7")
    federation.run("run", resume="run@0")
    assert snapshot(tmp_path / "run") == undisturbed()


@pytest.mark.parametrize("number", [3, 11])  # no round is complete, or round 1
@pytest.mark.parametrize("name", ["manifest.json", "server", "clients/ann", "final"])
def test_links_out_of_the_run_are_refused_before_anything_changes(
    stopped_at, tmp_path, number, name
):
    federation = stopped_at(number)
    link, outside = tmp_path / "run" / name, tmp_path / "outside"
    if link.exists():
        link.rename(outside)
    else:
        outside.mkdir()
        link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)

    def content():
        files = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
        outer = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        return {path: path.read_bytes() for path in files} | outer

    before = content()
    with pytest.raises(ValueError, match=f"{name}.* is a link that leads out of the run directory"):
        federation.run("run", resume="run")
    assert content() == before and link.is_symlink()


def test_two_runs_cannot_write_one_run_directory(stopped_at, tmp_path):
    federation = stopped_at(7)
    other = RunDirectory.reopen(tmp_path / "run", {})
    with pytest.raises(RunDirectoryError, match="is being written by another process"):
        federation.run("run", resume="run")
    other.close()
    federation.run("run", resume="run")


@pytest.mark.parametrize(
    ("kind", "server_round", "limit"),
    [
        (MessageType.QUERY, 0, 200),
        (MessageType.TRAIN, 2, 6000),
        (MessageType.EVALUATE, 1, 500),
        pytest.param(MessageType.QUERY, 0, 3000, marks=pytest.mark.slow),
        pytest.param(MessageType.TRAIN, 2, 900, marks=pytest.mark.slow),
        pytest.param(MessageType.EVALUATE, 1, 6000, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_stops_the_run_names_the_file_and_the_last_round_stays_whole(
    tiny_project, tmp_path, undisturbed, kind, server_round, limit
):
    """Files cannot grow beyond a limit as soon as bob has done his part of a round."""

    def fill(message, reply):
        task = message.content.config_records["task"]
        is_bob = message.metadata.dst_node_id == 12
        if is_bob and (message.metadata.message_type, task["server_round"]) == (kind, server_round):
            limit_files(limit)
        return reply

    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    run = tmp_path / "run"
    with (
        no_larger_files_than(None),
        pytest.raises((RunDirectoryError, RoundError)) as caught,
    ):
        federation.run("run", tamper=fill)
    text = str(caught.value)
    assert "File too large" in text and ".partial" not in text
    assert "--resume " in text or "is untouched" in text or not run.exists()
    assert re.search(rf"{re.escape(str(run))}\S*( cannot be|\b)", text)
    assert not list(tmp_path.rglob(".*.partial"))
    federation.run("run", **({"resume": "run"} if run.exists() else {}))
    assert snapshot(run) == undisturbed()


def test_there_is_nothing_to_resume(tiny_project, tmp_path):
    federation = Federation(tiny_project, tmp_path, build_tiny_config())
    with pytest.raises(RunDirectoryError, match="there is no run"):
        federation.run("run", resume="nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        federation.run("run", resume="empty")


@pytest.mark.slow
def test_old_rounds_are_thinned_and_the_newest_never(tiny_project, tmp_path):
    settings = {"num_rounds": 4, "keep_rounds": 1}
    config = build_tiny_config(federated=settings)
    federation = stopped_run(tiny_project, tmp_path / "a", 19, config)
    run = tmp_path / "a" / "run"
    assert {path.name for path in (run / "server").iterdir()} == {"round_003", "round_004"}
    federation.run("run", config, resume="run")
    kept = {path.name for path in (run / "server").iterdir()}
    kept_locals = {path.name for path in (run / "clients" / "ann").glob("round_*")}
    assert kept == {"round_004"} and kept_locals == {"round_003", "round_004"}
    whole = Federation(tiny_project, tmp_path / "b", config)
    assert snapshot(whole.run("run"))["history"] == snapshot(run)["history"]


def test_kept_rounds_keep_the_local_adapters_that_they_need(tiny_project, tmp_path):
    """bob has no part in rounds 1 and 2, so that these need his adapter of round 0.

    What the rounding of his updates left there does not count either.
    """

    def fail(message, reply):
        task = message.content.config_records["task"]
        if task["client_id"] == "bob" and task["server_round"] in (1, 2):
            return Message(Error(0, "gone"), reply_to=message)
        return reply

    settings = {"num_rounds": 4, "min_clients": 1, "keep_rounds": 3, "upload_dtype": "int8"}
    config = build_tiny_config(federated=settings)
    federation = Federation(tiny_project, tmp_path, config)
    run = federation.run("run", tamper=fail)
    kept = [
        sorted(path.name for path in (run / folder).glob("round_*"))
        for folder in ("server", "clients/ann", "clients/bob")
    ]
    of_server = ["round_002", "round_003", "round_004"]
    assert kept[0] == of_server and kept[1] == ["round_001", *of_server]
    assert kept[2] == ["round_000", *kept[1]]
    left = [path.stem for path in sorted((run / "clients" / "ann" / "feedback").iterdir())]
    assert left == kept[1]
    tasks = [
        m.content.config_records["task"]
        for m in federation.grids[0].sent
        if m.metadata.message_type == "train"
    ]
    went_on_from = {
        c: [json.loads(t["kept"]).get("feedback", [None])[0] for t in tasks if t["client_id"] == c]
        for c in ("ann", "bob")
    }
    assert went_on_from == {"ann": [None, 1, 2, 3], "bob": [None, None, None, 3]}
    for server_round in (2, 3, 4):
        opened = open_round(load_run(run), tiny_project, server_round)
        assert (opened.run.local_round(server_round, "bob") == 0) == (server_round == 2)
    federation.run("run", config, resume="run@2")
    assert load_run(run).adapter_sha256(3, "bob")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "does not exist, and the run is to resume with it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: its sha256 is not"),
    ],
)
def test_what_rounding_has_left_is_checked_before_anything_is_trained(stopped_at, spoil, expected):
    federation = stopped_at(10, "nf4")
    spoil(federation.path / "clients" / "bob" / "feedback" / "round_001.safetensors")
    with pytest.raises(RoundError, match=f"(?s)bob: .*feedback/round_001.*{expected}.*run@0'"):
        federation.run("run", resume="run")
    # Each is asked who it is, then for a registration with its own settings, then for this.
    assert [message.metadata.message_type for message in federation.grids[-1].sent] == ["query"] * 6


@pytest.mark.slow
def test_a_round_without_a_client_is_continued_from_what_that_client_has(tiny_project, tmp_path):
    """A client that failed goes on from its own newest round, resumed or not."""

    def fail(message, reply):
        is_evaluation = message.metadata.message_type == MessageType.EVALUATE
        task = message.content.config_records["task"]
        if is_evaluation and task["client_id"] == "bob" and task["server_round"] == 1:
            raise_in = reply.content.config_records["about"]
            raise_in["server-round"] = 99
        return reply

    config = build_tiny_config(("ann", "bob", "cy"), federated={"num_rounds": 3, "min_clients": 2})
    whole = Federation(tiny_project, tmp_path / "whole", config).run("run", tamper=fail)
    stopper = stop_at(3 + 3 + 6 + 2)

    def fail_and_stop(message, reply):
        return stopper(message, fail(message, reply))

    federation = Federation(tiny_project, tmp_path / "parts", config)
    with pytest.raises(Stopped):
        federation.run("run", tamper=fail_and_stop)
    federation.run("run", resume="run")
    ours, theirs = snapshot(tmp_path / "parts" / "run"), snapshot(whole)
    assert ours == theirs
    failed = [
        e for e in json.loads((whole / "history.json").read_text()) if e["phase"] == "failure"
    ]
    assert [(e["round"], e["client"]) for e in failed] == [(1, "bob")]


def test_a_client_that_has_left_need_not_be_there_again(tiny_project, tmp_path):
    config = build_tiny_config(("ann", "bob", "cy"), federated={"num_rounds": 3})
    raw = config.dump()
    raw["federated"]["clients"][0]["last_round"] = 1  # ann, whose node is the first
    config = parse_config(raw)
    whole = Federation(tiny_project, tmp_path / "whole", config).run()
    federation = Federation(tiny_project, tmp_path / "resumed", config)
    with pytest.raises(Stopped):
        federation.run(tamper=stop_at(13))  # in the second round
    run = federation.run(resume=str(federation.path), gone=frozenset({11}))
    rounds = [json.loads((r / "manifest.json").read_text())["rounds"] for r in (whole, run)]
    assert [e["adapters"] for e in rounds[0]] == [e["adapters"] for e in rounds[1]]
