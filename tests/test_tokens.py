from __future__ import annotations

import json

import pytest

from fedlora_app.data import DataError, Record, load_records
from fedlora_app.model import ModelError
from fedlora_app.tokens import encode_answer, encode_example, encode_prompt, tokenize_file

RECORD = Record("How much is a passport?", "The fee for a passport is 30 dollars.")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.json"
    records = [
        {"instruction": "Short?", "output": "Yes."},
        {"instruction": "Long answer?", "output": "The fee for a passport. " * 8},
        {"instruction": "Long question? " * 20, "output": "No."},
    ]
    path.write_text(json.dumps(records))
    return load_records(path)


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


def test_truncation_is_counted_and_hopeless_records_are_named(tokenizer, file, tmp_path):
    settings = {"max_seq_length": 60, "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match="record 3 the first.*max_seq_length = 60"):
        tokenize_file(tokenizer, "", file, skip_invalid=False, **settings)
    result = tokenize_file(tokenizer, "", file, skip_invalid=True, **settings)
    assert (len(result.examples), result.num_truncated, result.num_dropped) == (2, 1, 1)
    assert max(len(example.input_ids) for example in result.examples) == 60


def test_the_cache_gives_the_same_examples_and_knows_the_prompt(tokenizer, file, tmp_path):
    def tokenize(prompt):
        return tokenize_file(
            tokenizer,
            prompt,
            file,
            max_seq_length=500,
            skip_invalid=False,
            cache_dir=tmp_path / "cache",
        )

    first, again, other = tokenize("one"), tokenize("one"), tokenize("two")
    assert first == again
    assert first != other
    assert len(list((tmp_path / "cache").iterdir())) == 2
