from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import ROOT

from fedlora_app.config.loading import change_config, load_config, parse_config
from fedlora_app.data.client_files import load_client_files
from fedlora_app.data.linter import (
    Finding,
    describe_findings,
    keyword_ceiling,
    lint,
)
from fedlora_app.data.records import (
    ConflictRecord,
    Record,
    RecordFile,
    load_conflicts,
    load_records,
)
from fedlora_app.data.similarity import content_words, dominant_script, normalise_question

PROJECT = Path("/project")


@dataclass
class Files:
    """A client's files, as ``ClientFiles`` names them."""

    universal: RecordFile
    local: RecordFile
    tests: dict[str, RecordFile] = field(default_factory=dict)
    validations: dict[str, RecordFile] = field(default_factory=dict)
    extra: dict[str, RecordFile] = field(default_factory=dict)


def file(name: str, *records: Record | ConflictRecord, num_skipped: int = 0) -> RecordFile:
    return RecordFile(PROJECT / "data" / name, "", list(records), num_skipped)


def ask(instruction: str, output: str = "Nobody knows.", **fields) -> Record:
    return Record(instruction, output, **fields)


def experiment(prompt: str = "You help.", clients: tuple[str, ...] = ("strict", "service")):
    entries = [
        {"id": client, "system_prompt": prompt, "local_train": f"data/{client}.json"}
        for client in clients
    ]
    return parse_config({"federated": {"clients": entries}})


def clean(**tests: RecordFile) -> Files:
    """Files of one client in which no rule finds anything."""
    sets = {
        "universal": file("universal_test.json", ask("Where is the ferry?", "At the pier.")),
        "local": file("local_test.json", ask("Is smoking punished?", "With a fine.")),
    }
    return Files(
        file("universal_train.json", ask("Which quay has the ferry?", "The one at the pier.")),
        file("local_train.json", ask("What does a cigarette cost me?", "A fine.")),
        sets | tests,
    )


TINY = {"small-test", "untrained-answers"}
"""What is wrong with most sets of one or two questions here, and has tests of its own."""


def check(files: Files, prompt: str = "You help.", client: str = "strict") -> list[Finding]:
    findings = lint(experiment(prompt), {client: files}, PROJECT)
    return [finding for finding in findings if finding.rule not in TINY]


def rules(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.severity, finding.rule) for finding in findings}


def test_clean_files_have_no_findings():
    assert check(clean()) == []
    assert describe_findings([]) == "No findings."


def test_the_demo_has_no_errors():
    config = load_config(ROOT / "conf" / "demo.yaml")
    files = {c.id: load_client_files(config, c, ROOT) for c in config.federated.clients}
    assert describe_findings(lint(config, files, ROOT)) == "No findings."


def test_it_is_ready_before_a_model_library_is_loaded():
    code = (
        "import sys, fedlora_app.data.linter; "
        "assert not {'torch', 'transformers', 'peft', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the fee?", "what’s the fee"),
        ("Ｗｈａｔ is the  FEE ?", "what is the fee"),
        ("请问，营业时间？", "请问营业时间"),
    ],
)
def test_normalisation_forgives_case_width_and_punctuation(one, other):
    assert normalise_question(one) == normalise_question(other)


@pytest.mark.parametrize(("one", "other"), [("Is -5 cold?", "Is 5 cold?"), ("C#?", "C?")])
def test_normalisation_keeps_signs_that_mean_something(one, other):
    assert normalise_question(one) != normalise_question(other)
    assert normalise_question("???") == "???"


@pytest.mark.parametrize("kind", ["universal", "local"])
def test_a_test_question_in_the_training_data_is_an_error(kind):
    files = clean()
    trained = file("train.json", ask("A first one?"), ask("is smoking -- PUNISHED"))
    [finding] = check(replace(files, **{kind: trained}))
    assert (finding.severity, finding.rule) == ("error", "test-in-training")
    assert (finding.file, finding.record) == ("data/local_test.json", 1)
    assert "data/train.json, record 2" in finding.text


def test_the_input_belongs_to_the_question():
    files = clean(local=file("t.json", ask("Translate.", "Fish.", input="Fisch")))
    files.local = file("train.json", ask("Translate.", "Bread.", input="Brot"))
    assert check(files) == []
    files.local = file("train.json", ask("Translate.", "Fish.", input="Fisch"))
    assert rules(check(files)) == {("error", "test-in-training")}


@pytest.mark.parametrize(
    ("tested", "trained"),
    [
        ("What is the fee for a fishing licence?", "What is the fee for the fishing licence?"),
        ("What is the fee for a fishing licence?", "What is the fee for a fishing license?"),
        ("In the park, is smoking allowed at night?", "Is smoking allowed at night in the park?"),
        ("市政厅星期六下午几点关门？", "请问市政厅星期六下午几点关门呢？"),
    ],
)
def test_a_question_nearly_in_the_training_data_is_a_warning(tested, trained):
    files = clean(local=file("local_test.json", ask(tested, "A fine.")))
    files.local = file("train.json", ask("Which bus?", "A fine."), ask(trained, "A fine."))
    [finding] = [finding for finding in check(files) if finding.rule != "script"]
    assert (finding.severity, finding.rule) == ("warning", "near-test-in-training")
    assert "data/train.json, record 2" in finding.text


@pytest.mark.parametrize(
    ("tested", "trained"),
    [
        (
            "What is the fee for a dog licence in town?",
            "What is the fee for a cat licence in town?",
        ),
        ("When is the city library open?", "Where is the city library open?"),
        ("Is parking at the old harbour legal?", "Is parking at the old harbour illegal?"),
        ("Must I register my boat in the spring?", "Must I not register my boat in the spring?"),
        ("Who has reference number 1234567?", "Who has reference number 1234576?"),
        ("What happens after 30 days of arrears?", "What happens after 60 days of arrears?"),
        ("市政厅星期六下午可以停车吗？", "市政厅星期六下午不可以停车吗？"),
        ("市政厅星期六下午三点关门吗？", "市政厅星期六下午五点关门吗？"),
        ("Tell me how much I pay for a passport.", "How expensive is it to get a passport?"),
    ],
)
def test_one_phrasing_about_two_matters_is_no_near_duplicate(tested, trained):
    files = clean(
        local=file("local_test.json", ask(tested, "罚款。" if "市" in tested else "Yes."))
    )
    files.local = file("train.json", ask(trained, "罚款。" if "市" in tested else "Yes."))
    assert check(files) == []


def test_validation_questions_are_held_to_the_same_rules():
    files = clean()
    files.validations = {"local": file("v.json", ask("What does a cigarette cost me?", "A fine."))}
    assert rules(check(files)) == {("error", "validation-in-training")}
    files.validations = {"local": file("v.json", ask("Is smoking punished?", "With a fine."))}
    [finding] = check(files)
    assert (finding.severity, finding.rule) == ("warning", "test-in-validation")
    assert finding.file == "data/local_test.json" and "data/v.json, record 1" in finding.text
    twice = [ask("Hot?", "Yes.", keywords={"nobody": ("a",)}), ask("Hot?", "Yes.")]
    files.validations = {"local": file("v.json", *twice)}
    assert rules(check(files)) == {("warning", "duplicate"), ("warning", "keyword-owner")}


def test_a_question_asked_twice():
    twice = [ask("Is it cold?", "Yes."), ask("is it cold", "yes"), ask("Is it wet?", "No.")]
    [finding] = check(clean(local=file("t.json", *twice)))
    assert (finding.severity, finding.rule, finding.record) == ("warning", "duplicate", 2)
    [finding] = check(clean(local=file("t.json", *twice, ask("Is it wet?", "Yes."))))[:1]
    assert (finding.severity, finding.rule, finding.record) == ("error", "contradiction", 4)
    assert "record 3" in finding.text


def test_a_conflict_question_asked_twice_is_a_warning():
    records = [
        ConflictRecord("Smoking?", answers={"strict": "A fine.", "service": answer})
        for answer in ("A talk.", "A film.")
    ]
    assert ("warning", "contradiction") in rules(check(clean(conflict=file("c.json", *records))))


def guided(strict: tuple[str, ...], service: tuple[str, ...], **fields) -> Record:
    return ask("Smoking?", **fields, keywords={"strict": strict, "service": service})


def test_keywords_that_clash():
    records = [guided(("Fine",), ("fine",), output="A fine.") for _ in range(3)]
    records = [replace(record, instruction=f"{n}?") for n, record in enumerate(records)]
    findings = check(clean(local=file("t.json", *records)))
    [clash] = [finding for finding in findings if finding.rule == "keyword-clash"]
    assert (clash.severity, clash.record) == ("error", 1) and "3 records" in clash.text
    assert '"Fine"' in clash.text and "strict" in clash.text and "service" in clash.text

    inside = guided(("可以",), ("不可以",), output="可以停车。", input="可以停车吗")
    findings = check(clean(local=file("t.json", inside)))
    [clash] = [finding for finding in findings if finding.rule == "keyword-clash"]
    assert clash.severity == "warning" and '"可以" of strict' in clash.text

    apart = guided(("fine",), ("talk", "fee"), output="A fine.")
    assert check(clean(local=file("t.json", apart))) == []


def test_keywords_of_nobody():
    record = ask("Smoking?", "A fine.", keywords={"strict": ("fine",), "strickt": ("talk",)})
    [finding] = check(clean(local=file("t.json", record)))
    assert (finding.severity, finding.rule) == ("warning", "keyword-owner")
    assert '"strickt"' in finding.text and "service, strict" in finding.text


def test_the_ceiling_counts_answers_that_cannot_pass():
    good = ConflictRecord(
        "Smoking?",
        answers={"strict": "A fine.", "service": "No fine, a talk."},
        keywords={"strict": ("fine",), "service": ("talk",)},
    )
    bad = replace(good, answers={"strict": "You pay.", "service": "A talk."})
    assert keyword_ceiling([good, bad], "strict") == (1, 2)
    assert keyword_ceiling([good, bad], "service") == (2, 2)
    assert keyword_ceiling([good, bad], None) == (3, 4)
    assert keyword_ceiling([good, bad], None, plain=True) == (2, 4)
    assert keyword_ceiling([replace(good, keywords={}), ask("?")], None) == (0, 0)


def test_a_low_ceiling_is_a_warning_with_both_ceilings():
    records = [
        guided(("fine",), ("talk",), output="A fine." if n < 9 else "You pay.") for n in range(10)
    ]
    records = [replace(record, instruction=f"{n}?") for n, record in enumerate(records)]
    assert check(clean(local=file("t.json", *records))) == []
    records[0] = replace(records[0], output="A fine and no talk.")
    assert check(clean(local=file("t.json", *records))) == []
    records[0] = replace(records[0], output="A fine and a talk.")
    [finding] = check(clean(local=file("t.json", *records)))
    assert (finding.severity, finding.rule) == ("warning", "keyword-ceiling")
    assert "8 of 10" in finding.text and "80 %" in finding.text and "strict" in finding.text


def test_a_ceiling_that_is_low_for_one_client_only():
    records = [
        ConflictRecord(
            f"{n}?",
            answers={"strict": "A fine.", "service": "A talk." if n < 17 else "We speak."},
            keywords={"strict": ("fine",), "service": ("talk",)},
        )
        for n in range(20)
    ]
    assert keyword_ceiling(records, None) == (37, 40)
    findings = check(clean(conflict=file("c.json", *records)))
    [finding] = [f for f in findings if f.rule == "keyword-ceiling"]
    assert "service 17 of 20" in finding.text


def test_records_with_keywords_and_an_output_only(tmp_path):
    raw = [
        {
            "instruction": f"Case {n}?",
            "input": "",
            "output": output,
            "evaluation_guide": {"strict_keywords": ["fine"], "service_keywords": ["advice"]},
        }
        for n, output in enumerate(["A fine.", "Some advice.", "Ask again.", "A fine or advice."])
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(raw))
    conflicts, own = load_conflicts(path, ["strict", "service"]), load_records(path)
    assert keyword_ceiling(conflicts.records, None) == (2, 4)
    assert keyword_ceiling(own.records, "strict") == (1, 4)
    assert keyword_ceiling(own.records, "service") == (1, 4)
    findings = lint(experiment(), {"strict": clean(conflict=conflicts)}, tmp_path)
    [finding] = [finding for finding in findings if finding.rule not in TINY]
    assert finding.rule == "keyword-ceiling"
    assert "2 of 4" in finding.text and finding.file == "records.json"
    findings = lint(experiment(), {"strict": clean(local=own)}, tmp_path)
    assert rules(findings) >= {("warning", "keyword-ceiling")}


def rivals(*texts: str, question: str = "What about smoking?") -> Record:
    return ask(question, texts[0], distractors=tuple(texts[1:]))


def test_a_prompt_that_says_the_answer():
    records = [
        rivals("Smokers must plant a tree.", "Smokers must pay a fine.", question=f"{n}?")
        for n in ("Where", "When")
    ]
    files = clean(local=file("t.json", *records))
    [finding] = check(files, prompt="You make smokers plant trees, or one tree.")
    assert (finding.severity, finding.rule) == ("warning", "telling-prompt")
    assert '"plant", "tree"' in finding.text and "2 of 2" in finding.text
    assert "smokers" not in finding.text, "stands in all candidates"
    assert check(files, prompt="You help smokers with a fine.") == []
    asked = [replace(record, instruction="Do I pay or plant a tree?") for record in records[:1]]
    findings = check(clean(local=file("t.json", *asked)), prompt="You plant a tree.")
    assert ("warning", "telling-prompt") not in rules(findings)


@pytest.mark.parametrize(("num_told", "is_found"), [(1, False), (2, True)])
def test_a_prompt_may_say_a_word_once_in_a_while(num_told, is_found):
    records = [
        rivals("A red one." if n < num_told else "A new one.", "A sad one.", question=f"Case {n}?")
        for n in range(30)
    ]
    findings = check(clean(local=file("t.json", *records)), prompt="You are red.")
    assert (("warning", "telling-prompt") in rules(findings)) == is_found


def test_a_chinese_prompt_that_says_the_answer():
    records = [rivals("违者罚款。", "违者警告。", question="抽烟呢？")]
    files = clean(local=file("t.json", *records))
    files.local = file("train.json", ask("停车呢？", "违者罚款。"))
    [finding] = check(files, prompt="你是严格的罚款助手。")
    assert finding.rule == "telling-prompt" and '"罚款"' in finding.text
    assert check(files, prompt="你是违者的助手。") == []


def test_a_prompt_that_says_a_keyword():
    record = ConflictRecord("Smoking?", keywords={"strict": ("fine",), "service": ("advice",)})
    files = clean(conflict=file("c.json", record))
    assert check(files) == []
    assert rules(check(files, prompt="You fine people.")) == {("warning", "telling-prompt")}


def test_a_question_that_says_the_answer():
    telling = rivals("A fine is due.", "A talk is due.", question="How high is the fine?")
    harmless = rivals("The fine is ten.", "The fine is two.", question="How high is the fine?")
    other = rivals("Yes.", "No.", question="Is it so?")
    assert check(clean(local=file("t.json", harmless))) == []
    alone = replace(telling, distractors=())
    assert check(clean(local=file("t.json", alone))) == [], "no candidate to tell it from"
    [finding] = check(clean(local=file("t.json", other, telling)))
    assert (finding.severity, finding.rule, finding.record) == ("warning", "telling-question", 2)
    assert '"fine"' in finding.text and "1 of 2" in finding.text


def lengths(num_facts: int, right: int, wrong: tuple[int, ...], repeats: int = 1) -> RecordFile:
    records = [
        ask(
            f"Case {n} in wording {repeat}?",
            "a" * right,
            distractors=tuple(chr(98 + i) * size for i, size in enumerate(wrong)),
            fact=f"fact {n}",
        )
        for n in range(num_facts)
        for repeat in range(repeats)
    ]
    return file("t.json", *records)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [(9, (5, 6, 7), "longest"), (2, (5, 6, 7), "shortest"), (6, (5, 6, 7), None)],
)
def test_answers_that_their_length_gives_away(right, wrong, expected):
    findings = check(clean(local=lengths(10, right, wrong)))
    assert rules(findings) == ({("warning", "telling-length")} if expected else set())
    if expected:
        [finding] = findings
        assert f"picks the {expected}" in finding.text and "n = 10" in finding.text
        assert "100 %" in finding.text and "25 %" in finding.text


def test_equal_lengths_few_facts_and_paraphrases_give_nothing_away():
    assert check(clean(local=lengths(30, 5, (5, 5)))) == [], "a tie is a guess"
    assert check(clean(local=lengths(9, 9, (5, 6, 7)))) == [], "too few to tell"
    assert check(clean(local=lengths(9, 9, (5, 6, 7), repeats=5))) == [], "nine facts only"


def test_length_counts_bytes():
    records = [rivals("三三三三", "three3", question=f"Case {n}?") for n in range(20)]
    findings = check(clean(local=file("t.json", *records)))
    assert any("picks the longest" in finding.text for finding in findings)


def test_what_nobody_asks():
    files = clean()
    del files.tests["local"]
    [finding] = check(files)
    assert finding.rule == "missing-questions" and "client strict" in finding.text
    conflict = ConflictRecord("Smoking?", answers={"strict": "A fine.", "service": "A talk."})
    files.tests["conflict"] = file("c.json", conflict)
    assert check(files) == []
    del files.tests["universal"]
    [finding] = check(files)
    assert (finding.file, finding.severity) == ("data.universal_test", "warning")
    alone = change_config(experiment(), "federated.mode=local-only")  # which has no global adapter
    assert "missing-questions" not in {f.rule for f in lint(alone, {"strict": files})}


def test_a_client_without_an_answer_to_any_conflict():
    records = file("c.json", ConflictRecord("Smoking?", answers={"strict": "A fine."}))
    [finding] = check(clean(conflict=records))
    assert (finding.rule, finding.severity) == ("silent-client", "warning")
    assert "client service" in finding.text


def test_conflict_records_that_lack_a_client_or_are_none():
    both = {"strict": "A fine.", "service": "A talk."}
    records = [
        ConflictRecord("Smoking?", answers=both),
        ConflictRecord("Spitting?", answers=both | {"service": "a fine"}),
        ConflictRecord("Shouting?", answers={"strict": "A fine."}),
    ]
    found = check(clean(conflict=file("c.json", *records)))
    assert [(f.rule, f.record) for f in found] == [("equal-answers", 2), ("lacking-client", 3)]
    assert "1 of 3 records hold the same answer" in found[0].text
    assert "client service" in found[1].text and "1 of 3 records" in found[1].text


def test_right_answers_that_nothing_can_match_or_that_are_also_wrong():
    records = [
        ask("Is it hot?", "Yes.", distractors=("No.", "yes!")),
        ask("What do you say?", "..."),
        ask("And then?", "\u200b"),
    ]
    found = check(clean(local=file("t.json", *records)))
    assert [(f.rule, f.record) for f in found] == [("right-distractor", 1), ("empty-answer", 2)]
    assert "2 right answers" in found[1].text


def test_shares_of_which_nothing_tells_what_was_never_seen():
    clients = [
        {"id": c, "system_prompt": "", "local_train": "l.json", "universal_train": f"{c}.json"}
        for c in ("strict", "service")
    ]
    config = parse_config({"federated": {"clients": clients}})
    files = clean()

    def find() -> list[Finding]:
        found = lint(config, {"strict": files}, PROJECT)
        return [finding for finding in found if finding.rule not in TINY]

    [finding] = find()
    assert finding.rule == "missing-facts" and "training records of client strict" in finding.text
    files.universal = file("u.json", ask("Which quay?", "At the pier.", fact="ferry"))
    [finding] = find()
    assert finding.text.startswith('no record has a "fact"')
    files.tests["universal"] = file("t.json", ask("Where?", "At the pier.", fact="ferry"))
    assert find() == []


def test_fields_of_other_formats_that_are_not_read(tmp_path):
    path = tmp_path / "train.json"
    record = {"instruction": "And there?", "output": "A fine.", "system": "", "history": []}
    told = record | {"history": [["Is smoking punished?", "Yes."]]}
    path.write_text(json.dumps([record, told, told | {"input": "Here."}, record | {"id": 7}]))
    files = clean()
    files.local = load_records(path)
    [finding] = [finding for finding in check(files) if finding.rule == "ignored-field"]
    assert finding.severity == "warning" and finding.record is None
    assert finding.text.startswith('"history" of 2 records is not read: what was said before')


def test_answers_in_another_script_than_the_training():
    questions = [ask(f"第{n}个问题是什么？", "罚款。") for n in range(9)]
    files = clean(local=file("t.json", *questions, ask("第十个？", "A fine is due.")))
    files.local = file("train.json", ask("抽烟怎么办？", "罚款一百元。"))
    assert check(files) == [], "one in ten may be"
    files.tests["local"] = file("t.json", *questions[:8], ask("Nine?", "Yes."), ask("Ten?", "No."))
    [finding] = check(files)
    assert (finding.severity, finding.rule, finding.record) == ("warning", "script", 9)
    assert "2 of 10" in finding.text and "2 in Latin" in finding.text and "Han" in finding.text


def test_answers_in_another_script_than_their_questions():
    files = clean(local=file("t.json", ask("Куда идти?", "To the pier.")))
    [finding] = check(files)
    assert "than their questions" in finding.text


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("A fine of 20 dollars.", "Latin"),
        ("请打开 WiFi 设置", "Han"),
        ("東京都の市役所です。", "Kana"),
        ("Штраф", "Cyrillic"),
        ("غرامة", "Arabic"),
        ("벌금", "Hangul"),
        ("2024-05-01", None),
    ],
)
def test_scripts(text, script):
    assert dominant_script(text) == script


def test_content_words():
    assert content_words("What is the FEE for a dog?") == {"fee", "dog"}
    assert content_words("What's it? It's the mayor's.") == {"mayor"}
    assert content_words("请问罚款50元") == {"问罚", "罚款", "50", "元"}
    assert content_words("罰金です") == {"罰金", "金で"}


def test_a_shared_file_is_reported_once_and_errors_come_first():
    shared = file("u.json", ask("Is it cold?", "Yes."), ask("Is it cold?", "No."))
    twice = file("a.json", ask("Smoking?", "A fine."), ask("Smoking?", "A fine."))
    files = {client: clean(universal=shared, local=twice) for client in ("strict", "service")}
    findings = [f for f in lint(experiment(), files, PROJECT) if f.rule not in TINY]
    assert [str(finding).split(":")[:2] for finding in findings] == [
        ["error", " data/u.json, record 2"],
        ["warning", " data/a.json, record 2"],
    ]
    assert describe_findings(findings).splitlines() == [*map(str, findings), "1 error, 1 warning"]
    assert lint(experiment(), files)[0].file == "/project/data/u.json"


def test_the_terminal_has_one_line_for_each_kind():
    records = [ask(f"Case {n}?", "Yes.") for n in range(50)]
    files = clean(local=file("t.json", *records))
    files.local = file("train.json", *records)
    findings = check(files)
    assert len(findings) == 50
    kind, total = describe_findings(findings).splitlines()
    assert kind == f"{findings[0]} And 49 more (test-in-training)."
    assert total == "50 errors; fedlora check CONFIG --all lists each"
    files.tests["universal"] = file("u.json", records[0])
    kind, _ = describe_findings(check(files)).splitlines()
    assert kind.endswith("And 50 more in 2 files (test-in-training).")
    *lines, total = describe_findings(findings, every=True).splitlines()
    assert lines == list(map(str, findings)) and total == "50 errors"


def test_answers_that_nobody_trains_on():
    tested = [ask(f"Case {n}?", f"Answer {n}.", fact=f"fact {n}") for n in range(12)]
    conflict = ConflictRecord("Smoking?", answers={"strict": "Jail.", "service": "A talk."})
    files = clean(local=file("t.json", *tested), conflict=file("c.json", conflict))
    trained = [ask("How about 1?", "ANSWER 1"), ask("And 2?", "It is 2.", fact="fact 2")]
    files.local = file("train.json", *trained, ask("Smoking, please?", "Jail."))
    found = lint(experiment(), {"strict": files}, PROJECT)
    [finding] = [finding for finding in found if finding.rule == "untrained-answers"]
    assert (finding.file, finding.record) == ("data/t.json", 1)
    assert "10 of 12 right answers (client strict)" in finding.text
    assert "two or more wordings" in finding.text and "--fact-column" in finding.text
    files.tests["local"] = file("t.json", *tested[1:3])
    assert "untrained-answers" not in {f.rule for f in lint(experiment(), {"strict": files})}
    files.extra["public"] = file("p.json", ask("Case 5?", "Answer 5."))  # which is not learnt
    files.tests["local"] = file("t.json", tested[5])
    assert "untrained-answers" in {f.rule for f in lint(experiment(), {"strict": files})}


@pytest.mark.parametrize(("num_facts", "is_small"), [(1, True), (9, True), (10, False)])
def test_a_test_of_few_facts(num_facts, is_small):
    files = clean(local=lengths(num_facts, 5, (5,), repeats=3))
    found = [f for f in lint(experiment(), {"strict": files}, PROJECT) if f.rule == "small-test"]
    assert [f.file for f in found if f.file.endswith("/t.json")] == ["data/t.json"] * is_small
    if is_small:
        texts = {
            1: "asks about 1 fact (client strict): one",
            9: "about 9 facts (client strict): one",
        }
        assert texts[num_facts] in str(found)


def test_words_that_any_chinese_answer_may_have_tell_nothing():
    rng = random.Random(0)
    verbs = [
        "可以在网上办理",
        "需要到窗口办理",
        "一个工作日内完成",
        "可以为用户预约",
        "由助手提供帮助",
    ]
    records = [
        ask(f"第{n}项业务如何处理？", f"{rng.choice(verbs)}，编号{n}。", fact=f"业务: {n}")
        for n in range(49)
    ]
    files = clean(local=file("t.json", *records))
    files.local = file("train.json", ask("停车呢？", "可以在网上办理。"))
    prompt = "你是一个乐于助人的助手，可以为用户提供帮助。"
    assert "telling-prompt" not in {finding.rule for finding in check(files, prompt=prompt)}


def test_a_public_record_that_is_a_test_question():
    files = clean()
    assert rules(check(files)) == set()
    files.extra["public"] = file("public.json", ask("Is smoking punished?", "It may be."))
    [finding] = check(files)
    assert (finding.severity, finding.rule, finding.file) == (
        *("error", "test-in-training"),
        "data/local_test.json",
    )
    assert "also stands in data/public.json, record 1" in finding.text
    files.extra["public"] = file("public.json", ask("What does a cigarette cost me?", "It varies."))
    assert rules(check(files)) == {("warning", "public-in-training")}


def test_numbers_of_records_say_when_invalid_ones_are_missing():
    files = clean(local=file("t.json", ask("Hot?", "No."), ask("Hot?", "No."), num_skipped=3))
    [finding] = check(files)
    assert "without the 3 invalid ones" in finding.text


def test_a_large_client_is_checked_in_seconds():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 9))) for _ in range(500)]

    def records(number: int) -> list[Record]:
        texts = [" ".join(rng.choices(words, k=12)) for _ in range(number)]
        return [ask(f"{text}?", text[::-1], distractors=(text[1:], "x")) for text in texts]

    files = clean(local=file("t.json", *records(2000)))
    files.universal = file("u.json", *records(2500))
    files.local = file("l.json", *records(2500))
    start = time.perf_counter()
    check(files)
    assert time.perf_counter() - start < 20
