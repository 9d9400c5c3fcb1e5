"""Runs on models whose chat template knows no system prompts, or writes which day it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import build_tiny_config
from loopback import Federation

from fedlora_app.config.schema import Config
from fedlora_app.data.dialogue import render_prompt
from fedlora_app.evaluation.choices import open_round
from fedlora_app.evaluation.protocol import NO_CONTROLS, evaluate_round
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.federation.messages import TASK_RECORD
from fedlora_app.runs.reading import load_run

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}"


def build_federation(tiny_project: Path, tmp_path: Path, before: str, config: Config) -> Federation:
    """A project whose model's template begins with ``before``."""
    project = shutil.copytree(tiny_project, tmp_path / "project")
    path = project / "model" / "chat_template.jinja"
    path.write_text(before + path.read_text())
    return Federation(project, tmp_path / "results", config)


def without_system_prompts(config: Config) -> Config:
    clients = [c.model_copy(update={"system_prompt": ""}) for c in config.federated.clients]
    federated = config.federated.model_copy(update={"clients": clients})
    return config.model_copy(update={"federated": federated})


def test_without_system_prompts_there_are_no_controls_and_all_else(tiny_project, tmp_path):
    """As Gemma 1 and 2 and Mistral's first template."""
    config = without_system_prompts(build_tiny_config(federated={"num_rounds": 1}))
    federation = build_federation(tiny_project, tmp_path, NO_SYSTEM, config)
    saved = open_round(load_run(federation.run()), federation.project)
    evaluation = evaluate_round(saved, lambda *_: None)
    assert evaluation["controls"] == [] and len(evaluation["swap_table"]) > 4
    assert evaluation["notes"][-1] == NO_CONTROLS
    assert f"Note: {NO_CONTROLS}" in describe_evaluation(evaluation).replace("\n", " ")


def test_a_run_keeps_the_day_on_which_it_began(tiny_project, tmp_path):
    """Also where it is resumed and asked on another one."""
    config = build_tiny_config(evaluation={"interval": 0})
    federation = build_federation(tiny_project, tmp_path, DATED, config)

    def stop(message, reply):
        if message.content.config_records[TASK_RECORD]["server_round"] == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federation.run(tamper=stop)
    path = federation.path / "manifest.json"
    manifest = json.loads(path.read_text())
    began = {sent.content.config_records[TASK_RECORD]["date"] for sent in federation.grids[0].sent}
    assert began == {manifest["date"]}
    path.write_text(json.dumps(manifest | {"date": "2020-02-29"}))  # as if it had begun then
    run = federation.run(resume=str(federation.path))
    sent = federation.grids[1].sent
    assert {m.content.config_records[TASK_RECORD]["date"] for m in sent} == {"2020-02-29"}
    loaded, _ = SavedModel(load_run(run), 2, federation.project).load()
    assert render_prompt(loaded.tokenizer, "", "When?").startswith("29 Feb 2020<|im_start|>")
