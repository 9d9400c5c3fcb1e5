"""A site's policy: each rule refuses by itself, before anything is trained or sent."""

from __future__ import annotations

import json
import ssl
from types import SimpleNamespace

import pytest
import torch
import yaml
from deployment.sites import build_bare_config, build_federation, names_of, set_policy

from fedlora_app import client as client_module
from fedlora_app.deployment import policy as policy_module
from fedlora_app.deployment.client_file import ConfidentialError
from fedlora_app.deployment.drafts import draft_policy
from fedlora_app.deployment.layout import SiteFolder
from fedlora_app.deployment.policy import (
    RULES,
    Guard,
    Policy,
    PolicyError,
    fingerprint_certificate,
    load_policy,
)
from fedlora_app.deployment.privacy_rule import (
    PrivacyRule,
    compute_spending,
    find_privacy_fault,
)
from fedlora_app.federation.accountant import compute_epsilon
from fedlora_app.federation.messages import UPDATE_RECORD, read_task
from fedlora_app.foundation.project import hash_package
from fedlora_app.model.base import compute_fingerprint
from fedlora_app.report.page import write_report
from fedlora_app.strategy import RoundError

OTHER = 64 * "0"
NUM_PARAMETERS = 2048  # of the tiny experiment's global adapter
PRIVATE = {"unit": "client", "noise": "client", "clip_norm": 1.0, "epsilon": 3.0, "delta": 1e-5}
CLIPPED = {"unit": "client", "clip_norm": 1.0}
NOISY = CLIPPED | {"noise_multiplier": 2.0, "delta": 0.1}
RECORD = NOISY | {"unit": "record"}


def write_certificate(folder) -> str:
    """Write what looks like a root certificate to whoever only hashes it; return its SHA-256."""
    path = SiteFolder(folder).root_certificate
    path.parent.mkdir(exist_ok=True)
    path.write_text(ssl.DER_cert_to_PEM_cert(b"a certificate"))
    return fingerprint_certificate(path)


def permitted_rules(federation, client="ann") -> dict:
    """Return the narrowest rules under which the tiny experiment runs."""
    folder = federation.own_files[client].parent
    return {
        "coordinator": write_certificate(folder),
        "experiments": ["tiny"],
        "participants": ["ann", "bob"],
        "least_others": 1,
        "rounds": 1,
        "modes": ["dual"],
        "schedules": ["phased"],
        "adapter_rank": 4,
        "target_modules": ["all-linear"],
        "max_norm_ratio": 3,
        "send_update": True,
        "update_parameters": NUM_PARAMETERS,
        "update_dtypes": ["float32"],
        "privacy": {"unit": ["client"], "noise": "client", "epsilon": 3, "delta": 1e-5},
        "losses": [],
        "metrics": ["*_*", "num-examples", "*/*"],
        "facts": ["*_*", "sha256/*", "device", "process", "findings"],
        "code_sha256": hash_package(),
        "base_sha256": compute_fingerprint(federation.config.model, federation.project),
        "steps": 6,
        "seconds": 600,
    }


REFUSED_AT_ONCE = {
    "coordinator": OTHER,
    "experiments": ["another"],
    "participants": ["ann"],
    "least_others": 2,
    "rounds": 1,
    "modes": ["fedavg"],
    "schedules": ["joint"],
    "adapter_rank": 3,
    "target_modules": ["q_proj"],
    "max_norm_ratio": 2.9,
    "send_update": False,
    "update_dtypes": ["bfloat16"],
    "privacy": {"unit": ["record"]},
    "code_sha256": OTHER,
    "base_sha256": OTHER,
    "steps": 5,
    "facts": ["device"],
    "metrics": ["num-examples"],
}
REFUSED_LATER = {"update_parameters": NUM_PARAMETERS - 1, "seconds": 1e-9}
"""What is only known once there is an update, or time has passed."""
WITHHELD = {"losses": ["global"]}
"""What refuses nothing, but leaves figures out of replies."""


@pytest.fixture
def federation(tiny_project, tmp_path):
    config = build_bare_config(federated={"num_rounds": 1, "max_norm_ratio": 3}, privacy=PRIVATE)
    return build_federation(tiny_project, tmp_path, config)


def trained(federation) -> bool:
    """Whether any client was asked to train."""
    sent = federation.grids[0].sent
    return any(message.metadata.message_type == "train" for message in sent)


def test_every_rule_is_tested():
    tested = REFUSED_AT_ONCE.keys() | REFUSED_LATER.keys() | WITHHELD.keys()
    assert tested == Policy.model_fields.keys()
    assert RULES.keys() < REFUSED_AT_ONCE.keys()


def test_the_narrowest_rules_permit_the_experiment(federation):
    set_policy(federation, "ann", **permitted_rules(federation))
    assert (federation.run() / "final" / "global").is_dir()


@pytest.mark.parametrize("rule", REFUSED_AT_ONCE)
def test_it_refuses_before_anything_is_trained(federation, capsys, rule):
    rules = permitted_rules(federation) | {rule: REFUSED_AT_ONCE[rule]}
    if rule == "rounds":
        federated = {"max_norm_ratio": 3}
        federation.config = build_bare_config(federated=federated, privacy=PRIVATE)  # of two
    set_policy(federation, "ann", **rules)
    with pytest.raises(ValueError, match=f"ann: its policy refuses: {rule}$"):
        federation.run()
    assert not trained(federation)
    assert f"ann: The policy refuses:\n  {rule}: " in capsys.readouterr().out
    assert f"policy refuses: {rule}".encode() in federation.grids[0].bytes_received()


def test_an_update_that_is_too_large_does_not_leave(federation):
    rules = permitted_rules(federation) | {"update_parameters": NUM_PARAMETERS - 1}
    set_policy(federation, "ann", **rules)
    with pytest.raises(RoundError, match="ann: its policy refuses: update_parameters"):
        federation.run()
    (reply,) = (
        r
        for r in federation.grids[0].received
        if r.metadata.message_type == "train" and r.metadata.src_node_id == 11
    )
    assert UPDATE_RECORD not in reply.content


def figures_received(federation, client_node: int) -> set[str]:
    """Return the names of all figures that a client sent."""
    replies = federation.grids[0].received
    own = [r for r in replies if r.metadata.src_node_id == client_node and r.has_content()]
    return {name for r in own for record in r.content.metric_records.values() for name in record}


@pytest.mark.parametrize(
    ("losses", "is_told"),
    [
        (None, {"train_global", "train_local", "margin"}),
        (["global"], {"train_global"}),
        ([], set()),
        (["global", "local", "global+local"], {"train_global", "train_local"}),
    ],
)
def test_losses_and_margins_stay_at_a_site_that_withholds_them(federation, losses, is_told):
    """A server that sends an adapter made for it, a record a step, could read a record from them.

    It asks for nothing that a policy could refuse: the figures themselves have to stay.
    """
    federation.config = build_bare_config(federated={"num_rounds": 1})
    set_policy(federation, "ann", **({} if losses is None else {"losses": losses}))
    run = federation.run()
    ann, bob = (figures_received(federation, node) for node in (11, 12))
    of_texts = {
        *("train_loss", "final_train_loss", "penalty", "num_tokens", "num_answer_tokens"),
        "margin_per_byte",
    }
    told = {name for name in ann if name.rpartition("/")[2] in of_texts}
    assert {"margin" if "margin" in name else name.split("/")[0] for name in told} == is_told
    assert {name for name in bob if name.rpartition("/")[2] not in of_texts} <= ann
    assert any(name.endswith("/exact_match") for name in ann)
    write_report(run)  # does without them


def test_an_update_is_held_against_the_rules_once_more_before_it_leaves():
    guard = Guard(Policy(send_update=False, update_dtypes=["float32"], update_parameters=1))
    guard.require_sendable(["num-examples"], ["device"], None, "int8")
    with pytest.raises(PolicyError) as caught:
        guard.require_sendable([], [], {"x": torch.zeros(2)}, "int8")
    assert caught.value.refused.keys() == {"send_update", "update_parameters", "update_dtypes"}


def test_training_stops_when_its_time_is_over(federation, monkeypatch):
    set_policy(federation, "ann", **permitted_rules(federation) | {"seconds": 3600})
    now = [0.0]
    monkeypatch.setattr(policy_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    steps = []
    original = client_module.step_lines

    def count(what):
        show = original(what)

        def note(step, num_steps, loss):
            if what.startswith("ann, round 1, global"):
                steps.append(step)
                now[0] += 3601
            show(step, num_steps, loss)

        return note

    monkeypatch.setattr(client_module, "step_lines", count)
    with pytest.raises(RoundError, match="ann: its policy refuses: seconds"):
        federation.run()
    assert steps == [1]


def test_a_reply_that_took_too_long_does_not_leave(federation):
    set_policy(federation, "ann", **permitted_rules(federation) | {"seconds": 1e-9})
    with pytest.raises(ValueError, match="ann: its policy refuses: seconds"):
        federation.run()


def test_all_that_is_refused_is_named_at_once_and_no_reason_leaves(federation, capsys):
    set_policy(federation, "ann", experiments=["zqours"], rounds=1, update_dtypes=["int8"])
    federation.config = build_bare_config()
    with pytest.raises(ValueError, match="ann: its policy refuses: experiments, rounds, update_dt"):
        federation.run()
    assert b"zqours" not in federation.grids[0].bytes_received()
    out = capsys.readouterr().out
    assert "experiments: tiny is none of zqours" in out
    assert "rounds: 2, and at most 1 are permitted" in out


def test_a_later_message_is_held_against_it_too(federation):
    """A server may register with one experiment and send another one."""
    set_policy(federation, "ann", **permitted_rules(federation))
    deliver = federation.grid_class.push_messages

    class Changing(federation.grid_class):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                record = message.content.config_records["task"]
                if message.metadata.message_type == "train":
                    raw = json.loads(record["experiment"])
                    raw["training"]["global_epochs"] = 50
                    record["experiment"] = json.dumps(raw)
            return deliver(self, messages)

    federation.grid_class = Changing
    with pytest.raises(RoundError, match="ann: its policy refuses: steps"):
        federation.run()
    train = [m for m in federation.grids[0].sent if m.metadata.message_type == "train"]
    assert read_task(train[0]).client_id == "ann"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rounds: 0\nround: 3", 'round: unknown key. Did you mean "rounds"?'),
        ("code_sha256: zq12", "code_sha256: expected a SHA-256, 64 hex digits (it is 'zq12')."),
        ("- rounds", "holds no rules"),
        ("rounds: [", "cannot be read as YAML"),
    ],
)
def test_a_policy_that_cannot_be_read_permits_nothing(federation, capsys, text, fault):
    federation.own_files["ann"].with_name("policy.yaml").write_text(text)
    with pytest.raises(ValueError, match="ann: its policy cannot be read; its log says why"):
        federation.run()
    assert fault in capsys.readouterr().out
    assert b"zq12" not in federation.grids[0].bytes_received()


def test_a_policy_that_is_named_must_be_there(federation):
    own = federation.own_files["ann"]
    own.write_text(own.read_text() + "policy: rules/none.yaml\n")
    with pytest.raises(ValueError, match="ann: its policy cannot be read"):
        federation.run()


def test_who_may_fail_is_not_sure_to_be_in_the_average(federation):
    federation.config = build_bare_config(federated={"num_rounds": 1, "min_clients": 1})
    set_policy(federation, "ann", least_others=1)
    with pytest.raises(ValueError, match="ann: its policy refuses: least_others"):
        federation.run()


def test_fingerprints_are_read_as_people_write_them(tmp_path):
    found = write_certificate(tmp_path)
    colons = ":".join(found[i : i + 2] for i in range(0, 64, 2)).upper()
    spaces = " ".join(found[i : i + 4] for i in range(0, 64, 4))
    for text in (colons, spaces):
        (tmp_path / "policy.yaml").write_text(f'coordinator: "{text}"')
        assert load_policy(tmp_path / "policy.yaml").coordinator == found


def test_a_policy_that_is_missing_or_empty_in_part_permits_nothing(federation):
    """Somebody edits it, or its disk is away, or a list was taken out below its name."""
    policy = federation.own_files["ann"].with_name("policy.yaml")
    facts = SiteFolder(policy.parent).package_facts
    facts.parent.mkdir()
    facts.write_text("{}")  # it has joined a deployment
    with pytest.raises(ValueError, match="ann: its policy is missing"):
        federation.run()
    policy.write_text("rounds: 9\nparticipants:\n")
    with pytest.raises(ConfidentialError, match="nothing stands behind participants"):
        load_policy(policy)
    policy.write_text("{}")
    assert (federation.run("run2") / "final" / "global").is_dir()


@pytest.mark.parametrize(("weight", "is_permitted"), [(1.0, True), (1e6, False)])
def test_no_weight_makes_the_average_this_client_s_own(federation, weight, is_permitted):
    clients = [{"id": "ann", "weight": weight}, {"id": "bob", "weight": 1.0}]
    federation.config = build_bare_config(
        federated={"num_rounds": 1, "weighting": "given", "clients": clients}
    )
    set_policy(federation, "ann", least_others=1)
    if is_permitted:
        federation.run()
        return
    with pytest.raises(ValueError, match="ann: its policy refuses: least_others"):
        federation.run()


class TestPrivacy:
    """The rule by itself; above it refuses by its name."""

    @pytest.mark.parametrize(
        ("rule", "privacy", "fault"),
        [
            ({"unit": ["client"]}, {}, "privacy.unit is none"),
            ({"unit": ["client"]}, CLIPPED, None),
            ({"unit": ["record"]}, CLIPPED, "privacy.unit is client, none of record"),
            ({"epsilon": 1e9}, {}, "privacy.unit is none"),
            ({"epsilon": 1e9}, CLIPPED, "without noise, so that epsilon is infinite"),
            ({"noise": "client"}, CLIPPED | {"noise": "client"}, "without noise"),
            ({"noise": "client"}, NOISY, "the server would add the noise"),
            ({"noise": "client"}, NOISY | {"noise": "client"}, None),
            ({"noise": "client"}, RECORD, None),
            ({"epsilon": 3.2}, NOISY, None),
            ({"epsilon": 3.1}, NOISY, "spend epsilon 3.19 at delta 1e-05, and at most 3.1"),
            # What the experiment calls delta does not count.
            ({"epsilon": 1.0, "delta": 0.1}, NOISY, None),
            ({"epsilon": 3.0}, PRIVATE, None),
            ({"epsilon": 2.9}, PRIVATE, "would spend epsilon"),
            ({"epsilon": 3.0, "delta": 1e-6}, PRIVATE, "would spend epsilon"),
        ],
    )
    def test_what_satisfies_it(self, rule, privacy, fault):
        config = build_bare_config(federated={"weighting": "equal"}, privacy=privacy)
        found = find_privacy_fault(PrivacyRule(**rule), config, "ann", lambda: (20, 6))
        assert found is None if fault is None else fault in found

    def test_a_round_in_which_this_client_is_not_asked_spends_nothing_of_it(self):
        clients = [{"id": "ann", "last_round": 1}, {"id": "bob"}]
        federated = {"weighting": "equal", "clients": clients}
        config = build_bare_config(federated=federated, privacy=NOISY)
        spent = [compute_spending(config, client, (0, 0), 1e-5) for client in ("ann", "bob")]
        assert spent == [compute_epsilon(1e-5, [(2.0, rounds)]) for rounds in (1, 2)]

    def test_a_record_s_epsilon_depends_on_this_client_s_data(self):
        config = build_bare_config(privacy=RECORD)
        rule = PrivacyRule(epsilon=compute_spending(config, "ann", (20, 6), 1e-5) * 1.01)
        assert find_privacy_fault(rule, config, "ann", lambda: (20, 6)) is None
        assert "would spend" in find_privacy_fault(rule, config, "ann", lambda: (4, 6))

    def test_a_mode_that_sends_no_update_needs_none(self):
        config = build_bare_config(federated={"mode": "local-only"})
        assert find_privacy_fault(PrivacyRule(unit=["record"]), config, "ann", dict) is None

    def test_of_single_records_it_is_the_client_s_own_count(self, federation, capsys):
        """Of its tokenised data, before anything is trained."""
        federation.config = build_bare_config(federated={"num_rounds": 1}, privacy=RECORD)
        set_policy(federation, "ann", privacy={"unit": ["record"], "epsilon": 1e-3})
        with pytest.raises(ValueError, match="ann: its policy refuses: privacy$"):
            federation.run()
        assert "privacy: the run would spend epsilon" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("rule", "fault"),
        [
            ({}, "privacy: expected at least one of unit, noise and epsilon"),
            ({"unit": ["none"]}, "privacy.unit.0: input should be 'client' or 'record'"),
            ({"unit": ["client"], "epsilon": None}, "privacy: nothing stands behind epsilon"),
            ({"unit": []}, "privacy.unit: at least one is needed"),
            ({"unit": ["client"], "delta": 0.1}, "privacy: delta belongs to epsilon"),
            ({"epsilon": 8, "noise": "server"}, "privacy.noise: input should be 'client'"),
            ({"epsilonn": 8}, 'privacy.epsilonn: unknown key. Did you mean "epsilon"?'),
        ],
    )
    def test_its_faults_are_named(self, tmp_path, rule, fault):
        path = tmp_path / "policy.yaml"
        path.write_text(json.dumps({"privacy": rule}))
        with pytest.raises(ConfidentialError) as caught:
            load_policy(path)
        assert fault in str(caught.value)


class TestDraft:
    def test_it_permits_the_experiment_and_nothing_more(self, federation):
        path = federation.own_files["ann"].with_name("policy.yaml")
        rules = permitted_rules(federation)
        facts = {
            "root": rules["coordinator"],
            "participants": ["bob", "ann"],
            "code_sha256": rules["code_sha256"],
            "base": {"fingerprint": rules["base_sha256"]},
        }
        path.write_text(draft_policy(federation.config, facts))
        drafted = load_policy(path).model_dump(exclude_unset=True)
        assert drafted == {k: v for k, v in rules.items() if k in drafted}
        assert drafted.keys() == RULES.keys() - {"send_update"} | WITHHELD.keys()
        federation.run()

    @pytest.mark.parametrize(
        ("privacy", "drafted"),
        [
            ({}, None),
            (CLIPPED, {"unit": ["client"]}),
            (NOISY, {"unit": ["client"], "epsilon": 0.944, "delta": 0.1}),
            (RECORD, {"unit": ["record"], "noise": "client"}),
        ],
    )
    def test_it_has_the_protection_that_the_experiment_has(self, tmp_path, privacy, drafted):
        path = tmp_path / "policy.yaml"
        config = build_bare_config(federated={"weighting": "equal"}, privacy=privacy)
        path.write_text(draft_policy(config, {}))
        rule = load_policy(path).privacy
        assert (None if rule is None else rule.model_dump(exclude_unset=True)) == drafted
        counts = lambda: (20, 6)  # noqa: E731
        assert rule is None or find_privacy_fault(rule, config, "ann", counts) is None

    def test_what_is_unknown_permits_everything(self, tmp_path):
        path = tmp_path / "policy.yaml"
        path.write_text(draft_policy(build_bare_config(("ann", "bob", "no")), {}))
        rules = load_policy(path)
        assert rules.coordinator is None and rules.base_sha256 is None
        assert rules.max_norm_ratio is None
        assert rules.losses == ["global"]  # the update tells more
        assert rules.participants == ["ann", "bob", "no"]
        assert rules.least_others == 2
        lines = path.read_text().replace("# send_update", "send_update").replace("# facts", "facts")
        assert yaml.safe_load(lines)["send_update"] is False
        path.write_text(lines)
        assert load_policy(path).facts == ["*"]


def test_no_name_of_a_file_is_in_a_reason(federation, capsys):
    set_policy(federation, "ann", coordinator=OTHER, steps=1)
    with pytest.raises(ValueError, match="its policy refuses: coordinator"):
        federation.run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "coordinator:" in line]
    assert lines and not any(name in line for line in lines for name in names_of("ann"))
