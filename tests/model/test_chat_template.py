from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from fedlora_app.config.schema import ModelConfig
from fedlora_app.data.dialogue import encode_answer, encode_prompt
from fedlora_app.model import base as model
from fedlora_app.model import chat_template
from fedlora_app.model.base import ModelError, build_empty_model, load_base_model, load_tokenizer
from fedlora_app.model.chat_template import MAX_TEMPLATE_CHARS, find_template_fault

SAY = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CONFIG = ModelConfig(name="model", quantization="none", dtype="float32")


@pytest.fixture
def project(tiny_project, tmp_path) -> Path:
    """A project of its own with the tiny model, to be tampered with."""
    shutil.copytree(tiny_project / "model", tmp_path / "model")
    return tmp_path


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages|length }}", "leaves out the question"),
        ("{% for", "fails with TemplateSyntaxError"),
        ("{{ raise_exception('not today') }}", "fails with TemplateError: not today"),
        ("{{ ''.__class__.__mro__ }}", "fails with SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "fails with SecurityError"),
        (SAY + "{{ range(10**9)|list }}", "fails with OverflowError"),
        (SAY + "{{ 'x' * 10**10 }}", "takes too much memory"),
        (SAY + "{{ 'x' * 10**6 }}", "makes 1000"),
        ("{" * 2 + "(" * 5000 + "1" + ")" * 5000 + "}}", "fails with RecursionError"),
        pytest.param(
            SAY + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "wrote no prompt within",
            marks=pytest.mark.slow,
        ),
        (SAY + "{#" + "x" * MAX_TEMPLATE_CHARS + "#}", f"at most {MAX_TEMPLATE_CHARS}"),
        ({"a": SAY}, "is an object and no text"),
    ],
    ids=range(12),
)
def test_templates_that_fail_or_have_no_end_are_refused(template, expected):
    started = time.monotonic()
    assert expected in find_template_fault(template, {})
    assert time.monotonic() - started < 60


def test_templates_of_usual_models_pass(tokenizer):
    assert find_template_fault(tokenizer.chat_template, tokenizer.special_tokens_map) is None
    assert find_template_fault(SAY, {"eos_token": "<|im_end|>"}) is None
    without_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert find_template_fault(without_system + SAY, {}) is None  # as Gemma's


def test_a_template_is_tried_once_per_process(tokenizer, monkeypatch):
    find_template_fault(SAY, {})
    monkeypatch.setattr(chat_template.subprocess, "run", None)
    assert find_template_fault(SAY, {}) is None


def test_a_model_with_a_bad_template_is_refused_before_anything_is_trained(project):
    (project / "model" / "chat_template.jinja").write_text("{{ messages|length }}")
    for load in (load_tokenizer, load_base_model):
        with pytest.raises(ModelError, match="The chat template of model leaves out the question"):
            load(CONFIG, project)


@pytest.mark.parametrize("stored", [[{"name": "default", "template": SAY}], {"default": SAY}])
def test_one_of_several_templates_is_the_default(project, stored):
    (project / "model" / "chat_template.jinja").unlink()
    change_json(project / "model" / "tokenizer_config.json", chat_template=stored)
    assert encode_prompt(load_tokenizer(CONFIG, project), "", "Ask?")


@pytest.mark.parametrize("stored", [5, [1], [{"name": "tool_use", "template": SAY}], {"x": SAY}])
def test_templates_of_another_form_are_refused(project, stored):
    (project / "model" / "chat_template.jinja").unlink()
    change_json(project / "model" / "tokenizer_config.json", chat_template=stored)
    with pytest.raises(ModelError, match="model"):
        load_tokenizer(CONFIG, project)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[-1].content }}", "leaves out or changes the system prompt"),
        ("{{ messages[0].content }}{{ messages[-1].content[:3] }}", "changes the question"),
        ("{{ messages[0].content }}{{ messages[1].content }}", "changes the answer"),
        ("{{ raise_exception(messages[0].content) }}", r"cannot write a prompt \(TemplateError\)"),
        ("{{ messages.nothing.there }}", r"cannot write a prompt \(UndefinedError\)"),
    ],
)
def test_prompts_are_looked_at_one_by_one_and_not_quoted(tokenizer, template, expected):
    kept = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        with pytest.raises(ModelError, match=expected) as caught:
            encode_answer(tokenizer, "A secret system.", "A secret question?", "A secret answer.")
        assert "secret" not in str(caught.value)  # an error reply travels to the server
    finally:
        tokenizer.chat_template = kept


class TestRemoteCode:
    @pytest.fixture(autouse=True)
    def _nobody_is_asked(self, monkeypatch):
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks"))

    @pytest.fixture
    def mark(self, project) -> Path:
        """A file that the model's own code would leave behind."""
        mark = project / "ran"
        code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        for name in ("configuration_own", "modeling_own", "tokenization_own"):
            (project / "model" / f"{name}.py").write_text(code)
        return mark

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("load", [load_tokenizer, load_base_model, build_empty_model])
    def test_code_that_comes_with_a_model(self, project, mark, known, load):
        path = project / "model" / "config.json"
        classes = {"AutoConfig": "configuration_own.X", "AutoModelForCausalLM": "modeling_own.Y"}
        kind = "qwen2" if known else "own"
        change_json(path, auto_map=classes, model_type=kind)
        with pytest.raises(ModelError, match=r'config\.json .*"auto_map".*trust_remote_code: true'):
            load(CONFIG, project)
        assert not mark.exists()

    @pytest.mark.parametrize("stored", [["tokenization_own.X", None], {"AutoTokenizer": []}, 5])
    def test_code_that_comes_with_a_tokenizer(self, project, mark, stored):
        change_json(project / "model" / "tokenizer_config.json", auto_map=stored)
        for load in (load_tokenizer, load_base_model):
            with pytest.raises(ModelError, match=r'tokenizer_config\.json .*"auto_map"'):
                load(CONFIG, project)
        assert not mark.exists()

    def test_an_adapter_in_the_models_folder(self, project):
        path = project / "model" / "adapter_config.json"
        path.write_text('{"base_model_name_or_path": "somebody/else"}')
        with pytest.raises(ModelError, match=r"adapter_config\.json makes an adapter of the base"):
            load_base_model(CONFIG, project)


DAMAGED = [b"", b"[]", b"5", b"{}", b"\xff", b"[" * 100_000, b'{"a": 1}']


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize(
    "content",
    [DAMAGED[0], DAMAGED[-1], *(pytest.param(c, marks=pytest.mark.slow) for c in DAMAGED[1:-1])],
)
def test_damaged_model_files_are_named(project, name, content):
    model._resident.clear()
    (project / "model" / name).write_bytes(content)
    try:
        load_base_model(CONFIG, project)
    except ModelError as error:
        assert "model" in str(error)
    else:
        assert name == "tokenizer_config.json"  # transformers can do without
