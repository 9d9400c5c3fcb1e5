from __future__ import annotations

import json
import re

import pytest
from conftest import build_tiny_config

from fedlora_app.config.schema import ConfigError
from fedlora_app.runs import tracking
from fedlora_app.runs.directory import RunDirectory
from fedlora_app.runs.tracking import (
    Trackers,
    build_trackers,
    public_settings,
    require_trackers,
    scalars,
)

EVENT = {
    "time": "2026-01-01T00:00:00.000Z",
    "event": "metrics",
    "round": 2,
    "client": "ann",
    "phase": "global",
    "train_global/train_loss": 0.5,
    "train_global/num_steps": 7,
    "update_norm": 1.25,
    "exact_match_each": [1, 0],
    "device": "CPU",
    "flag": True,
}


def read_tensorboard(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


class Failing:
    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, event) -> None:
        self.calls += 1
        raise OSError("No space left on device")

    def close(self) -> None:
        raise OSError("No space left on device")


def test_only_the_numbers_of_metrics_are_passed_on():
    assert dict(scalars(EVENT)) == {
        "global/train_loss/ann": 0.5,
        "global/num_steps/ann": 7,
        "global/update_norm/ann": 1.25,
    }
    for event in ("facts", "failure", "aggregation"):
        assert not list(scalars({"event": event, "round": 1, "client": "ann", "value": 1.0}))


def test_what_is_published_holds_no_prompt_and_no_file_name():
    settings = public_settings(build_tiny_config())
    assert settings["federated"]["clients"] == ["ann", "bob"]
    assert settings["training"]["learning_rate"] == 1e-2
    text = json.dumps(settings)
    assert "You are" not in text and ".json" not in text


def test_nothing_is_tracked_unless_it_is_named(tmp_path):
    run = RunDirectory.create(tmp_path / "run", build_tiny_config(), tmp_path, {})
    run.trackers = build_trackers(build_tiny_config(), run.path)
    run.log_event("metrics", round=0, client="ann", phase="evaluate", n=1)
    run.close()
    assert {path.name for path in run.path.iterdir()} == {
        ".lock",
        "config.json",
        "manifest.json",
        "metrics.jsonl",
    }


def test_tensorboard_holds_what_metrics_jsonl_does(tmp_path):
    config = build_tiny_config(experiment={"track": ["tensorboard"]})
    run = RunDirectory.create(tmp_path / "run", config, tmp_path, {})
    run.trackers = build_trackers(config, run.path)
    for server_round, loss in ((1, 0.5), (2, 0.25)):
        run.add_metrics(server_round, "ann", "local", {"train_local/train_loss": loss, "each": [1]})
    run.add_metrics(2, "(server)", "aggregate", {"aggregation_error": 0.125})
    run.log_event("failure", round=2, client="bob", why="text")
    run.close()
    run.close()  # once more does no harm
    assert read_tensorboard(run.path / "tensorboard") == {
        "local/train_loss/ann": [(1, 0.5), (2, 0.25)],
        "aggregate/aggregation_error/(server)": [(2, 0.125)],
    }


def test_a_tracker_that_fails_is_left_out_with_one_note(capsys):
    failing, kept = Failing(), []

    class Good(Failing):
        name = "good"

        def log(self, event) -> None:
            kept.append(event)

    trackers = Trackers([failing, Good()])
    for _ in range(3):
        trackers.log(EVENT)
    assert (failing.calls, len(kept)) == (1, 3)
    output = capsys.readouterr().out
    assert output.count("Note: failing failed") == 1 and "No space left on device" in output
    trackers.close()
    assert "good was not closed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ({"tensorboard"}, "names tensorboard, which is not installed. Run: pip install -e '.[t"),
        ({"tensorboard", "wandb"}, "names tensorboard and wandb, which"),
        ({"tensorboard", "wandb"}, "'.[tensorboard,wandb]'"),
        (set(), None),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, missing, expected):
    def version(name):
        if name in missing:
            raise tracking.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(tracking, "version", version)
    config = build_tiny_config(experiment={"track": ["tensorboard", "wandb"]})
    if expected is None:
        require_trackers(config)
        return
    with pytest.raises(ConfigError, match=re.escape(expected)):
        require_trackers(config)


def test_a_tracker_that_cannot_be_started_stops_the_run_before_its_work(monkeypatch, tmp_path):
    class Broken:
        def __init__(self, config, run_dir) -> None:
            raise ConnectionError("no key")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", Broken)
    config = build_tiny_config(experiment={"track": ["tensorboard", "wandb"]})
    with pytest.raises(ConfigError, match="wandb cannot be started: ConnectionError: no key"):
        build_trackers(config, tmp_path)


def test_weights_and_biases_offline(monkeypatch, tmp_path):
    """A real one, whose file is searched for what must not leave."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = build_tiny_config(experiment={"track": ["wandb"]})
    trackers = build_trackers(config, tmp_path)
    trackers.log(EVENT)
    trackers.log(EVENT | {"round": 3})
    trackers.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"global/train_loss/ann" in content and b"learning_rate" in content
    for text in ("You are ann", "ann_local.json", "universal_test", str(tmp_path)):
        assert text.encode() not in content
