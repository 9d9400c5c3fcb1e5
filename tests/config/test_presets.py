from __future__ import annotations

import itertools

import pytest
import yaml

from fedlora_app.config.loading import parse_config
from fedlora_app.config.presets import (
    GIB,
    DataSizes,
    build_preset,
    choose_model,
    guess_parameters,
)
from fedlora_app.config.writing import ExperimentText

CLIENT = {"id": "ann", "system_prompt": "Say: #1, 'yes' \"or\" no.", "local_train": "a b/ä: c.json"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7e9),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("models/1B/llama-3.2-3b/", 3e9),
        ("microsoft/phi-4", 7e9),  # which says nothing
    ],
)
def test_a_model_s_name_says_its_size(name, parameters):
    assert guess_parameters(name) == parameters


@pytest.mark.parametrize(
    ("parameters", "gpu"),
    list(itertools.product([1e6, 135e6, 0.5e9, 7e9], [None, 8 * GIB, 24 * GIB])),
)
def test_every_preset_is_a_configuration_and_reads_as_written(parameters, gpu):
    sizes = DataSizes([100], [80, 90, 300], longest_record=900, longest_answer=300)
    preset = build_preset(parameters, gpu, sizes)
    data = {"universal_train": "u.json", "universal_test": None}
    text = ExperimentText(
        "desk", ["Does it?", "It may."], "x/experiment.yaml", "some/model", "Why not", preset,
        [CLIENT], data,
    ).write()  # fmt: skip
    raw = yaml.safe_load(text)
    config = parse_config(raw)
    assert raw["federated"]["clients"] == [CLIENT] and raw["data"] == data
    assert config.training.max_seq_length == 512 and config.evaluation.max_new_tokens == 144
    assert config.model.name == "some/model"
    assert all(len(line) <= 100 for line in text.splitlines())


def test_few_records_are_gone_over_more_often():
    def epochs(num: int) -> int:
        return build_preset(135e6, None, DataSizes([num], [num])).training["local_epochs"]

    assert [epochs(num) for num in (4, 40, 4000)] == [12, 10, 2]


def test_the_learning_rate_falls_with_the_size():
    rates = [
        build_preset(parameters, None, DataSizes()).training["learning_rate"]
        for parameters in (1e6, 135e6, 0.5e9, 7e9)
    ]
    assert rates == [5e-3, 1e-3, 5e-4, 2e-4]


def test_a_base_model_for_the_device():
    assert "7B" in choose_model(24 * GIB, True).name
    assert "0.5B" in choose_model(4 * GIB, True).name
    assert "SmolLM2" in choose_model(None, True).name
    assert "0.5B" in choose_model(None, False).name  # the other one knows English only
    assert "no GPU" in choose_model(None, True).reason
