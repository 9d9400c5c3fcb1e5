"""Sites are let in, changed and removed by the commands that people type, one at a time."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import stat
import threading
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from conftest import build_tiny_config

from fedlora_app.deployment import connection
from fedlora_app.deployment.audit import read_log
from fedlora_app.deployment.coordinator import create, load_coordinator
from fedlora_app.deployment.keys import (
    fingerprint_certificate,
    issue_certificate,
    make_root,
    make_site_key,
    sign_request,
)
from fedlora_app.deployment.layout import CoordinatorFolder, SiteFolder
from fedlora_app.deployment.membership import approve, read_request
from fedlora_app.deployment.package import MAX_PACKAGE_BYTES, read_package, write_zip
from fedlora_app.deployment.site import join, load_request, make_request, open_package
from fedlora_app.deployment.site_checks import examine_own_registration, explain_end
from fedlora_app.foundation.project import hash_package

SITES = ("ann", "bob", "cy")


@pytest.fixture(scope="module")
def experiment(tiny_project) -> Path:
    path = tiny_project / "deployed.yaml"
    path.write_text(json.dumps(build_tiny_config(SITES).dump()))
    return path


@pytest.fixture(scope="module")
def made(experiment, tmp_path_factory) -> dict[str, Path]:
    """A deployment at a port where nothing answers: invited with requests, and joined."""
    asked, joined = (tmp_path_factory.mktemp(name) / "world" for name in ("asked", "joined"))
    create(asked / "deployment", "localhost", 9, experiment, experiment.parent)
    for site in ("ann", "bob"):
        make_request(site, asked / site)
    shutil.copytree(asked, joined)
    coordinator = load_coordinator(joined / "deployment")
    for site in ("ann", "bob"):
        approve(coordinator, read_request(joined / site / "request.json"))
        join(*open_package(coordinator.folder.package(site), joined / site))
    return {"asked": asked, "joined": joined}


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> Path:
    """A deployment of its own, with the requests of ann and bob, as the working directory."""
    monkeypatch.chdir(shutil.copytree(made["asked"], tmp_path / "world"))
    return Path.cwd()


@pytest.fixture
def joined(made, tmp_path, monkeypatch) -> Path:
    """The same after both have been let in and have joined."""
    monkeypatch.chdir(shutil.copytree(made["joined"], tmp_path / "world"))
    return Path.cwd()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def entries(folder: Path) -> dict[str, dict]:
    return yaml.safe_load((folder / "deployment" / "coordinator.yaml").read_text())["sites"]


def test_from_nothing_to_a_joined_site(fedlora, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = fedlora(
        *["deploy", "init", "--host", "localhost", "--port", "9", "--config"], experiment
    )
    assert status == 0 and "Invited: ann, bob, cy." in out
    root_lines = [line for line in out.splitlines() if line.startswith("  ")]
    shown = fedlora("deploy", "request", "cy")[1]
    status, out, _ = fedlora("deploy", "approve", "cy/request.json", "--yes")
    assert status == 0 and "SuperLink does not run" in out
    lines = [line for line in shown.splitlines() if line.startswith("  ")]
    assert len(lines) == 2 and all(line in out for line in lines)  # the same at both ends
    printed = out[out.index("which the site compares") :]
    package = Path("deployment/packages/cy.zip")
    assert hashlib.sha256(package.read_bytes()).hexdigest() in printed.replace(" ", "").replace(
        "\n", ""
    )
    status, out, _ = fedlora("deploy", "join", package, "--yes")
    assert all(line in out for line in printed.splitlines()[1:3])  # it covers all that is in it
    assert status == 0 and "complete it" in out and "localhost:9" in out
    open_rules = "privacy, metrics, facts, steps, seconds."  # the last of them, in this order
    assert "It permits everything in: max_norm_ratio, send_update, update_parameters, " in out
    assert open_rules in out and "losses" not in out
    assert len(root_lines) == 2 and all(line in out for line in root_lines)
    site = SiteFolder(tmp_path / "cy")
    facts = json.loads(site.package_facts.read_text())
    assert facts["participants"] == list(SITES) and facts["code_sha256"] == hash_package()
    assert facts["client"] == "cy" and len(facts["base"]["fingerprint"]) == 64
    assert yaml.safe_load(site.client_file.read_text())["id"] == "cy"
    assert yaml.safe_load(site.policy.read_text())["code_sha256"] == hash_package()
    root = tmp_path / "deployment" / "root.crt"
    assert site.root_certificate.read_bytes() == root.read_bytes()
    home = (tmp_path / "deployment" / "flwr" / "config.toml").read_text()
    assert 'address = "127.0.0.1:9"' in home and str(root) in home


def test_nothing_happens_without_a_yes(fedlora, world, monkeypatch):
    before = contents(world)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    status, out, err = fedlora("deploy", "approve", "ann/request.json")
    assert status == 2 and "by telephone" in out and "Nothing was done" in err
    assert (
        contents(world) == before | {"deployment/requests/.lock": b""} or contents(world) == before
    )


def test_rights_of_everything_that_is_made(joined):
    for path in joined.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix in (".key", ".jsonl") or path.name in ("client.yaml", "policy.yaml"):
            assert mode == 0o600 or path.parent.name == "package", path
        assert not mode & 0o022, path


def test_a_package_holds_no_secret(joined):
    private = [p for p in joined.rglob("*") if p.is_file() and not p.stat().st_mode & 0o077]
    drafts = {"client.yaml", "policy.yaml"}  # a site's own, once it has edited them
    secrets = [p for p in private if p.name not in drafts and p.stat().st_size]
    keys = [p for p in secrets if p.suffix == ".key"]
    assert sorted(p.name for p in keys) == ["root.key", "site.key", "site.key", "superlink.key"]
    for path in (joined / "deployment" / "packages").glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            for content in map(archive.read, archive.namelist()):
                assert b"PRIVATE KEY" not in content
                assert not [p for p in secrets if p.read_bytes() in content]
                for key in keys:
                    body = key.read_text().splitlines()[1:-1]
                    assert not [line for line in body if line.encode() in content]
                    assert base64.b64decode("".join(body))[-40:] not in content


def test_a_superlink_that_does_not_answer_has_revoked_nobody(joined):
    site = SiteFolder(joined / "ann")
    assert examine_own_registration(site).level == "warning"
    assert explain_end(site) is None
    site.package_facts.unlink()
    assert explain_end(site) is None


def test_what_is_sent_is_all_that_leaves_a_site(world):
    site = SiteFolder(world / "ann")
    sent = site.request.read_bytes()
    assert not [line for line in site.key.read_text().splitlines() if line.encode() in sent]


def test_a_package_is_the_same_bytes_each_time(fedlora, joined):
    path = joined / "deployment" / "packages" / "ann.zip"
    before = path.read_bytes()
    assert fedlora("deploy", "package", "ann")[0] == 0
    assert path.read_bytes() == before
    assert write_zip({"b": b"1", "a": b"2"}) == write_zip({"a": b"2", "b": b"1"})


def test_one_site_s_commands_leave_the_others_files_as_they_are(fedlora, joined):
    def of_others() -> dict[str, bytes]:
        own = ("cy", "coordinator.yaml", "former/cy-", ".lock", "deployment/evidence.jsonl")
        return {n: c for n, c in contents(joined).items() if not any(o in n for o in own)}

    before, known = of_others(), {i: e for i, e in entries(joined).items() if i != "cy"}
    steps = [
        ("request", "cy"),
        ("approve", "cy/request.json", "--yes"),
        ("join", "deployment/packages/cy.zip", "--yes"),
        ("request", "cy", "--new-key"),
        ("rotate", "cy/request.json", "--yes"),
        ("join", "deployment/packages/cy.zip", "--yes"),
        ("revoke", "cy"),
        ("add", "cy"),
    ]
    for step in steps:
        status, _, err = fedlora("deploy", *step)
        assert status == 0, (step, err)
        assert of_others() == before, step
        assert {i: e for i, e in entries(joined).items() if i != "cy"} == known, step
    assert not CoordinatorFolder(joined / "deployment").package("cy").exists()
    former = sorted(p.name for p in (joined / "deployment" / "former").iterdir())
    assert len(former) == 2 and all(name.startswith("cy-") for name in former)


def test_who_was_let_in_and_no_longer_stands_in_the_evidence(fedlora, joined):
    keys = [load_request(SiteFolder(joined / "ann")).fingerprint]
    assert fedlora("deploy", "request", "ann", "--new-key")[0] == 0
    keys.append(load_request(SiteFolder(joined / "ann")).fingerprint)
    for step in (
        ("rotate", "ann/request.json", "--yes"),
        ("join", "deployment/packages/ann.zip", "--yes"),
        ("revoke", "ann"),
        ("add", "ann"),
        ("renew",),
    ):
        assert fedlora("deploy", *step)[0] == 0
    entries = [e for e in read_log(joined / "deployment/evidence.jsonl").entries]
    assert [(e["event"], e["key"]) for e in entries if e.get("client") == "ann"] == [
        ("site_approved", keys[0]),
        ("site_rotated", keys[1]),
        ("site_revoked", keys[1]),
        ("site_invited", None),
    ]
    root = joined / "deployment/superlink.crt"
    assert entries[-1]["event"] == "certificate_renewed"
    assert entries[-1]["certificate"] == fingerprint_certificate(root.read_bytes())
    at_site = read_log(joined / "ann/evidence.jsonl").entries
    assert [(e["event"], e["key"]) for e in at_site] == [("package_joined", key) for key in keys]
    status, out, _ = fedlora("deploy", "audit", "deployment/evidence.jsonl")
    assert status == 0 and "site_revoked" in out and "The chain is whole" in out
    for event in entries + at_site:
        assert str(joined) not in json.dumps(event)


def test_a_rotation_is_joined_by_the_new_key_alone(fedlora, joined):
    site = SiteFolder(joined / "ann")
    old, package = site.key.read_bytes(), joined / "deployment/packages/ann.zip"
    shutil.copy(package, joined / "old.zip")
    assert fedlora("deploy", "request", "ann", "--new-key")[0] == 0
    assert site.key.read_bytes() == old  # in use until the coordinator knows the other
    status, _, err = fedlora("deploy", "approve", "ann/request.json", "--yes")
    assert status == 2 and "has a key already" in err and "rotate" in err
    assert fedlora("deploy", "rotate", "ann/request.json", "--yes")[0] == 0
    assert fedlora("deploy", "join", package, "--yes")[0] == 0
    assert site.key.read_bytes() != old and not site.next_key.exists()
    assert stat.S_IMODE(site.key.stat().st_mode) == 0o600
    status, _, err = fedlora("deploy", "join", "old.zip", "--yes")
    assert status == 2 and "which is not in ann" in err
    status, _, err = fedlora("deploy", "rotate", "ann/request.json", "--yes")
    assert status == 2 and "the key that ann has already" in err


def test_who_is_not_let_in(fedlora, joined):
    def refused(words: str, request: dict, command: str = "approve") -> None:
        Path("sent.json").write_text(json.dumps(request))
        status, _, err = fedlora("deploy", command, "sent.json", "--yes")
        assert status == 2 and words in err, err

    before = contents(joined / "deployment")
    ann = json.loads(Path("ann/request.json").read_text())
    private = Path("ann/site.key").read_bytes()
    new = make_site_key()[0]
    refused("dee is not a site of this deployment", sign_request(new, "dee").dump())
    refused("It is the same key", ann)
    refused("ann has a key already", sign_request(new, "ann").dump())
    refused("is that of ann", sign_request(private, "cy").dump())
    refused("is that of ann", sign_request(private, "bob").dump(), "rotate")
    refused("not signed by its own key", ann | {"client": "cy"})
    refused("has no key that another could take", sign_request(new, "cy").dump(), "rotate")
    refused("not a site's request", {"client": "cy"})
    assert contents(joined / "deployment") == before


def test_a_revoked_key_is_never_let_in_again(fedlora, joined):
    request = Path("bob/request.json")
    assert fedlora("deploy", "revoke", "bob")[0] == 0
    status, _, err = fedlora("deploy", "approve", request, "--yes")
    assert status == 2 and "bob was revoked" in err and "deploy add bob" in err
    assert fedlora("deploy", "revoke", "bob")[0] == 0  # as often as the SuperLink needs it
    assert fedlora("deploy", "add", "bob")[0] == 0
    status, _, err = fedlora("deploy", "approve", request, "--yes")
    assert status == 2 and "no longer let in" in err and "--new-key" in err
    assert fedlora("deploy", "request", "bob", "--new-key")[0] == 0
    assert fedlora("deploy", "approve", request, "--yes")[0] == 0
    facts = read_package(joined / "deployment/packages/ann.zip").facts
    assert facts.participants == list(SITES)  # ann's was written before


@pytest.mark.parametrize(
    ("command", "goes_on", "again"),
    [
        (
            "revoke bob",
            "which may still let in bob",
            "told of all sites by fedlora deploy revoke bob",
        ),
        (
            "rotate bob/request.json --yes",
            "by its old key",
            "by the next approve, rotate or revoke",
        ),
        ("approve cy/request.json --yes", "does not let in cy yet", "by the next approve"),
    ],
)
def test_a_superlink_that_is_slow_is_not_taken_for_one_that_does_not_run(
    fedlora, joined, command, goes_on, again
):
    """It goes on letting in who was revoked, so the command has not succeeded."""
    settings = joined / "deployment" / "coordinator.yaml"
    raw = yaml.safe_load(settings.read_text())
    assert fedlora("deploy", "request", "bob", "--new-key")[0] == 0
    assert fedlora("deploy", "request", "cy")[0] == 0
    with socket.create_server(("127.0.0.1", raw["port"])) as server:

        def hang_up() -> None:
            with suppress(OSError):  # once the server is closed
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        status, out, err = fedlora("deploy", *command.split())
        server.shutdown(socket.SHUT_RDWR)
    assert status == 2 and goes_on in " ".join(err.split()), (out, err)
    assert again in " ".join(err.split())
    if not command.startswith("revoke"):
        return
    assert entries(joined)["bob"]["status"] == "revoked"
    status, out, _ = fedlora("deploy", "revoke", "bob")
    assert status == 0 and "The SuperLink does not run" in out


def test_a_client_that_the_experiment_does_not_name_is_not_invited(fedlora, joined, experiment):
    status, _, err = fedlora("deploy", "add", "dee")
    assert status == 2 and "has no client dee" in err
    before = experiment.read_text()
    larger = json.loads(before)
    larger["federated"]["clients"].append(larger["federated"]["clients"][0] | {"id": "dee"})
    experiment.write_text(json.dumps(larger))
    try:
        status, out, _ = fedlora("deploy", "add", "dee")
        assert status == 0 and "packages of ann, bob stay as they were" in out
        assert fedlora("deploy", "add", "dee")[0] == 2
    finally:
        experiment.write_text(before)
    assert fedlora("deploy", "request", "dee")[0] == 0
    status, _, err = fedlora("deploy", "approve", "dee/request.json", "--yes")
    assert status == 2 and "has no client dee" in err  # it was taken out again


def test_the_server_s_certificate_is_renewed_by_the_same_authority(fedlora, joined):
    before = contents(joined)
    assert fedlora("deploy", "renew")[0] == 0
    after = contents(joined)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        *("deployment/superlink.key", "deployment/superlink.crt", "deployment/evidence.jsonl")
    }


def test_nothing_is_overwritten(fedlora, joined, experiment):
    status, _, err = fedlora("deploy", "request", "ann")
    assert status == 2 and "exists already" in err
    status, _, err = fedlora("deploy", "request", "bob", "--output", "ann", "--new-key")
    assert status == 2 and "is that of ann" in err
    status, _, err = fedlora(*["deploy", "init", "--host", "a.org", "--config"], experiment)
    assert status == 2 and "holds a deployment already" in err
    for name in ("client.yaml", "policy.yaml"):
        Path("ann", name).write_text("mine: true\n")
    status, out, _ = fedlora("deploy", "join", "deployment/packages/ann.zip", "--yes")
    assert status == 0 and out.count("stays as it is") == 2
    assert {Path("ann", n).read_text() for n in ("client.yaml", "policy.yaml")} == {"mine: true\n"}


def test_a_package_is_joined_by_the_site_and_the_authority_it_is_for(fedlora, joined, experiment):
    package = "deployment/packages/bob.zip"
    status, _, err = fedlora("deploy", "join", package, "--site", "ann", "--yes")
    assert status == 2 and "is the package of bob" in err
    again = "deploy init --host a.org --output other --config"
    assert fedlora(*again.split(), experiment)[0] == 0
    assert (
        fedlora(*["deploy", "approve", "ann/request.json", "--yes", "--deployment", "other"])[0]
        == 0
    )
    before = contents(joined / "ann")
    status, _, err = fedlora("deploy", "join", "other/packages/ann.zip", "--yes")
    assert status == 2 and "of another authority" in err
    assert contents(joined / "ann") == before


def repack(path: Path, **changes) -> Path:
    """Write a package with other members; a name with None has none."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = {n: c for n, c in (members | changes).items() if c is not None}
    Path("changed.zip").write_bytes(write_zip(members))
    return Path("changed.zip")


def test_what_a_package_cannot_do(fedlora, joined):
    package, before = Path("deployment/packages/ann.zip"), contents(joined / "ann")

    def refused(path: Path, words: str) -> None:
        status, _, err = fedlora("deploy", "join", path, "--yes")
        assert status == 2 and words in err, err
        assert contents(joined / "ann") == before and not Path("out").exists()

    refused(repack(package, **{"../out": b"x"}), "is not a package of fedlora deploy")
    refused(repack(package, **{"/tmp/out": b"x"}), "is not a package of fedlora deploy")
    refused(repack(package, **{"root.crt": None}), "is not a package of fedlora deploy")
    refused(repack(package, **{"root.crt": make_root("tiny")[1]}), "was changed on its way")
    refused(repack(package, **{"root.crt": b"x"}), "not a PEM certificate")
    refused(repack(package, **{"package.json": b"{}"}), "cannot be read as a package")
    refused(repack(package, **{"package.json": b"["}), "cannot be read as a package")
    refused(repack(package, **{"policy.yaml": b" " * MAX_PACKAGE_BYTES}), "is too large")
    facts = json.loads((joined / "ann/package/package.json").read_text())
    for change, words in (
        ({"format": 2}, "is of format 2"),
        ({"address": "nowhere"}, "is not a host and a port"),
        ({"client": "bob"}, "which is not in bob"),
        ({"client": "../../x"}, "is not a site's folder"),
    ):
        refused(repack(package, **{"package.json": json.dumps(facts | change).encode()}), words)
    Path("changed.zip").write_bytes(b"no zip")
    refused(Path("changed.zip"), "cannot be read as a package")
    for kind, words in ((0o120777, "is a link"), (0o040700, "is a link")):
        with zipfile.ZipFile(package) as old, zipfile.ZipFile("changed.zip", "w") as new:
            for info in old.infolist():
                info.external_attr = kind << 16 if info.filename == "policy.yaml" else 0
                new.writestr(info, old.read(info.filename))
        refused(Path("changed.zip"), words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a name is there twice
        shutil.copy(package, "changed.zip")
        with zipfile.ZipFile("changed.zip", "a") as archive:
            archive.writestr("root.crt", b"another")
    refused(Path("changed.zip"), "each once")
    with zipfile.ZipFile("changed.zip", "w", zipfile.ZIP_DEFLATED) as archive:  # a small bomb
        for name in ("root.crt", "package.json", "client.yaml", "policy.yaml"):
            archive.writestr(name, b"\0" * (2 * MAX_PACKAGE_BYTES))
    refused(Path("changed.zip"), "is too large")


def test_start_files_name_what_they_start(made):
    joined = made["joined"]
    for folder, unit in (("deployment", "fedlora-superlink"), ("ann", "fedlora-site")):
        templates = joined / folder / "templates"
        text = (templates / f"{unit}.service").read_text()
        where = made["asked"] if folder == "deployment" else joined
        assert f'deploy start --foreground "{where / folder}"' in text and "UMask=0077" in text
        compose = yaml.safe_load((templates / "compose.yaml").read_text())
        (service,) = compose["services"].values()
        assert service["command"] == ["deploy", "start", "--foreground", str(where / folder)]
        assert ("ports" in service) == (folder == "deployment")
        image = (templates / "Dockerfile").read_text()
        assert "COPY . " not in image  # of a checkout that holds a deployment
        assert (joined / folder / ".gitignore").read_text() == "*\n"


def test_doctor_at_both_ends(fedlora, joined):
    status, out, _ = fedlora("deploy", "doctor", "deployment")
    assert status == 0 and "warning superlink: no SuperLink" in out
    assert "warning sites: cy is invited" in out and out.count("ok      code:") == 2
    status, out, _ = fedlora("deploy", "doctor", "ann")
    assert status == 2 and "fault   base: model is not on this machine" in out
    assert "fault   port: localhost:9 does not answer" in out
    status, _, err = fedlora("deploy", "doctor")
    assert status == 2 and "neither a coordinator's folder nor a site's" in err


def test_doctor_sees_faults(fedlora, joined, tiny_project):
    root = CoordinatorFolder(joined / "deployment")
    root.root_key.chmod(0o640)
    facts = SiteFolder(joined / "ann").package_facts
    facts.write_text(facts.read_text().replace(hash_package(), "0" * 64).replace("1.41", "1.40"))
    client = SiteFolder(joined / "ann").client_file
    own = yaml.safe_load(client.read_text()) | {"model": {"name": str(tiny_project / "model")}}
    client.write_text(yaml.safe_dump(own))
    issued = issue_certificate(*make_root("x"), "localhost")
    root.certificate.write_bytes(issued[1])
    _, out, _ = fedlora("deploy", "doctor", "deployment", "--json")
    found = {(f["level"], f["name"]) for f in json.loads(out)}
    assert {("fault", "rights"), ("fault", "certificate")} <= found
    _, out, _ = fedlora("deploy", "doctor", "ann")
    assert "fault   code: the installed code" in out and "pip install flwr==1.40" in out
    assert "ok      base:" in out and "ok      memory: training takes" in out
    assert "fault   data: data/universal_train.json, data/local_train.json of client.yaml" in out
    assert "ok      policy: ann/policy.yaml has" in out.replace(f"{joined}/", "")


def test_doctor_reads_a_site_s_two_files_as_its_client_does(fedlora, joined, tiny_project):
    def look() -> str:
        out = fedlora("deploy", "doctor", "ann")[1]
        return out[out.index("gpu") :]

    site = SiteFolder(joined / "ann")
    draft = site.client_file.read_text()
    site.client_file.write_text(draft.replace("system_prompt", "sytem_prompt"))
    site.policy.write_text("rounds: none\nleast: 2\n")
    out = look()
    assert "fault   client.yaml:" in out and "sytem_prompt" in out and "package/client.yaml" in out
    assert "fault   policy:" in out and "least" in out and "rounds" in out
    site.client_file.write_text(draft.replace('id: "ann"', "id: bob"))
    assert 'fault   client.yaml: id is "bob", and the package is for ann.' in look()
    site.client_file.write_text(draft + "training: {batch_size: 7}\n")
    assert "Their product must be the same at all clients." in look()
    data = site.folder / "data"
    data.mkdir()
    for name in ("local_train", "universal_train"):
        shutil.copy(tiny_project / "ann_local.json", data / f"{name}.json")
    site.policy.unlink()
    shared = f"data: {{conflict_test: {tiny_project / 'conflict.json'}}}"  # it names bob, too
    site.client_file.write_text(f"{draft}model: {{name: {tiny_project / 'model'}}}\n{shared}\n")
    out = look()
    assert "warning policy: there is none, so all is permitted" in out
    assert "fault" not in out and "ok      data:" in out and "ok      memory:" in out


@pytest.mark.parametrize(
    "ahead, level",
    [(0, "ok"), (-1.5, "ok"), (4, "warning"), (6, "fault"), (-100, "warning"), (-304, "fault")],
)
def test_clocks_are_judged_as_flower_judges_signatures(ahead, level):
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert connection.AHEAD_SECONDS == SYSTEM_TIME_TOLERANCE
    assert connection.BEHIND_SECONDS == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    assert connection.judge_clock(ahead).level == level
