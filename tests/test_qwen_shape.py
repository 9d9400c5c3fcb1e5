"""The configuration for one 24 GB card, from training to export, on a CPU.

The base has the widths of Qwen2.5-7B and two of its 28 layers, 2.9 GB of random bfloat16 weights,
and the demo's tokenizer.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from conftest import DEMO_MODEL, ROOT
from flower_process import BIN, Flower
from peft import PeftConfig
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM

CONFIG = "conf/qwen2.5-7b-4090.yaml"
CHANGES = "training.max_steps=1 training.optimizer=adamw evaluation.interval=0"
WIDTHS = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@pytest.fixture
def base(tmp_path):
    config = Qwen2Config(**WIDTHS, num_hidden_layers=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.fill_(1.0) if "norm" in name else tensor.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "base")
    for file in (*DEMO_MODEL.glob("*token*"), *DEMO_MODEL.glob("*.jinja")):
        shutil.copy(file, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.minutes
def test_the_7b_configuration_goes_from_training_to_export(base, tmp_path):
    flower = Flower(tmp_path / "flower")
    flower.env["FEDLORA_CACHE"] = str(tmp_path / "cache")
    changes = f"{CHANGES} model.name={base} model.quantization=4bit model.dtype=bfloat16"

    def fedlora(*arguments: str) -> str:
        command = [BIN / "fedlora", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=flower.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        place = ("--output-dir", str(tmp_path), "--name", "run")
        fedlora("train", CONFIG, "--rounds", "1", "--overrides", changes, *place)
    finally:
        flower.stop()
    run = tmp_path / "run"
    client = json.loads((run / "config.json").read_text())["federated"]["clients"][0]["id"]
    history = (run / "history.csv").read_text()
    assert f"1,{client},local,train_local/train_loss," in history
    fedlora("export", str(run), "--client", client, "--output", str(tmp_path / "out"))
    assert PeftConfig.from_pretrained(tmp_path / "out" / "pair").r == 32
    with safe_open(tmp_path / "out" / "pair" / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert len(shapes) == 2 * 7 * 2 and [32, 18_944] in shapes
