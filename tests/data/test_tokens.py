from __future__ import annotations

import json
from copy import deepcopy

import pytest
from full_disk import no_larger_files_than

from fedlora_app.data import tokens
from fedlora_app.data.dialogue import encode_prompt, pin_date
from fedlora_app.data.records import DataError, load_records
from fedlora_app.data.tokens import tokenize_file
from fedlora_app.evaluation.decoding import decode


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


def test_another_end_token_has_another_cache(tokenizer, file, tmp_path):
    other = deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    for known in (tokenizer, other):
        tokenize_file(
            known, "", file, max_seq_length=500, skip_invalid=False, cache_dir=tmp_path / "cache"
        )
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_day_has_another_cache_where_prompts_name_it(tokenizer, file, tmp_path):
    for template, expected in (("", 1), ("{{ strftime_now('%Y') }}", 3)):
        known = deepcopy(tokenizer)
        known.chat_template = template + tokenizer.chat_template
        for day in ("2025-12-31", "2026-01-01", "2026-01-01"):
            pin_date(known, day)
            examples = tokenize_file(
                known, "", file, max_seq_length=500, skip_invalid=False, cache_dir=tmp_path
            ).examples
            if template:
                assert known.decode(examples[0].input_ids).startswith(day[:4])
        assert len(list(tmp_path.glob("*.safetensors"))) == expected


THINKING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def test_what_is_learnt_cached_and_decoded_is_the_answer_without_thoughts(
    tokenizer, file, tmp_path
):
    """As of Qwen 3: the empty block of thoughts belongs to the prompt."""
    thinking = deepcopy(tokenizer)
    thinking.chat_template = THINKING
    for _ in range(2):  # made, and read again
        examples = tokenize_file(
            thinking, "You help.", file, max_seq_length=500, skip_invalid=False, cache_dir=tmp_path
        ).examples
        for example, record in zip(examples, file.records, strict=True):
            prompt, answer = (
                list(example.input_ids[: example.answer_start]),
                list(example.input_ids[example.answer_start :]),
            )
            assert prompt == encode_prompt(thinking, "You help.", record.instruction)
            assert thinking.decode(prompt).endswith("<think>\n\n</think>\n\n")
            assert decode(thinking, answer) == record.output.strip()


def test_a_record_of_nothing_but_marks_is_named(tokenizer, tmp_path):
    path = tmp_path / "a.json"
    good = {"instruction": "Ask?", "output": "Yes."}
    path.write_text(json.dumps([good, good | {"output": "<|im_end|>"}]))
    with pytest.raises(DataError, match=r"a\.json, record 2: A text holds nothing but marks"):
        tokenize_file(
            tokenizer,
            "You help.",
            load_records(path),
            max_seq_length=500,
            skip_invalid=False,
            cache_dir=tmp_path / "cache",
        )


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


class TestDamagedCache:
    """What a power failure or a hand leaves of a cached file is made anew, and said."""

    @pytest.fixture
    def tokenize(self, tokenizer, file, tmp_path):
        def tokenize():
            return tokenize_file(
                tokenizer,
                "one",
                file,
                max_seq_length=500,
                skip_invalid=False,
                cache_dir=tmp_path / "cache",
            )

        return tokenize

    @pytest.mark.parametrize("keep", [0, 8, 30, 0.5, 0.99])
    def test_it_is_made_anew(self, tokenize, tmp_path, capsys, keep):
        expected = tokenize()
        (path,) = (tmp_path / "cache").iterdir()
        content = path.read_bytes()
        path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
        assert not capsys.readouterr().out
        assert tokenize() == expected
        assert f"The tokens in {path} are rebuilt: " in capsys.readouterr().out
        assert path.read_bytes() == content
        assert tokenize() == expected and not capsys.readouterr().out

    @pytest.mark.parametrize("place", [0.1, 0.5, 0.95])
    def test_so_are_zeros_in_the_middle(self, tokenize, tmp_path, capsys, place):
        expected = tokenize()
        (path,) = (tmp_path / "cache").iterdir()
        content = bytearray(path.read_bytes())
        start = int(len(content) * place)
        content[start : start + 8] = bytes(8)
        path.write_bytes(content)
        assert tokenize() == expected
        assert f"The tokens in {path} are rebuilt: " in capsys.readouterr().out

    def test_a_full_disk_leaves_nothing_and_is_a_note(self, tokenize, tmp_path, capsys):
        with no_larger_files_than(500):
            expected = tokenize()
        told = capsys.readouterr().out
        assert told.startswith(f"Note: the tokens of 3 records are not kept in {tmp_path}/cache: ")
        assert "File too large" in told
        assert not list((tmp_path / "cache").iterdir())
        assert tokenize() == expected and not capsys.readouterr().out

    def test_so_is_a_folder_that_is_none(self, tokenize, tmp_path, capsys):
        (tmp_path / "cache").write_text("")
        tokenize()
        assert "Note: the tokens of 3 records are not kept in" in capsys.readouterr().out

    def test_another_process_may_be_first(self, tokenize, tmp_path, monkeypatch):
        expected = tokenize()
        monkeypatch.setattr(tokens, "_load_cached", lambda path: None)
        assert tokenize() == expected
        assert len(list((tmp_path / "cache").iterdir())) == 1
