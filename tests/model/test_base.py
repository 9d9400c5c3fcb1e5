from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_tiny_config, build_tiny_model
from loopback import Federation
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from fedlora_app.config.schema import GLOBAL, LOCAL, ModelConfig, TrainingConfig
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.generation import generate
from fedlora_app.foundation.files import hash_file, lock_folder, write_json
from fedlora_app.model import base as model_module
from fedlora_app.model import fingerprint
from fedlora_app.model import kept_hashes as kept
from fedlora_app.model import quantised_cache as quantised_copy
from fedlora_app.model.adapters import (
    activate,
    adapter_parameters,
    attach_adapters,
    get_state,
    set_state,
    state_shapes,
)
from fedlora_app.model.base import (
    ModelError,
    build_empty_model,
    compute_fingerprint,
    find_decoder,
    load_base_model,
    load_tokenizer,
    load_unquantised_model,
)
from fedlora_app.model.host_embedding import HostEmbedding
from fedlora_app.model.kept_hashes import CACHE_VARIABLE
from fedlora_app.model.quantised_cache import CONTENTS_FILE
from fedlora_app.training.phase import train_phase


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(name="model", quantization="none", dtype="float32")


def test_the_base_is_loaded_once_and_frozen(config, tiny_project):
    model_module._resident.clear()
    loads = model_module.num_loads
    first, second = load_base_model(config, tiny_project), load_base_model(config, tiny_project)
    assert first is second and model_module.num_loads == loads + 1
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


def test_a_model_that_a_card_cannot_hold_is_said_to_be_too_large(config, tiny_project, monkeypatch):
    def overflow(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 MiB")

    monkeypatch.setattr(Qwen2ForCausalLM, "__init__", overflow)
    with pytest.raises(ModelError, match=r"does not fit into .* Set model\.quantization: 4bit"):
        model_module._load(config, tiny_project)


def test_the_dtype_is_what_the_configuration_says(config, tiny_project):
    bf16 = config.model_copy(update={"dtype": "bfloat16"})
    assert load_base_model(bf16, tiny_project).model.dtype == torch.bfloat16
    assert load_base_model(config, tiny_project).model.dtype == torch.float32


def test_the_servers_model_has_shapes_and_no_weights(config, tiny_project):
    empty = build_empty_model(config, tiny_project)
    real = load_base_model(config, tiny_project).model
    shapes = {name: p.shape for name, p in real.named_parameters()}
    assert shapes.items() >= {name: p.shape for name, p in empty.named_parameters()}.items()
    assert all(p.device.type == "meta" for p in empty.parameters())


def test_a_folder_without_weights_is_named(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(config, tmp_path)


def test_pickled_weights_are_not_opened(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base_model(config, tmp_path)


def test_a_base_without_a_chat_template_is_refused(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(config, tmp_path)


FINGERPRINTED = {
    "weights": "model.safetensors",
    "configuration": "config.json",
    "tokenizer": "tokenizer.json",
    "its settings": "tokenizer_config.json",
    "template": "chat_template.jinja",
}


def flip_middle(path: Path) -> None:
    """Change one bit and leave the size as it is."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def kept_hashes(tmp_path, monkeypatch) -> Path:
    """Where hashes of files are kept, also of small ones."""
    monkeypatch.setattr(kept, "KEPT_FROM_BYTES", 0)
    monkeypatch.setattr(fingerprint, "SAID_FROM_BYTES", 1)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


class TestFingerprint:
    @pytest.mark.parametrize("part", FINGERPRINTED)
    def test_a_bit_in_the_middle_of_a_file_makes_another(
        self, config, tiny_project, tmp_path, part
    ):
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        assert compute_fingerprint(config, tmp_path) == compute_fingerprint(config, tiny_project)
        flip_middle(tmp_path / "model" / FINGERPRINTED[part])
        assert compute_fingerprint(config, tmp_path) != compute_fingerprint(config, tiny_project)

    def test_what_a_download_may_lack_is_no_difference(self, config, tiny_project, tmp_path):
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        for name in ("README.md", "generation_config.json", "vocab.json", "merges.txt"):
            (tmp_path / "model" / name).write_text("{}")
        assert compute_fingerprint(config, tmp_path) == compute_fingerprint(config, tiny_project)

    def test_a_vocabulary_counts_where_it_is_the_tokenizer(self, tmp_path):
        (tmp_path / "vocab.json").write_text("{}")
        before = fingerprint.fingerprint_model(tmp_path)
        (tmp_path / "vocab.json").write_text("[]")
        assert fingerprint.fingerprint_model(tmp_path) != before

    def test_weights_are_read_once_and_again_when_they_changed(
        self, config, tiny_project, tmp_path, kept_hashes, monkeypatch, capsys
    ):
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        read = []
        monkeypatch.setattr(kept, "hash_file", lambda p: read.append(p) or hash_file(p))

        def compute_in_a_new_process() -> str:
            kept._hash_once.cache_clear()
            return compute_fingerprint(config, tmp_path)

        first = compute_in_a_new_process()
        assert weights in read and "GB of weights in" in capsys.readouterr().err
        read.clear()
        assert compute_in_a_new_process() == first and not read
        assert not capsys.readouterr().err
        times = weights.stat()
        flip_middle(weights)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert compute_in_a_new_process() != first and read == [weights]

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"sha256": 1}'])
    def test_damaged_notes_are_made_anew(
        self, config, tiny_project, kept_hashes, content, monkeypatch
    ):
        first = compute_fingerprint(config, tiny_project)
        assert list(kept_hashes.iterdir())
        for path in kept_hashes.iterdir():
            path.write_bytes(content)
        assert compute_fingerprint(config, tiny_project) == first
        assert all(json.loads(path.read_text())["sha256"] for path in kept_hashes.iterdir())

    def test_no_place_for_notes_is_no_error(
        self, config, tiny_project, kept_hashes, tmp_path, capsys
    ):
        expected = compute_fingerprint(config, tiny_project)
        shutil.rmtree(kept_hashes.parent)
        kept_hashes.parent.write_text("a file")
        assert compute_fingerprint(config, tiny_project) == expected
        assert "could not be kept in" in capsys.readouterr().err

    def test_an_unreadable_model_is_a_named_error(self, config, tiny_project, tmp_path):
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        (tmp_path / "model" / "second.safetensors").symlink_to("nowhere")
        with pytest.raises(ModelError, match="second.safetensors cannot be read"):
            compute_fingerprint(config, tmp_path)


def test_a_model_without_a_decoder_of_its_own_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    bare = Qwen2Model(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(ModelError, match="Qwen2Model, has no decoder apart from its output"):
        find_decoder(bare)


def test_a_models_own_sampling_settings_do_not_reach_the_evaluation(config, tiny_project, tmp_path):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    settings = GenerationConfig(do_sample=True, repetition_penalty=1.5, no_repeat_ngram_size=2)
    settings.save_pretrained(tmp_path / "model")
    model = load_base_model(config, tmp_path).model
    plain = load_base_model(config, tiny_project).model
    ids = torch.arange(3, 20).unsqueeze(0)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0)
    outputs = [m.generate(ids, generation_config=greedy) for m in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_what_a_model_ships_as_the_end_of_an_answer_ends_it(
    config, tiny_project, tmp_path, adapters_config, tokenizer, quantization, monkeypatch
):
    """As Phi's <|end|>, which neither the template nor the tokenizer calls the end."""
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    config = config.model_copy(update={"quantization": quantization})

    def answer():
        model_module._resident.clear()
        adapted = attach_adapters(load_base_model(config, tmp_path).model, adapters_config)
        ids = encode_prompt(tokenizer, "", "Ask?")
        return generate(adapted, tokenizer, [ids], [tokenizer.eos_token_id], 8)[0]

    whole = answer()
    second = tokenizer(whole, add_special_tokens=False)["input_ids"][1]
    GenerationConfig(eos_token_id=[second, 5]).save_pretrained(tmp_path / "model")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))  # not the copy made above
    cut = answer()
    assert whole.startswith(cut) and len(tokenizer(cut)["input_ids"]) <= 2 < len(whole)
    assert answer() == cut  # from the 4-bit copy, where there is one


@pytest.mark.parametrize("ends", ["x", [3, None], 1.5])
def test_an_end_that_is_no_token_is_refused(config, tiny_project, tmp_path, ends):
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ends}))
    for load in (load_base_model, partial(load_unquantised_model, dtype=torch.float32)):
        with pytest.raises(ModelError, match=r"generation_config\.json has eos_token_id"):
            load(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "weight_dtype"),
    [
        ({"quantization": "4bit", "dtype": "float32"}, torch.uint8),
        ({"quantization": "4bit", "dtype": "bfloat16"}, torch.uint8),
        ({"quantization": "none", "dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_fp32_adapters_learn_over_nf4_and_bf16_weights(
    config, tiny_project, adapters_config, changes, weight_dtype
):
    """The 4-bit path needs no GPU to be tested: bitsandbytes runs NF4 on the CPU."""
    config = config.model_copy(update=changes)
    load_base_model(config, tiny_project)
    model_module._resident.clear()
    loaded = load_base_model(config, tiny_project)  # with 4-bit a copy from the disk
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert (type(layer).__name__ == "Linear4bit") == (changes["quantization"] == "4bit")
    assert layer.weight.dtype == weight_dtype
    model = attach_adapters(loaded.model, adapters_config)
    before = get_state(model, GLOBAL)
    result = train_phase(
        model,
        [Example(list(range(3, 20)), 9), Example(list(range(30, 60)), 12)],
        TrainingConfig(learning_rate=1e-2, batch_size=2, gradient_accumulation_steps=1),
        active=(GLOBAL, LOCAL),
        trainable=(GLOBAL, LOCAL),
        num_steps=20,
        run_span=(0.0, 1.0),
        weight_decays={GLOBAL: 0.0, LOCAL: 0.0},
        seed=1,
    )
    assert {p.dtype for p in adapter_parameters(model, GLOBAL)} == {torch.float32}
    assert result.final_train_loss < 0.9 * result.train_loss
    assert any(not torch.equal(before[key], t) for key, t in get_state(model, GLOBAL).items())
    model_module._resident.clear()


IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture
def quantised(config) -> ModelConfig:
    return config.model_copy(update={"quantization": "4bit"})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    yield tmp_path / "cache" / "quantised"
    model_module._resident.clear()


@pytest.fixture
def sources(monkeypatch) -> list[str]:
    """Where weights were read from."""
    read, seen = AutoModelForCausalLM.from_pretrained, []

    def record(source, *args, **kwargs):
        seen.append(source)
        return read(source, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    return seen


def load_anew(config: ModelConfig, root: Path):
    """Load as another process would."""
    model_module._resident.clear()
    return load_base_model(config, root)


class TestOneModelInMemory:
    """Models refer to themselves, so that only a collection frees them."""

    @pytest.fixture(autouse=True)
    def _no_chance(self):
        gc.disable()
        yield
        gc.enable()

    def test_what_a_failed_load_left_goes_before_the_next(self, config, tiny_project, monkeypatch):
        left = []

        def fail(*args):
            part = build_tiny_model(100)
            part.forward = part.forward  # a bound method: it refers to itself
            left.append(weakref.ref(part))
            raise ModelError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(model_module, "_load", fail)
            with pytest.raises(ModelError, match="no memory"):
                load_anew(config, tiny_project)
        assert left[0]() is not None
        load_anew(config, tiny_project)
        assert left[0]() is None

    def test_so_does_an_unquantised_one_that_nobody_holds(self, config, tiny_project):
        model_module._resident.clear()
        model = load_unquantised_model(config, tiny_project, torch.float32)
        model.forward = model.forward
        left = weakref.ref(model)
        del model
        assert left() is not None
        load_unquantised_model(config, tiny_project, torch.float32)
        assert left() is None


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []


def assert_equal_bits(first, second) -> None:
    ours, theirs = first.state_dict(), second.state_dict()  # with bitsandbytes' own constants
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    with torch.no_grad():
        assert torch.equal(*(m(IDS.to(m.device)).logits for m in (first, second)))


class TestQuantisedCopy:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_the_second_start_reads_the_same_bits_from_it(
        self, quantised, cache, sources, tmp_path, tiny_project, dtype, tied
    ):
        config = quantised.model_copy(update={"dtype": dtype})
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        sizes = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": tied}
        build_tiny_model(1000, **sizes).save_pretrained(tmp_path / "model")
        loads = model_module.num_loads
        first, second = load_anew(config, tmp_path), load_anew(config, tmp_path)
        (copy,) = copies(cache)
        assert sources == [str(tmp_path / "model"), str(copy)]
        assert model_module.num_loads == loads + 2
        assert first.fingerprint == second.fingerprint
        assert_equal_bits(first.model, second.model)
        for name in ("dtype", "name_or_path", "architectures", "tie_word_embeddings"):
            assert getattr(first.model.config, name) == getattr(second.model.config, name)
        assert first.model.name_or_path == second.model.name_or_path
        assert not any(p.requires_grad for p in second.model.parameters())

    def test_only_the_owner_can_read_it_and_nothing_is_pickled(
        self, quantised, cache, tiny_project, capsys
    ):
        umask = os.umask(0o022)
        load_anew(quantised, tiny_project)
        os.umask(umask)
        (copy,) = copies(cache)
        assert {path.stat().st_mode & 0o077 for path in (cache, copy, *copy.iterdir())} == {0}
        assert {path.suffix for path in copy.iterdir()} == {".json", ".safetensors"}
        shown = capsys.readouterr()
        assert f"kept in {copy} (0.00 GB)" in shown.err and not shown.out

    def test_what_changes_the_bits_has_another_copy(
        self, quantised, cache, tmp_path, tiny_project, monkeypatch
    ):
        load_anew(quantised, tiny_project)
        load_anew(quantised.model_copy(update={"dtype": "bfloat16"}), tiny_project)
        assert len(copies(cache)) == 2
        shutil.copytree(tiny_project / "model", tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        load_anew(quantised, tmp_path)
        assert len(copies(cache)) == 3
        monkeypatch.setattr(model_module, "version", lambda name: "0.1")
        load_anew(quantised, tiny_project)
        assert len(copies(cache)) == 4

    @pytest.mark.parametrize("changes", [{"cache_quantized": False}, {"trust_remote_code": True}])
    def test_none_where_none_is_wanted(self, quantised, cache, tiny_project, changes):
        load_anew(quantised.model_copy(update=changes), tiny_project)
        assert not cache.exists()

    @pytest.mark.parametrize(
        "damage",
        [
            *("flipped", "extra"),
            *(pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "weights", "foreign")),
            *(
                pytest.param(name, marks=pytest.mark.slow)
                for name in ("contents", "garbled", "empty")
            ),
        ],
    )
    def test_a_damaged_one_is_named_and_made_anew(
        self, quantised, cache, sources, tiny_project, capsys, damage
    ):
        fresh = load_anew(quantised, tiny_project)
        (copy,) = copies(cache)
        weights, contents = copy / "model.safetensors", copy / CONTENTS_FILE
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        match damage:
            case "flipped":
                weights.write_bytes(content)
            case "cut":
                weights.write_bytes(content[:-100])
            case "weights":
                weights.unlink()
            case "contents":
                contents.unlink()
            case "foreign":
                contents.write_text("[1, 2]")
            case "extra":
                (copy / "adapter_config.json").write_text("{}")
            case "garbled":
                contents.write_bytes(b"\xff")
            case "empty":
                shutil.rmtree(copy)
                copy.mkdir()
        capsys.readouterr()
        again = load_anew(quantised, tiny_project)
        err = capsys.readouterr().err
        assert err.count(f"{copy} is rebuilt: ") == 1 and "kept in" in err
        assert str(copy) not in sources
        assert_equal_bits(fresh.model, again.model)
        load_anew(quantised, tiny_project)
        assert sources[-1] == str(copy)

    def test_its_large_files_are_read_once_per_machine(
        self, quantised, cache, sources, tiny_project, monkeypatch
    ):
        monkeypatch.setattr(kept, "KEPT_FROM_BYTES", 1)
        load_anew(quantised, tiny_project)
        (copy,) = copies(cache)
        weights, read = copy / "model.safetensors", []
        monkeypatch.setattr(kept, "hash_file", lambda p: read.append(p) or hash_file(p))

        def load_in_a_new_process() -> bool:
            kept._hash_once.cache_clear()
            read.clear()
            load_anew(quantised, tiny_project)
            return weights in read

        assert load_in_a_new_process() and not load_in_a_new_process()
        os.utime(weights)
        assert load_in_a_new_process()
        assert sources[-3:] == [str(copy)] * 3

    def test_one_of_other_tensors_is_not_filled_up_with_random_ones(
        self, quantised, cache, tiny_project, capsys
    ):
        """As a version would leave it that writes a kind of model and cannot read it back."""
        fresh = load_anew(quantised, tiny_project)
        (copy,) = copies(cache)
        tensors = load_file(copy / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        write_json(
            copy / CONTENTS_FILE,
            {p.name: hash_file(p) for p in copy.iterdir() if p.name != CONTENTS_FILE},
        )
        again = load_anew(quantised, tiny_project)
        assert "cannot be used: its tensors are not the model's" in capsys.readouterr().err
        assert_equal_bits(fresh.model, again.model)

    def test_a_full_disk_a_closed_folder_and_a_second_writer_stop_nothing(
        self, quantised, cache, tiny_project, capsys, monkeypatch
    ):
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tiny_project)._replace(free=quantised_copy.SPARE_DISK_BYTES)
            patch.setattr(quantised_copy.shutil, "disk_usage", lambda path: usage)
            load_anew(quantised, tiny_project)
        assert "and the disk has 0.00 GB" in capsys.readouterr().err
        with lock_folder(cache):
            load_anew(quantised, tiny_project)
        assert "another process is writing there" in capsys.readouterr().err
        assert not copies(cache)
        monkeypatch.setenv(CACHE_VARIABLE, str(tiny_project / "pyproject.toml"))  # no folder
        load_anew(quantised, tiny_project)
        assert "Note: no copy of the quantised base model was left" in capsys.readouterr().err

    def test_a_writer_that_fails_or_was_killed_leaves_nothing_for_good(
        self, quantised, cache, tiny_project, capsys, monkeypatch
    ):
        (cache / ".0.1.partial").mkdir(parents=True)
        with monkeypatch.context() as patch:

            def fail(*_args, **_settings):
                raise OSError(28, "No space left on device")

            patch.setattr(quantised_copy, "_hash_all", fail)
            load_anew(quantised, tiny_project)
        assert "No space left on device" in capsys.readouterr().err
        assert not copies(cache)
        load_anew(quantised, tiny_project)
        assert len(copies(cache)) == 1

    def test_a_full_gpu_is_no_damage(self, quantised, cache, tiny_project, capsys, monkeypatch):
        load_anew(quantised, tiny_project)

        def fail(*_args, **_kwargs):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(ModelError, match="does not fit into the memory of"):
            load_anew(quantised, tiny_project)
        assert "cannot be used: out of memory" in capsys.readouterr().err
        assert len(copies(cache)) == 1

    def test_two_processes_do_not_harm_each_other(self, quantised, cache, tiny_project, sources):
        """Each in the other's way: the first takes the place while the second still quantises."""
        fresh = load_anew(quantised, tiny_project)
        (copy,) = copies(cache)
        before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
        quantised_copy.QuantisedCopy(copy).save(fresh.model)
        assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
        assert_equal_bits(load_anew(quantised, tiny_project).model, fresh.model)
        assert sources[-1] == str(copy)


@pytest.fixture
def untied(tiny_project, tokenizer, tmp_path) -> Path:
    """A project whose model has an output layer of its own."""
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    model = build_tiny_model(len(tokenizer), tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    return tmp_path


class TestEmbeddingInHostMemory:
    @pytest.mark.parametrize("quantization", ["none", "4bit"])
    def test_the_model_answers_the_same_and_so_do_its_adapters(
        self, config, untied, cache, adapters_config, quantization
    ):
        config = config.model_copy(update={"quantization": quantization})
        plain = load_anew(config, untied).model
        hosted = load_anew(config.model_copy(update={"embedding_device": "cpu"}), untied).model
        embedding = hosted.get_input_embeddings()
        assert isinstance(embedding, HostEmbedding)
        assert torch.equal(embedding.weight, plain.get_input_embeddings().weight.cpu())
        assert not any(parameter is embedding.weight for parameter in hosted.parameters())
        assert hosted.device == plain.device
        greedy = GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=0)
        ids = IDS.to(plain.device)
        answers = [m.generate(ids, generation_config=greedy) for m in (plain, hosted)]
        assert torch.equal(*answers)
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, hosted(ids).logits)
        models = [attach_adapters(m, adapters_config) for m in (plain, hosted)]
        shapes = state_shapes(models[0], GLOBAL)
        assert state_shapes(models[1], GLOBAL) == shapes
        generator = torch.Generator().manual_seed(1)
        state = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
        logits, gradients = [], []
        for model in models:
            set_state(model, GLOBAL, state)
            activate(model, (GLOBAL,), (GLOBAL,))
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            logits.append(model.train()(ids, use_cache=False).logits)
            logits[-1].square().mean().backward()
            gradients.append([p.grad for p in adapter_parameters(model, GLOBAL)])
        assert torch.equal(*logits)
        assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])

    def test_rows_go_to_the_layers_and_the_weight_stays(self):
        weight = torch.randn(10, 4)
        module = HostEmbedding(weight, torch.device("meta"))
        rows = module(torch.tensor([[1, 2, 3]]))
        assert rows.device.type == "meta" and rows.shape == (1, 3, 4)
        assert module.to("meta").weight.device.type == "cpu"
        assert not module.state_dict() and not list(module.parameters())

    @pytest.mark.gpu
    def test_on_a_gpu_it_takes_no_memory_there(self, config, untied):
        taken = []
        for place in ("auto", "cpu"):
            loaded = None
            model_module._resident.clear()
            gc.collect()
            before = torch.cuda.memory_allocated()
            loaded = load_anew(config.model_copy(update={"embedding_device": place}), untied)
            taken.append(torch.cuda.memory_allocated() - before)
        assert taken[0] - taken[1] >= 0.9 * loaded.model.get_input_embeddings().weight.nbytes

    def test_shared_weights_are_refused(self, config, tiny_project):
        config = config.model_copy(update={"embedding_device": "cpu"})
        with pytest.raises(ModelError, match="the output layer has the same weights"):
            load_anew(config, tiny_project)

    def test_an_embedding_that_also_scales_is_refused(self, config, untied, monkeypatch):
        class Scaled(torch.nn.Embedding):
            pass

        model = build_tiny_model(100, tie_word_embeddings=False)
        model.set_input_embeddings(Scaled(100, 32))
        monkeypatch.setattr(model_module, "from_pretrained", lambda *args, **kwargs: model)
        with pytest.raises(ModelError, match="its Scaled does more than look rows up"):
            model_module._load(config.model_copy(update={"embedding_device": "cpu"}), untied)

    def test_the_client_says_so_before_it_loads(self, tiny_project, tmp_path):
        config = build_tiny_config(model={"embedding_device": "cpu"})
        model_module._resident.clear()
        loads = model_module.num_loads
        with pytest.raises(Exception, match=r"model\.embedding_device: cpu is impossible"):
            Federation(tiny_project, tmp_path / "results", config).run()
        assert model_module.num_loads == loads


@pytest.mark.slow
def test_a_model_in_the_hubs_cache_loads_at_once_without_a_network(tiny_project, tmp_path):
    commit = "0" * 40
    folder = tmp_path / "hub" / "models--someone--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_project / "model", folder / "snapshots" / commit)
    code = (
        "from pathlib import Path\n"
        "from fedlora_app.config.schema import ModelConfig\n"
        "from fedlora_app.model.base import load_base_model\n"
        "config = ModelConfig(name='someone/small', quantization='none', dtype='float32')\n"
        "print(load_base_model(config, Path('.')).fingerprint)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9"}  # where nothing answers
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout) > 9, done.stderr
    assert "Retry" not in done.stderr
