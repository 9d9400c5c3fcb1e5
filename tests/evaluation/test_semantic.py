"""Generated answers against candidates, by meaning."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fedlora_app.evaluation.semantic import POOLING_FILE, Embedder
from fedlora_app.model.base import ModelError

TEXTS = ["The fee is 5 euros.", "Five euros.", "No.", "The office opens at nine every morning."]


def embed(embedder, *texts):
    embedder.embed(texts, lambda done, total: None)
    return embedder


def pooling_folder(tiny_project, tmp_path, **modes):
    folder = shutil.copytree(tiny_project / "model", tmp_path / "embedder")
    (folder / POOLING_FILE).parent.mkdir()
    (folder / POOLING_FILE).write_text(json.dumps({"word_embedding_dimension": 32} | modes))
    return folder


def test_a_text_is_nearest_to_itself(tiny_project):
    embedder = embed(Embedder.load("model", tiny_project), *TEXTS)
    for text in TEXTS:
        own, *others = embedder.compare(text, [text, *(t for t in TEXTS if t != text)])
        assert own == pytest.approx(1.0, abs=1e-5) and all(-1 <= o < own for o in others)


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_neighbours_in_a_batch_change_nothing(tiny_project, tmp_path, mode):
    name = f"pooling_mode_{mode}_token" + ("s" if mode == "mean" else "")
    folder = pooling_folder(
        tiny_project, tmp_path, **{name: True, "pooling_mode_max_tokens": False}
    )
    together = embed(Embedder.load(str(folder), tiny_project), *TEXTS)
    alone = Embedder.load(str(folder), tiny_project)
    for text in TEXTS:
        embed(alone, text)
        torch.testing.assert_close(alone._known[text], together._known[text])
    hidden = alone.model(**alone.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    expected = hidden.mean(0) if mode == "mean" else hidden[0]
    torch.testing.assert_close(alone._known[TEXTS[0]], expected / expected.norm())


def test_what_is_known_is_not_embedded_again(tiny_project):
    embedder = embed(Embedder.load("model", tiny_project), *TEXTS)
    steps = []
    embedder.embed([*TEXTS, "Another one."], lambda *step: steps.append(step))
    assert steps == [(1, 1)]


def test_another_pooling_is_refused(tiny_project, tmp_path):
    folder = pooling_folder(tiny_project, tmp_path, pooling_mode_max_tokens=True)
    with pytest.raises(ModelError, match="pools by pooling_mode_max_tokens. Expected exactly one"):
        Embedder.load(str(folder), tiny_project)


def test_a_model_that_is_not_there_says_what_to_do(tiny_project):
    with pytest.raises(ModelError, match="hf download some/embedder"):
        Embedder.load("some/embedder", tiny_project)
