"""Whole runs with differential privacy of clients, by the real apps and messages."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from conftest import build_tiny_config
from loopback import Federation
from safetensors.torch import load_file
from test_aggregation import adapter_files, entries, interrupt_in_round, server_state, updates_in

from fedlora_app.config.loading import change_config
from fedlora_app.config.schema import ConfigError
from fedlora_app.federation.accountant import compute_epsilon
from fedlora_app.federation.privacy import clip_update
from fedlora_app.federation.rules.fedavg import FedAvg
from fedlora_app.forgetting import Forgetting, configure_without
from fedlora_app.model.adapter_state import compute_norm
from fedlora_app.report.page import write_report
from fedlora_app.runs import secret_key
from fedlora_app.runs.paths import RunDirectoryError
from fedlora_app.runs.reading import load_run
from fedlora_app.strategy import RoundError
from fedlora_app.training.shapes import build_shapes

CLIENTS = ("ann", "bob", "cy")
DELTA, CLIP = 1e-5, 0.2  # updates of these runs are 0.35 long
PLAIN = "privacy.unit=none"
CLIPPED = f"privacy.unit=client privacy.clip_norm={CLIP}"
NOISY = f"{CLIPPED} privacy.delta={DELTA} privacy.noise_multiplier=1.5"


def configure(overrides, clients=CLIENTS, **federated):
    settings = {"weighting": "equal", **federated}
    data = {"conflict_test": None}
    plain = build_tiny_config(clients, federated=settings, evaluation={"interval": 0}, data=data)
    return change_config(plain, overrides)


def run_once(project, folder, overrides, **federated):
    federation = Federation(project, folder, configure(overrides, **federated))
    federation.run()
    return federation


def flat(state):
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


def noise_of(run, server_round, clients=CLIENTS, uploads_of=None):
    """Return what a round's adapter has beside the clipped mean of the updates that were kept."""
    folder = (uploads_of or run) / "server" / f"round_{server_round:03d}" / "uploads"
    sent = [clip_update(load_file(folder / f"{c}.safetensors"), CLIP) for c in clients]
    mean = sum(map(flat, sent)) / len(sent)
    return flat(server_state(run, server_round)) - flat(server_state(run, server_round - 1)) - mean


def correlation(one, other):
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


@pytest.fixture(scope="module")
def plain(tiny_project, tmp_path_factory):
    """The same run without protection."""
    return run_once(tiny_project, tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.fixture(scope="module")
def noisy(tiny_project, tmp_path_factory):
    """A finished run with the server's noise, whose uploads are kept."""
    folder = tmp_path_factory.mktemp("noisy")
    return run_once(tiny_project, folder, NOISY, keep_uploads=True)


def test_the_servers_mean_has_the_noise_that_was_asked_for(noisy):
    """It fails where noise is left out, added twice, or the same in two rounds."""
    first, second = (noise_of(noisy.path, number) for number in (1, 2))
    for noise in (first, second):  # of 2,048 numbers
        assert noise.std().item() == pytest.approx(1.5 * CLIP / 3, rel=0.07)
    assert abs(correlation(first, second)) < 0.1


def test_what_is_kept_is_what_the_server_has_received(noisy):
    for client, (update, _) in updates_in(noisy, 1).items():
        kept = load_file(noisy.path / "server" / "round_001" / "uploads" / f"{client}.safetensors")
        assert all(torch.equal(kept[key], update[key]) for key in update)
        assert compute_norm(update) > CLIP


def test_every_round_says_what_has_been_spent(noisy, capsys):
    for server_round in (1, 2):
        told = entries(noisy.path, server_round, "privacy")["(server)"]
        assert told == {
            "unit": "client",
            "epsilon": compute_epsilon(DELTA, [(1.5, server_round)]),
            "delta": DELTA,
            "noise_multiplier": 1.5,
        }
        measured = entries(noisy.path, server_round, "aggregate")["(server)"]
        assert measured["clipped_share"] == 1 and -1 <= measured["noised_cosine"] < 0.2
    assert entries(noisy.path, 0, "privacy") == {}
    rows = (noisy.path / "history.csv").read_text().splitlines()
    assert any(row.startswith("2,(server),privacy,epsilon,") for row in rows)


def test_the_report_has_a_section_of_it(noisy, plain):
    text = write_report(noisy.path).read_text()
    assert (
        "The unit is one client. Updates are clipped to norm 0.2; the server adds the noise" in text
    )
    epsilon = compute_epsilon(DELTA, [(1.5, 2)])
    assert f"{epsilon:.3g}" in text and "share of updates clipped" in text
    assert "so nothing is gained by sampling" in text
    assert "Differential privacy" not in write_report(plain.path).read_text()


def test_the_key_is_read_by_its_owner_only_and_told_to_nobody(tiny_project, tmp_path, capfd):
    for place, overrides in (("server", NOISY), ("client", f"{NOISY} privacy.noise=client")):
        federation = run_once(tiny_project, tmp_path / place, overrides)
        keys = list(federation.path.rglob("secret.key"))
        assert len(keys) == (1 if place == "server" else 3)
        assert len({key.read_bytes() for key in keys}) == len(keys)
        printed = capfd.readouterr()
        (grid,) = federation.grids
        files = [p for p in federation.path.rglob("*") if p.is_file() and p not in keys]
        told = [grid.bytes_sent(), grid.bytes_received(), *(p.read_bytes() for p in files)]
        told += [text.encode() for text in printed]
        for key in keys:
            assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32
            for form in (key.read_bytes(), key.read_bytes().hex().encode()):
                assert not any(form in text for text in told)


def test_two_runs_that_differ_in_their_keys_alone_differ(noisy, tiny_project, tmp_path):
    again = run_once(tiny_project, tmp_path, NOISY, keep_uploads=True)
    first = [
        load_file(run / "server" / "round_001" / "uploads" / "ann.safetensors")
        for run in (noisy.path, again.path)
    ]
    assert all(torch.equal(first[0][key], first[1][key]) for key in first[0])
    noises = [noise_of(run, 1) for run in (noisy.path, again.path)]
    assert abs(correlation(*noises)) < 0.1


def test_clipping_alone_bounds_what_is_folded_in_and_adds_nothing(
    tiny_project, tmp_path, monkeypatch
):
    norms, add = [], FedAvg.add

    def watch(self, client, update, weight):
        norms.append(compute_norm(update))
        add(self, client, update, weight)

    monkeypatch.setattr(FedAvg, "add", watch)
    run = run_once(tiny_project, tmp_path, CLIPPED, keep_uploads=True).path
    assert len(norms) == 6 and all(norm <= CLIP for norm in norms)
    assert noise_of(run, 1).abs().max() < 1e-6
    assert entries(run, 1, "privacy")["(server)"] == {"unit": "client"}
    assert not list(run.rglob("secret.key"))


@pytest.mark.parametrize("noise", ["server", "client"])
def test_a_bound_that_nothing_reaches_changes_no_byte(noise, plain, tiny_project, tmp_path):
    overrides = f"privacy.unit=client privacy.clip_norm=1e6 privacy.noise={noise}"
    run = run_once(tiny_project, tmp_path, overrides).path
    assert adapter_files(run) == adapter_files(plain.path)


@pytest.fixture
def one_key(monkeypatch):
    """Every run has the same secret."""
    monkeypatch.setattr(secret_key.secrets, "token_bytes", lambda number: bytes(range(number)))


@pytest.mark.parametrize(
    "overrides",
    [
        NOISY,
        f"{NOISY} privacy.noise=client",
        pytest.param(f"{NOISY} federated.server_optimizer=momentum", marks=pytest.mark.minutes),
    ],
)
def test_a_stopped_run_ends_in_the_same_bytes(overrides, tiny_project, tmp_path, one_key):
    whole = run_once(tiny_project, tmp_path / "whole", overrides)
    stopped = Federation(tiny_project, tmp_path / "stopped", whole.config)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tamper=interrupt_in_round(2))
    again = stopped.run(resume=str(stopped.path))
    assert adapter_files(again) == adapter_files(whole.path)
    spent = [entries(run, 2, "privacy") for run in (again, whole.path)]
    assert spent[0] == spent[1]


def stop_in_evaluation(server_round, failing=""):
    """Return what ends a run once a round's average has been told; one client may have failed."""

    def tamper(message, reply):
        about = reply.content.config_records["about"]
        if about["server-round"] != server_round:
            return reply
        if message.metadata.message_type == "evaluate":
            raise KeyboardInterrupt
        if about["client-id"] == failing:
            about["server-round"] = 99
        return reply

    return tamper


@pytest.mark.parametrize(("failing", "told"), [("", 2), ("cy", 3)])
def test_a_round_that_is_repeated_counts_twice_where_it_is_another(
    failing, told, tiny_project, tmp_path
):
    federation = Federation(tiny_project, tmp_path, configure(NOISY, min_clients=2))
    with pytest.raises(KeyboardInterrupt):
        federation.run(tamper=stop_in_evaluation(2, failing))
    federation.run(resume="run")
    lines = (federation.path / "server" / "releases.jsonl").read_text().splitlines()
    assert [json.loads(line)["server_round"] for line in lines] == [1, *[2] * (told - 1)]
    spent = entries(federation.path, 2, "privacy")["(server)"]["epsilon"]
    assert spent == compute_epsilon(DELTA, [(1.5, told)])


def test_a_run_ends_before_it_spends_more_than_its_epsilon(tiny_project, tmp_path):
    config = configure(f"{CLIPPED} privacy.delta={DELTA} privacy.epsilon=3", min_clients=2)
    federation = Federation(tiny_project, tmp_path, config)
    with pytest.raises(KeyboardInterrupt):
        federation.run(tamper=stop_in_evaluation(2, "cy"))
    with pytest.raises(RoundError, match=r"would have spent epsilon 3\.\d+, and privacy\.epsilon"):
        federation.run(resume="run")
    with pytest.raises(ConfigError, match=r"noise keeps 2 rounds within privacy\.epsilon 3"):
        federation.run(resume="run", **{"num-rounds": 3})


def test_within_its_epsilon_a_run_ends(tiny_project, tmp_path, capsys):
    run = run_once(tiny_project, tmp_path, f"{CLIPPED} privacy.delta={DELTA} privacy.epsilon=3")
    spent = [entries(run.path, n, "privacy")["(server)"]["epsilon"] for n in (1, 2)]
    assert spent[0] < spent[1] and 2.9 < spent[1] <= 3
    printed = capsys.readouterr().out
    assert "epsilon 2.9" in printed and "at delta 1e-05 after 2 rounds of training" in printed


def test_without_its_key_a_run_does_not_go_on(tiny_project, tmp_path):
    federation = Federation(tiny_project, tmp_path, configure(NOISY))
    with pytest.raises(KeyboardInterrupt):
        federation.run(tamper=interrupt_in_round(2))
    key = federation.path / "server" / "secret.key"
    key.write_bytes(b"short")
    with pytest.raises(RunDirectoryError, match="secret.key is damaged: expected 32 bytes"):
        federation.run(resume="run")
    key.unlink()
    with pytest.raises(RunDirectoryError, match="secret.key cannot be read"):
        federation.run(resume="run")


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float32", marks=pytest.mark.minutes)])
def test_a_clients_own_noise_is_in_what_it_sends(dtype, plain, tiny_project, tmp_path):
    """And so is what it says of the norm; rounding comes after it."""
    overrides = f"federated.upload_dtype={dtype}"
    sent = run_once(
        tiny_project,
        tmp_path / "sent",
        f"{NOISY} privacy.noise=client {overrides}",
        keep_uploads=True,
    )
    noises = []
    for client, (update, _) in updates_in(plain, 1).items():
        path = sent.path / "server" / "round_001" / "uploads" / f"{client}.safetensors"
        noise = flat(load_file(path)) - flat(clip_update(update, CLIP))
        assert noise.std().item() == pytest.approx(1.5 * CLIP, rel=0.07)
        noises.append(noise)
        said = entries(sent.path, 1, "global")[client]["update_norm"]
        assert said == pytest.approx(flat(load_file(path)).norm().item(), rel=0.02)
    assert all(abs(correlation(noises[0], noise)) < 0.1 for noise in noises[1:])
    spent = entries(sent.path, 2, "privacy")["(server)"]["epsilon"]
    assert spent == compute_epsilon(DELTA, [(1.5, 2)])


def test_forgetting_repeats_the_noise_and_has_other_noise_without_a_client(
    noisy, tiny_project, tmp_path
):
    """With the same noise the difference of the two would be the forgotten client's update."""
    saved = load_run(noisy.path)
    model, _ = build_shapes(saved.config, tiny_project)
    forgetting = Forgetting(saved, "ann", configure_without(saved, "ann"), tiny_project, model)
    forgetting.check(lambda *_: None)  # raises where a bit differs
    target = tmp_path / "without"
    forgetting.write(target, lambda *_: None)
    noise = noise_of(target, 1, ("bob", "cy"), uploads_of=noisy.path)
    assert noise.std().item() == pytest.approx(1.5 * CLIP / 2, rel=0.07)
    assert abs(correlation(noise, noise_of(noisy.path, 1))) < 0.1
    told = (target / "server" / "releases.jsonl").read_text().splitlines()
    assert len(told) == 4  # what was told before it cannot be taken back
    assert stat.S_IMODE((target / "server" / "secret.key").stat().st_mode) == 0o600
