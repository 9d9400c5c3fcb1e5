"""Generated answers against candidates, by meaning."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora_app.evaluation.semantic import MODULES_FILE, Embedder
from fedlora_app.model.base import ModelError

TEXTS = ["The fee is 5 euros.", "Five euros.", "No.", "The office opens at nine every morning."]
POOLING_FILE = "1_Pooling/config.json"


@pytest.fixture
def folder(tiny_project, embedder_name, tmp_path):
    return shutil.copytree(tiny_project / embedder_name, tmp_path / "embedder")


def load(folder) -> Embedder:
    return Embedder.load(str(folder), folder)


def embed(embedder, *texts) -> Embedder:
    embedder.embed(texts)
    return embedder


def test_a_text_is_nearest_to_itself(folder):
    embedder = embed(load(folder), *TEXTS)
    for text in TEXTS:
        own, *others = embedder.compare(text, [text, *(t for t in TEXTS if t != text)])
        assert own == pytest.approx(1.0, abs=1e-5) and all(-1 <= o < own for o in others)


def test_an_empty_answer_means_nothing(folder):
    embedder = embed(load(folder), *TEXTS, "")
    assert embedder.compare("", TEXTS[:2]) == (-1.0, -1.0)


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_neighbours_in_a_batch_change_nothing(folder, mode):
    (folder / POOLING_FILE).write_text(json.dumps({f"pooling_mode_{mode}": True}))
    together = embed(load(folder), *TEXTS)
    alone = load(folder)
    for text in TEXTS:
        embed(alone, text)
        torch.testing.assert_close(alone._known[text], together._known[text])
    hidden = alone.model(**alone.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    expected = hidden.mean(0) if mode == "mean_tokens" else hidden[0]
    torch.testing.assert_close(alone._known[TEXTS[0]], expected / expected.norm())


def test_what_is_known_is_not_embedded_again(folder):
    embedder = embed(load(folder), *TEXTS)
    steps = []
    embedder.embed([*TEXTS, "Another one."], lambda *step: steps.append(step))
    assert steps == [(1, 1)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (POOLING_FILE, None, "1_Pooling/config.json cannot be read"),
        (POOLING_FILE, b"{", "1_Pooling/config.json cannot be read"),
        (POOLING_FILE, b"\xff", "1_Pooling/config.json cannot be read"),
        (POOLING_FILE, b"[1]", "pools by nothing"),
        (POOLING_FILE, b'{"pooling_mode_max_tokens": true}', "pools by pooling_mode_max_tokens"),
        (POOLING_FILE, b'{"pooling_mode_cls_token": "false"}', "pools by pooling_mode_cls_token"),
        (MODULES_FILE, None, "modules.json cannot be read"),
        (MODULES_FILE, b"{}", "is not a list of modules"),
        (MODULES_FILE, b"[]", "consists of nothing"),
        (
            MODULES_FILE,
            b'[{"type": "a.Pooling", "path": "p"}, {"type": "a.Dense", "path": "d"}]',
            "consists of Pooling, Dense. Expected no other parts",
        ),
        (
            MODULES_FILE,
            b'[{"type": "a.Transformer", "path": "0_T"}, {"type": "a.Pooling", "path": "p"}]',
            "has its transformer in 0_T",
        ),
        ("tokenizer.json", b"{", "--semantic: The model in"),
        ("tokenizer.json", None, "--semantic|embeds no text"),
    ],
)
def test_other_models_are_refused(folder, name, content, expected):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        load(folder)


def test_a_model_without_some_of_its_weights_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "q_proj.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks the weights .*q_proj.weight"):
        load(folder)


@pytest.mark.parametrize("name", ["", "some/embedder"])
def test_a_model_that_is_not_there_says_what_to_do(folder, name):
    expected = "hf download some/embedder.*without one, name a local" if name else "names no model"
    with pytest.raises(ModelError, match=expected):
        Embedder.load(name, folder)
