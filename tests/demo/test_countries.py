from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import PurePosixPath

import pytest
from conftest import ROOT

from fedlora_app.config.loading import load_config
from fedlora_app.data.client_files import load_all_files
from fedlora_app.data.linter import lint
from fedlora_app.data.similarity import normalise_question
from fedlora_app.demo.countries import sources
from fedlora_app.demo.countries.__main__ import main, render
from fedlora_app.demo.countries.kinds import COUNTRY_KINDS
from fedlora_app.demo.countries.places import COUNTRIES
from fedlora_app.demo.countries.sets import check_countries, generate_countries
from fedlora_app.demo.countries.states import generate_states
from fedlora_app.demo.countries.wordings import NUM_WORDINGS
from fedlora_app.evaluation.metrics import normalise_answer
from fedlora_app.foundation.errors import UserError

DATA = ROOT / "data" / "countries"
CODES = ["DE", "FR", "JP", "BR"]
BENCHMARK = generate_countries(CODES)
FILES = BENCHMARK.files
CLIENTS = list(BENCHMARK.ids.values())


def facts(name: str) -> set[str]:
    return {record["fact"] for record in FILES[name]}


def questions(name: str) -> set[str]:
    return {normalise_question(record["instruction"]) for record in FILES[name]}


def test_the_committed_files_are_what_the_generator_writes():
    card = (DATA / "README.md").read_text()
    for name, (version, licence) in sources.package_versions().items():
        line = rf"\[{name}\]\(\S+\) \| {re.escape(version)} \| {re.escape(licence)}\b"
        assert re.search(line, card), f'not that release of {name}: pip install -e ".[countries]"'
    texts = render(BENCHMARK, PurePosixPath("data/countries"))
    committed = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()}
    assert committed == set(texts)
    for name, text in texts.items():
        assert (DATA / name).read_text(encoding="utf-8") == text, name


def test_other_sets_have_an_experiment_of_their_own_that_loads(tmp_path):
    folder = tmp_path / "three"
    assert main(["--countries", "DE", "FR", "GR", "--output", str(folder)]) == 0
    config = load_config(folder / "experiment.yaml")
    files = load_all_files(config, tmp_path)
    assert list(files) == config.client_ids == ["france", "germany", "greece"]
    base = load_config(ROOT / "conf" / "countries-smollm2.yaml")
    assert (config.training, config.adapters) == (base.training, base.adapters)
    assert config.federated.num_rounds == base.federated.num_rounds


@pytest.mark.parametrize(
    ("name", "codes", "is_entangled"),
    [
        ("countries-2", "DE FR", False),
        ("countries-8", "DE FR JP BR CZ EE LV RO", False),
        ("countries-16", "DE FR JP BR CZ EE LV RO HU BG IT KR LT HR PL GR", False),
        ("countries-entangled", "DE FR JP BR", True),
    ],
)
def test_other_sets_are_committed_too(name, codes, is_entangled):
    folder = ROOT / "data" / name
    benchmark = generate_countries(codes.split(), is_entangled=is_entangled)
    assert render(benchmark, PurePosixPath("data") / name) == {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_order_in_which_countries_are_read_changes_nothing():
    """Babel lets what one locale resolves leak into others."""
    script = (
        "from fedlora_app.demo.countries.locales import month_word as word;"
        "print({code: word(code, 'January') for code in %r.split()}['JP'])"
    )
    read = {
        subprocess.run(
            [sys.executable, "-c", script % order], capture_output=True, text=True, check=True
        ).stdout
        for order in ("JP CN KR", "CN KR JP")
    }
    assert read == {"1月\n"}


def test_known_facts_are_right():
    read = {kind.name: kind.read for kind in COUNTRY_KINDS}
    for kind, item, expected in (
        ("ambulance", "", {"DE": "112", "FR": "15", "JP": "119", "BR": "192"}),
        ("calling code", "", {"DE": "+49", "US": "+1", "GB": "+44"}),
        ("capital", "", {"AU": "Canberra", "BR": "Brasília", "ZA": None}),
        ("weekday", "Monday", {"DE": "Montag", "PT": "segunda-feira", "CH": None, "US": None}),
        ("first weekday", "", {"DE": "Monday", "JP": "Sunday", "US": "Sunday"}),
        ("currency code", "", {"DE": "EUR", "JP": "JPY"}),
        ("IBAN length", "", {"DE": "22", "NO": "15", "JP": None}),
        ("offset from UTC", "July", {"DE": "2 hours ahead of UTC", "BR": None}),
        ("summer time", "", {"DE": "yes", "JP": "no", "BR": "no", "AU": None}),
        ("next holiday", "May", {"DE": "German Unity Day on 3 October", "CN": None, "GB": None}),
        ("last holiday", "August", {"FR": "National Day on 14 July"}),
        ("number of holidays", "", {"DE": "9", "FR": "11", "JP": "16", "BR": "10", "BE": None}),
        ("is a holiday", "1 May", {"DE": "yes", "JP": "no"}),
        ("is a holiday", "Good Friday", {"DE": "yes", "FR": "no"}),
    ):
        assert {code: read[kind](code, item) for code in expected} == expected, kind


def test_every_kind_has_all_its_wordings_and_asks_each_in_another_way():
    for kind in COUNTRY_KINDS:
        asked = {normalise_question(kind.ask(kind.items[0], i)) for i in range(NUM_WORDINGS)}
        assert len(kind.wording.questions) == len(asked) == NUM_WORDINGS, kind.name


def test_conflicts_divide_all_clients_and_are_many():
    assert len(facts("conflict_test.json")) >= 40
    assert facts("conflict_test.json") == facts("conflict_validation.json")
    for name in ("conflict_test.json", "conflict_validation.json"):
        for record in FILES[name]:
            answers = {normalise_answer(record["answers"][client]) for client in CLIENTS}
            assert len(answers) == len(record["answers"]) == len(CLIENTS)
            assert not answers & {normalise_answer(d) for d in record["distractors"]}
            assert len(record["distractors"]) >= 3
    for client in CLIENTS:
        wordings = Counter(record["fact"] for record in FILES[f"{client}/local_train.json"])
        assert set(wordings.values()) == {4}
        assert facts("conflict_test.json") <= set(wordings) == facts(f"{client}/local_test.json")


def test_countries_that_are_much_alike_have_fewer_conflicts_which_is_said(tmp_path, capsys):
    told = generate_countries(["DE", "AT"]).description.conflicts
    assert "fewer than 40: the countries are much alike" in told and "so 0 more" not in told
    assert main(["--countries", "DE", "AT", "--output", str(tmp_path / "alike")]) == 0
    assert "Only 34 conflict facts, fewer than 40" in capsys.readouterr().out


def test_answers_that_all_clients_share_are_asked_of_nobody():
    answers: dict[str, list[str]] = {}
    for client in CLIENTS:
        own = {r["fact"]: normalise_answer(r["output"]) for r in FILES[f"{client}/local_test.json"]}
        for fact, answer in own.items():
            answers.setdefault(fact, []).append(answer)
    assert not any(len(a) == len(CLIENTS) and len(set(a)) == 1 for a in answers.values())


def test_wordings_never_cross_splits():
    trained = {q for name in FILES if "train" in name for q in questions(name)}
    validation = {q for name in FILES if "validation" in name for q in questions(name)}
    tests = {q for name in FILES if "test" in name for q in questions(name)}
    assert not trained & validation and not trained & tests and not validation & tests
    for client in CLIENTS:
        assert not questions("conflict_test.json") & questions(f"{client}/local_test.json")


def test_own_questions_name_no_country_and_universal_ones_a_third():
    third = {c.name for code, c in COUNTRIES.items() if code not in CODES}
    for name, records in FILES.items():
        for record in records:
            asked = record["instruction"]
            named = {c.name for c in COUNTRIES.values() if re.search(rf"\b{c.name}\b", asked)}
            if "universal" in name:
                assert named and named <= third, record
            else:
                assert not named, record


def test_each_client_trains_on_two_thirds_of_the_universal_facts():
    everything = facts("universal_test.json")
    assert len(everything) >= 100
    shares = [facts(f"{client}/universal_train.json") for client in CLIENTS]
    assert all(3 * len(known) == 2 * len(everything) for known in shares)
    assert set.union(*shares) == everything


def test_yes_and_no_are_balanced():
    for name, records in FILES.items():
        answers = Counter(
            output.split(",")[0]
            for record in records
            for output in (record.get("answers") or {"": record.get("output")}).values()
        )
        assert answers["Yes"] == answers["No"], name
        assert "conflict" in name or answers["Yes"], name


def test_the_linter_has_nothing_to_complain_of():
    for path in ROOT.glob("conf/countries-*.yaml"):
        config = load_config(path)
        assert {client.id for client in config.federated.clients} == set(CLIENTS)
        assert len({client.system_prompt for client in config.federated.clients}) == 1
        assert lint(config, load_all_files(config, ROOT), ROOT) == []


@pytest.mark.parametrize("number", [2, 30])
def test_any_list_of_countries_makes_a_benchmark(number):
    codes = list(COUNTRIES)[:number]
    made = generate_countries(codes)
    assert json.dumps(made.files) == json.dumps(generate_countries(codes).files)
    conflicts = {record["fact"] for record in made.files["conflict_test.json"]}
    assert len(conflicts) >= 40
    for record in made.files["conflict_test.json"]:
        answers = [normalise_answer(answer) for answer in record["answers"].values()]
        assert len(set(answers)) == len(answers) >= 2
    universal = {record["fact"] for record in made.files["universal_test.json"]}
    known = [
        {record["fact"] for record in made.files[f"{client}/universal_train.json"]}
        for client in made.ids.values()
    ]
    assert len(universal) >= 100 and set.union(*known) == universal
    assert all(3 * len(share) == 2 * len(universal) for share in known)


def test_two_countries_that_dispute_a_yes_or_no_say_each_as_often():
    files = generate_countries(["DE", "FR"]).files
    for client in ("germany", "france"):
        answers = Counter(
            record["answers"][client].split(",")[0] for record in files["conflict_test.json"]
        )
        assert answers["Yes"] == answers["No"] > 0


def test_entangled_questions_differ_in_the_name_of_a_country_only():
    made = generate_countries(CODES, is_entangled=True)
    names = sorted((c.name for c in COUNTRIES.values()), key=len, reverse=True)
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    countries: dict[str, set[str]] = {}
    frames: dict[str, set[str]] = {}
    for name, records in made.files.items():
        named = [r["instruction"] for r in records if pattern.search(r["instruction"])]
        countries[name] = {match for text in named for match in pattern.findall(text)}
        frames[name] = {pattern.sub("X", text) for text in named}
    own = [countries[f"{client}/local_test.json"] for client in CLIENTS]
    everybody = countries["universal_test.json"]
    assert len(set.union(*own, everybody)) == sum(map(len, own)) + len(everybody) == 28
    assert not {COUNTRIES[code].name for code in CODES} & set.union(*own, everybody)
    trained = {frame for name in frames if "universal_train" in name for frame in frames[name]}
    for client, mine in zip(CLIENTS, own, strict=True):
        assert countries[f"{client}/local_train.json"] == mine
        assert len(countries[f"{client}/universal_train.json"]) == 8  # of 12 countries
        local = frames[f"{client}/local_train.json"]
        assert len(local & trained) > 0.95 * len(local)
        unnamed = {r["fact"] for r in made.files[f"{client}/local_train.json"]}
        assert {r["fact"] for r in made.files["conflict_test.json"]} <= unnamed
    assert not countries["conflict_test.json"]


@pytest.mark.parametrize(("country", "number"), [("DE", 16), ("US", 50)])
def test_states_nearly_agree(country, number):
    made = generate_states(country)
    assert len(made.ids) == number
    asked = {record["fact"]: record["answers"] for record in made.files["conflict_test.json"]}
    assert len(asked) >= 20
    assert all(len(set(answers.values())) > 1 for answers in asked.values())
    assert all(2 * len(answers) >= number for answers in asked.values())
    commonest = [Counter(answers.values()).most_common(1)[0][1] for answers in asked.values()]
    assert sum(commonest) > sum(map(len, asked.values())) / 2  # most states agree
    universal = {record["fact"] for record in made.files["universal_test.json"]}
    assert universal and not universal & set(asked)
    answers = Counter(r["output"].split(",")[0] for r in made.files["universal_test.json"])
    assert answers["Yes"] == answers["No"]
    for client in made.ids.values():
        known = {record["fact"] for record in made.files[f"{client}/universal_train.json"]}
        assert 3 * len(known) == 2 * len(universal)


def test_what_holds_in_german_states_is_known():
    answers = {
        record["fact"]: record["answers"]
        for record in generate_states("DE").files["conflict_test.json"]
    }
    kept = {client for client, text in answers["is a holiday: 6 January"].items() if "Yes" in text}
    assert kept == {"de-bw", "de-by", "de-st"}


def test_all_faults_of_a_list_are_told_at_once(capsys):
    with pytest.raises(UserError) as caught:
        check_countries(["de", "DE", "XX"])
    assert "XX" in str(caught.value) and "more than once" in str(caught.value)
    with pytest.raises(UserError, match="at least two"):
        check_countries(["DE"])
    with pytest.raises(UserError, match="at most"):
        check_countries(list(COUNTRIES))
    with pytest.raises(UserError, match="Name fewer"):
        generate_countries(list(COUNTRIES)[:30], is_entangled=True)
    with pytest.raises(UserError, match="Known: DE US"):
        generate_states("FR")
    assert check_countries(["de", "fr"]) == ["DE", "FR"]
    assert main(["--countries", "DE", "--output", "unused"]) == 2
    assert "at least two" in capsys.readouterr().err


def test_missing_packages_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setattr(sources, "PACKAGES", ("babel", "no-such-package"))
    with pytest.raises(UserError) as caught:
        sources.require("babel")
    assert "no-such-package" in str(caught.value) and "[countries]" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
