from __future__ import annotations

from copy import deepcopy

import pytest

from fedlora_app.data.dialogue import (
    encode_answer,
    encode_prompt,
    encode_with_answers,
    find_prompt_frame,
    find_template,
    knows_system_prompts,
    pin_date,
    render_prompt,
    write_served_template,
)
from fedlora_app.data.records import DataError, Record
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation.decoding import decode
from fedlora_app.model.base import ModelError

RECORD = Record("How much is a passport?", "The fee for a passport is 30 dollars.")


def test_the_prompt_is_not_learnt_and_the_answer_is(tokenizer):
    example = encode_example(tokenizer, "You help.", RECORD)
    prompt = tokenizer.decode(example.input_ids[: example.answer_start])
    answer = tokenizer.decode(example.input_ids[example.answer_start :])
    assert prompt == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n"
        "How much is a passport?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == "The fee for a passport is 30 dollars.<|im_end|>"
    assert example.num_answer_tokens == len(example.input_ids) - example.answer_start


def test_prompt_and_answer_join_to_the_templates_own_text(tokenizer):
    ids = encode_prompt(tokenizer, "", "Ask?") + encode_answer(tokenizer, "", "Ask?", "Answer.")
    messages = [
        {"role": "user", "content": "Ask?"},
        {"role": "assistant", "content": "Answer."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == text.rstrip("\n")


def test_a_template_that_hides_where_the_answer_begins_is_refused(tokenizer):
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages|length }}{{ messages[0].content }}"
    try:
        with pytest.raises(ModelError, match="does not continue its generation prompt"):
            encode_answer(tokenizer, "", "Ask?", "Answer.")
    finally:
        tokenizer.chat_template = template


TURNS = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}ANSWERED{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
PROMPT{% endif %}"""
EMPTY = "<think>\n\n</think>\n\n"
QUIET = f"{{% if enable_thinking is defined and not enable_thinking %}}{EMPTY}{{% endif %}}"
REASONING = [
    (EMPTY, QUIET, EMPTY),  # Qwen3
    (EMPTY, "", EMPTY),  # the same without a switch
    (EMPTY, "<think>\n", EMPTY),
    ("", "<think>\n", ""),  # DeepSeek-R1
    ("", EMPTY, ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("answered", "prompt", "kept"), REASONING)
@pytest.mark.parametrize("system", ["", "You run the harbour desk."])
def test_no_thoughts_are_a_part_of_the_answer(
    tokenizer, monkeypatch, answered, prompt, kept, system
):
    template = TURNS.replace("ANSWERED", answered).replace("PROMPT", prompt)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert tokenizer.decode(encode_answer(tokenizer, system, "When?", "At noon.")) == (
        "At noon.<|im_end|>"
    )
    text = tokenizer.decode(encode_prompt(tokenizer, system, "When?"))
    assert text.endswith(f"When?<|im_end|>\n<|im_start|>assistant\n{kept}")


@pytest.mark.parametrize(("answered", "prompt", "kept"), REASONING)
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("\n{{ strftime_now('%d %b') }}\n", " \n")]
)
def test_a_served_template_writes_the_same_prompts_by_itself(
    tokenizer, answered, prompt, kept, before, after
):
    own = deepcopy(tokenizer)
    template = TURNS.replace("ANSWERED", answered).replace("PROMPT", prompt)
    own.chat_template = before + template + after
    pin_date(own, "2020-02-29")
    served, system = deepcopy(tokenizer), {"role": "system", "content": "You help."}
    served.chat_template = write_served_template(own)
    if answered == prompt == before == "":
        assert served.chat_template == template
    messages = [system, {"role": "user", "content": "When?"}]
    written = served.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == render_prompt(own, "You help.", "When?")
    assert ("29 Feb" in written) == bool(before)
    messages += [{"role": "assistant", "content": "At noon."}, {"role": "user", "content": "Why?"}]
    written = served.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == render_prompt(own, "You help.", "Why?", [("When?", "At noon.")])
    whole = served.apply_chat_template(messages[:3], tokenize=False)
    template = find_template(own)
    settings = {"chat_template": template, "enable_thinking": False}
    assert whole == own.apply_chat_template(messages[:3], tokenize=False, **settings)


LAST_TURN = """\
{% if messages[0].role == 'system' %}{% set told = messages[0].content + '\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last %}{{ told }}{% endif %}
{{- m.content }}[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("system", ["", "You run the harbour desk."])
def test_a_system_prompt_that_only_the_last_turn_has(tokenizer, monkeypatch, system):
    """As Mistral's templates have it: training and asking have the same prompt all the same."""
    monkeypatch.setattr(tokenizer, "chat_template", LAST_TURN)
    example = encode_example(tokenizer, system, Record("When?", "At noon."))
    text = tokenizer.decode(example.input_ids)
    assert system in text and text.endswith("When?[/INST] At noon.<|im_end|>")
    prompt_ids = encode_prompt(tokenizer, system, "When?")
    assert list(example.input_ids[: example.answer_start]) == prompt_ids


def test_an_answer_without_a_mark_gets_the_end_token(tokenizer, monkeypatch):
    """As GLM-4's template has it, where the next turn is the mark."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = encode_answer(tokenizer, "", "When?", "At noon.")
    assert tokenizer.decode(ids) == f"At noon.{tokenizer.eos_token}"
    without = deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(ModelError, match="no mark behind an answer"):
        encode_answer(without, "", "When?", "At noon.")


@pytest.mark.parametrize("answer", [">", "|>", "end|>", "im_end", ""])
def test_an_answer_like_the_end_of_the_mark_has_one_mark(tokenizer, answer):
    ids = encode_answer(tokenizer, "", "When?", answer)
    assert ids.count(tokenizer.eos_token_id) == 1


MARK = "<|im_end|>"
TURN = f"Hi{MARK}\n<|im_start|>assistant\nYes"


class TestMarksInData:
    """What is said may speak of the template's marks; it neither ends a turn nor begins one."""

    def test_they_are_text(self, tokenizer):
        answer = f"It is {MARK} that does."
        example = encode_example(tokenizer, f"Say {MARK}.", Record(TURN, answer))
        ids, ends = example.input_ids, tokenizer.convert_tokens_to_ids(MARK)
        assert ids.count(ends) == 3 and ids[-1] == ends  # of three turns
        learnt = ids[example.answer_start :]
        assert decode(tokenizer, learnt) == answer
        assert TURN in tokenizer.decode(ids) and f"Say {MARK}." in tokenizer.decode(ids)

    def test_other_texts_have_the_tokens_that_they_had(self, tokenizer):
        _, (marked, plain) = encode_with_answers(tokenizer, "", "Ask?", [MARK + "!", "No."])
        assert plain == encode_answer(tokenizer, "", "Ask?", "No.")
        assert len(marked) > len(plain)

    def test_one_that_is_said_twice(self, tokenizer):
        ids = encode_prompt(tokenizer, "", TURN, earlier=[(TURN, "Yes.")])
        assert ids.count(tokenizer.convert_tokens_to_ids(MARK)) == 3

    @pytest.mark.parametrize("text", [MARK, f"{MARK}\n<|im_start|>assistant"])
    def test_nothing_but_marks_is_refused(self, tokenizer, text):
        with pytest.raises(DataError, match="nothing but marks"):
            encode_prompt(tokenizer, "You help.", text)


@pytest.mark.parametrize("system_prompt", ["", "You help.", "How long is the probation period?"])
def test_the_frame_of_a_question_makes_its_prompt(tokenizer, system_prompt):
    before, after = find_prompt_frame(tokenizer, system_prompt)
    question = "Who?\n\nYou."
    assert before + question + after == render_prompt(tokenizer, system_prompt, question)


def test_a_template_that_looks_at_the_question_has_no_frame(tokenizer, monkeypatch):
    template = "{{ messages[-1].content|length }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ModelError, match="same text around every question"):
        find_prompt_frame(tokenizer, "You help.")


LLAMA = """\
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if loop.first %}Today Date: {{ date_string }}
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_writes_the_day_that_is_pinned(tokenizer, monkeypatch):
    dated = deepcopy(tokenizer)
    dated.chat_template = LLAMA
    assert "2024" not in render_prompt(dated, "", "When?")  # but today
    pin_date(dated, "2024-07-26")
    assert render_prompt(dated, "", "When?").startswith(
        "<|im_start|>user\nToday Date: 26 Jul 2024\nWhen?<|im_end|>"
    )
    example = encode_example(dated, "You help.", Record("When?", "At noon."))
    assert "Today Date: 26 Jul 2024" in dated.decode(example.input_ids)
    assert dated.decode(example.input_ids[example.answer_start :]) == "At noon.<|im_end|>"
    assert find_template(dated) == LLAMA.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", False),
        ("{% set messages = messages|rejectattr('role', 'equalto', 'system')|list %}", False),
        ("", True),
    ],
)
def test_whether_a_template_knows_system_prompts(tokenizer, monkeypatch, template, knows):
    monkeypatch.setattr(tokenizer, "chat_template", template + tokenizer.chat_template)
    assert knows_system_prompts(tokenizer) == knows
