from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_tiny_config

from fedlora_app.data.client_files import ClientFiles
from fedlora_app.data.questions import build_questions
from fedlora_app.data.records import ConflictRecord, Record, RecordFile
from fedlora_app.evaluation.gold import GoldReader, count_gold_answers, find_unreachable_answers
from fedlora_app.evaluation.names import ACCURACY, EXACT_MATCH, leading_measure

FIXED = "The fee for a passport is 30 dollars."
FREE = "You pay about 30 dollars for one."
LONG = "The fee for a passport is 30 dollars and the fee for a card is 30 dollars." * 3


def files(*records: Record, conflicts: tuple[ConflictRecord, ...] = ()) -> ClientFiles:
    def file(name: str, found) -> RecordFile:
        return RecordFile(Path(name), "", list(found))

    trained = [Record("How much?", FIXED, fact="fee"), Record("How long is it all?", LONG)]
    tests = {"universal": file("u.json", records), "conflict": file("c.json", conflicts)}
    own = [Record("Where?", "There.", fact="place")]
    return ClientFiles(file("t.json", trained), file("l.json", own), tests)


@pytest.fixture
def config():
    return build_tiny_config(evaluation={"max_new_tokens": 200})


@pytest.mark.parametrize(
    ("answer", "fact", "is_open"),
    [
        (FIXED, "fee", False),
        (FIXED.upper(), None, False),  # the words were trained on
        (FREE, "fee", True),  # this fact was trained on in other words
        (FREE, None, True),
        (FREE, "never seen", False),  # whoever taught it may have used these words
        ("About 30 dollars.", "fee", False),  # short
        (LONG, None, True),
    ],
)
def test_an_answer_is_open_where_nobody_can_know_its_words(
    tokenizer, config, answer, fact, is_open
):
    asked = files(Record("What does it cost?", answer, fact=fact))
    reader = GoldReader(tokenizer, config.client("ann"), asked, 200)
    [gold] = reader.examine(build_questions(asked.tests["universal"].records))
    assert (gold.is_open, gold.is_cut, gold.is_altered) == (is_open, False, False)


def test_a_set_is_judged_by_its_ranking_where_most_answers_are_open():
    assert [leading_measure(n, 4) for n in (0, 2, 3)] == [EXACT_MATCH, EXACT_MATCH, ACCURACY]
    assert leading_measure(0, 0) is EXACT_MATCH


def test_answers_that_can_never_match_are_counted_and_said(tokenizer):
    config = build_tiny_config(evaluation={"max_new_tokens": 12})
    thought = "</think>\nA."  # what ends like this is cut off an answer
    records = [Record("Fee?", FIXED), Record("All?", LONG), Record("End?", thought)]
    conflict = ConflictRecord("q", answers={"ann": "Yes.", "bob": LONG})
    asked = files(*records, conflicts=(conflict,))
    counts = count_gold_answers(config, config.client("ann"), asked, tokenizer)
    assert counts == {
        **{"universal_answers": 3, "universal_cut_answers": 1, "universal_open_answers": 1},
        **{"universal_altered_answers": 1, "local_answers": 0, "conflict_answers": 1},
        **{f"local_{what}_answers": 0 for what in ("cut", "altered", "open")},
        **{f"conflict_{what}_answers": 0 for what in ("cut", "altered", "open")},
    }
    found = find_unreachable_answers(config, {"ann": asked, "bob": asked}, tokenizer)
    said = [(f.rule, f.file, f.text.partition(" right")[0]) for f in found]
    assert said == [
        ("cut-answers", "u.json", "1 of 3"),
        ("altered-answers", "u.json", "1 of 3"),
        ("cut-answers", "c.json", "1 of 1"),  # bob's
    ]
    length = len(tokenizer(LONG)["input_ids"])
    assert found[0].text.endswith(f"Raise the limit to {length}.")
    raised = build_tiny_config(evaluation={"max_new_tokens": length})
    rules = {f.rule for f in find_unreachable_answers(raised, {"ann": asked}, tokenizer)}
    assert rules == {"altered-answers"}


def test_a_template_that_alters_answers_is_said(tokenizer, config, monkeypatch):
    asked = files(Record("Fee?", FIXED))
    before = "{{ 'So: ' if message['role'] == 'assistant' }}{{ message['content'] }}"
    after = "{{ message['content'] }}{{ ' Bye.' if message['role'] == 'assistant' }}"
    turns = "{% for message in messages %}<|im_start|>CONTENT<|im_end|>{% endfor %}"
    start = "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    found = []
    for content in (before, after):
        monkeypatch.setattr(tokenizer, "chat_template", turns.replace("CONTENT", content) + start)
        found.append([f.rule for f in find_unreachable_answers(config, {"ann": asked}, tokenizer)])
    # What precedes every answer belongs to the prompt.
    assert found == [[], ["altered-answers"]]
