from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_config, build_tiny_model

from fedlora_app.config.schema import GLOBAL, TrainingConfig
from fedlora_app.data.client_files import ClientFiles, load_client_files
from fedlora_app.data.records import ConflictRecord, Record, RecordFile, format_question
from fedlora_app.data.tokens import encode_example
from fedlora_app.evaluation import membership
from fedlora_app.evaluation.membership import (
    ATTACKS,
    attack_scores,
    compute_min_k,
    measure_membership,
    measure_pairs,
    true_positive_rate,
)
from fedlora_app.evaluation.membership_pairs import build_answer_pairs, build_pairs
from fedlora_app.evaluation.protocol import infer_membership
from fedlora_app.evaluation.scoring import score_examples
from fedlora_app.evaluation.statistics import (
    NOTHING,
    area_under_curve,
    clustered_area,
    proportion,
)
from fedlora_app.evaluation.text import describe_membership
from fedlora_app.model.adapters import activate, build_initial_state, only_adapters, set_state
from fedlora_app.training.phase import train_phase

WORDS = ["apple", "river", "stone", "cloud", "green", "seven", "paper", "music", "horse", "light"]
PROMPT = "You are ann."


def draw_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def draw_records(seed: int, count: int, num_distractors: int = 0) -> list[Record]:
    rng = random.Random(seed)
    return [
        Record(
            instruction=draw_text(rng, 5),
            output=draw_text(rng, 4),
            fact=f"fact {index}",
            distractors=tuple(draw_text(rng, 4) for _ in range(num_distractors)),
        )
        for index in range(count)
    ]


def reword(records: list[Record], seed: int) -> list[Record]:
    """The same facts and answers, asked in other words."""
    rng = random.Random(seed)
    return [replace(record, instruction=draw_text(rng, 6)) for record in records]


def as_file(records: list) -> RecordFile:
    return RecordFile(Path("memory.json"), "", records)


def as_files(universal, local, universal_test=(), local_test=(), conflict=()) -> ClientFiles:
    sets = {"universal": universal_test, "local": local_test, "conflict": conflict}
    tests = {name: as_file(list(records)) for name, records in sets.items() if records}
    return ClientFiles(as_file(universal), as_file(local), tests)


def count_words(text: str) -> int:
    return len(text.split())


def train_global(model, tokenizer, records: list[Record], num_steps: int) -> None:
    settings = TrainingConfig(
        learning_rate=1e-2, batch_size=12, gradient_accumulation_steps=1, warmup_ratio=0.0
    )
    train_phase(
        model,
        [encode_example(tokenizer, PROMPT, record) for record in records],
        settings,
        active=(GLOBAL,),
        trainable=(GLOBAL,),
        num_steps=num_steps,
        run_span=(0.0, 0.0),
        weight_decays={GLOBAL: 0.0},
        seed=1,
    )


@pytest.fixture
def untrained(adapted):
    set_state(adapted, GLOBAL, build_initial_state(adapted, GLOBAL, seed=3))
    return adapted


@pytest.fixture(scope="module")
def secrets() -> ClientFiles:
    """Every record has an answer of its own, and the tests are about other facts."""
    return as_files(
        draw_records(1, 16),
        [replace(r, fact=f"local {r.fact}") for r in draw_records(2, 16, num_distractors=2)],
        [replace(r, fact=f"unseen {r.fact}") for r in draw_records(3, 16)],
        [replace(r, fact=f"local unseen {r.fact}") for r in draw_records(4, 16)],
    )


def infer(model, tokenizer, files: ClientFiles) -> dict[tuple[str, str], dict]:
    config = build_tiny_config(("ann",))
    rows = infer_membership(model, tokenizer, {"ann": files}, config, batch_size=16)
    return {(row["set"], row["attack"]): row for row in rows}


def covers_half(estimate: dict) -> bool:
    return estimate["low"] <= 0.5 <= estimate["high"]


def score_records(model, tokenizer, records, active, batch_size=1, max_seq_length=None):
    examples = [
        membership.Candidate.of(record, PROMPT).encode(tokenizer, max_seq_length)
        for record in records
    ]
    with only_adapters(model, active):
        return score_examples(model, examples, batch_size)


@pytest.mark.parametrize("active", [(GLOBAL,), ()])
def test_log_probabilities_are_those_of_transformers(adapted, tokenizer, active):
    records = draw_records(5, 7)
    ours = score_records(adapted, tokenizer, records, active, batch_size=3)
    plain = build_tiny_model(len(tokenizer))
    activate(adapted, (GLOBAL,))
    for record, values in zip(records, ours, strict=True):
        example = encode_example(tokenizer, PROMPT, record)
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = (adapted if active else plain)(ids).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values), expected[example.answer_start - 1 :])


def test_records_are_cut_where_training_cuts_them(adapted, tokenizer):
    record = draw_records(5, 1)[0]
    example = encode_example(tokenizer, PROMPT, record)
    limit = example.answer_start + 2
    whole, cut = (
        score_records(adapted, tokenizer, [record], (GLOBAL,), max_seq_length=length)[0]
        for length in (None, limit)
    )
    assert len(whole) == example.num_answer_tokens and len(cut) == 2
    assert cut == pytest.approx(whole[:2])


def test_an_untrained_adapter_gives_nothing_away(untrained, tokenizer, secrets):
    rows = infer(untrained, tokenizer, secrets)
    assert set(rows) == {
        (name, attack) for name in ("universal", "local", "local_answers") for attack in ATTACKS
    }
    for name in ("universal", "local", "local_answers"):
        for attack in ("calibrated_loss", "calibrated_min_k"):
            row = rows[name, attack]
            assert row["auc"]["value"] == row["pairs_won"]["value"] == 0.5
            assert row["n_members"] == row["n_nonmembers"] == 16
        assert rows[name, "loss"]["auc"] == rows[name, "base_loss"]["auc"]


def test_what_the_adapter_was_trained_on_is_found_and_nothing_else(untrained, tokenizer, secrets):
    train_global(untrained, tokenizer, secrets.universal.records, 60)
    rows = infer(untrained, tokenizer, secrets)
    for attack in set(ATTACKS) - {"base_loss"}:
        assert rows["universal", attack]["auc"]["value"] > 0.95
    assert covers_half(rows["universal", "base_loss"]["auc_by_fact"])
    for name in ("local", "local_answers"):
        assert covers_half(rows[name, "calibrated_loss"]["auc_by_fact"])


def test_private_answers_in_the_global_adapter_are_found(untrained, tokenizer, secrets):
    train_global(untrained, tokenizer, secrets.local.records, 60)
    rows = infer(untrained, tokenizer, secrets)
    for name in ("local", "local_answers"):
        assert rows[name, "calibrated_loss"]["auc"]["value"] > 0.95
    assert covers_half(rows["universal", "calibrated_loss"]["auc_by_fact"])


def test_remembered_wording_is_told_from_the_same_fact_in_other_words(untrained, tokenizer):
    members = draw_records(6, 16)
    files = as_files(members, draw_records(7, 2), reword(members, 8))
    train_global(untrained, tokenizer, members, 60)
    row = infer(untrained, tokenizer, files)["universal", "calibrated_loss"]
    assert row["n_by_length"] == row["n_dropped"] == 0
    assert row["auc"]["low"] > 0.5 and row["pairs_won"]["low"] > 0.5


def test_trained_questions_never_count_as_non_members(untrained, tokenizer, tiny_project):
    config = build_tiny_config(("ann", "bob"))
    files = {c: load_client_files(config, config.client(c), tiny_project) for c in ("ann", "bob")}
    assert files["ann"].tests["local"].records == files["ann"].local.records
    seen: list[tuple[int, int]] = []
    rows = infer_membership(
        untrained, tokenizer, files, config, 4, progress=lambda *step: seen.append(step)
    )
    by_set = {(row["client"], row["set"]): row for row in rows}
    assert by_set["ann", "universal"]["n_members"] == 4
    assert by_set["ann", "local"]["n_members"] == 0
    assert by_set["ann", "local"]["n_dropped"] == 3
    assert by_set["ann", "local"]["auc"] == NOTHING.dump()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    text = describe_membership(rows)
    assert "AUC 0.5" in text and "…" not in text
    assert "ann, local: 3 records have no partner left" in text


def test_a_member_gets_a_partner_of_its_fact_with_its_answer():
    member = Record("What is the fee?", "It is 5.", fact="fee")
    other_answer = Record("How high is it?", "Five dollars.", fact="fee")
    same_answer = Record("How much is it?", "It is 5.", fact="fee")
    other_fact = Record("How long is it?", "It is 5.", fact="term")
    pairs = build_pairs([member], [other_fact, other_answer, same_answer], count_words)
    assert pairs.nonmembers == [same_answer] and pairs.num_by_length == 0
    trained = frozenset({"how much is it"})
    pairs = build_pairs([member], [other_fact, other_answer, same_answer], count_words, trained)
    assert pairs.nonmembers == [other_answer]
    pairs = build_pairs([member], [other_fact], count_words)
    assert pairs.nonmembers == [other_fact] and pairs.num_by_length == 1


@pytest.mark.parametrize("seed", range(6))
def test_the_same_answer_goes_before_any_other(seed):
    rng = random.Random(seed)
    members = [Record(draw_text(rng, 5), f"It is {n}.", fact="fee") for n in range(4)]
    candidates = [Record(draw_text(rng, 6), f"It is {n}.", fact="fee") for n in range(4)]
    pairs = build_pairs(members, candidates, count_words)
    assert all(member.output == partner.output for member, partner in zip_pairs(pairs))
    assert len(pairs.members) == 4


def test_records_without_a_fact_are_matched_by_the_length_of_their_answers():
    members = [Record(f"Question {n}?", "word " * n) for n in (2, 7, 11)]
    candidates = [Record(f"Other {n}?", "else " * n) for n in (1, 6, 12, 30)]
    pairs = build_pairs(members, candidates, count_words)
    lengths = {count_words(m.output): count_words(c.output) for m, c in zip_pairs(pairs)}
    assert lengths == {2: 1, 7: 6, 11: 12}
    assert build_pairs(members[2:], candidates, count_words).nonmembers == [candidates[2]]
    about_fee = Record("Fee?", "word word", fact="fee")
    partner = Record("Which fee?", "something else entirely", fact="fee")
    pairs = build_pairs([about_fee, members[0]], [partner], count_words)
    assert zip_pairs(pairs) == [(about_fee, partner)] and pairs.num_dropped == 1


def zip_pairs(pairs) -> list[tuple[Record, Record]]:
    return list(zip(pairs.members, pairs.nonmembers, strict=True))


def test_matching_uses_nobody_twice_and_does_not_depend_on_the_order():
    members = [record for seed in range(6) for record in reword(draw_records(9, 5), seed)]
    members += [replace(record, fact=None) for record in draw_records(10, 6)]
    candidates = [record for seed in (20, 21) for record in reword(draw_records(9, 5), seed)]
    candidates += [replace(record, fact=None) for record in draw_records(11, 4)]
    pairs = build_pairs(members, candidates, count_words)
    questions = [format_question(record) for record in pairs.nonmembers]
    assert len(questions) == len(set(questions)) == 14
    assert pairs.num_by_length == 4 and pairs.num_dropped == len(members) - 14
    assert all(member.fact == partner.fact for member, partner in zip_pairs(pairs))
    for seed in range(5):
        rng = random.Random(seed)
        shuffled = [rng.sample(records, len(records)) for records in (members, candidates)]
        assert build_pairs(*shuffled, count_words) == pairs
    copies = [replace(record) for record in members]
    assert build_pairs(members + copies, candidates, count_words) == pairs


def test_wrong_answers_are_distractors_that_no_client_gives():
    mine = [Record("How late?", "Ten.", fact="night"), Record("Bees?", "Yes.", fact="bees")]
    mine += [Record("Drones?", "No.", fact="drones")]
    theirs = [Record("How late?", "Nine.", fact="night"), Record("Bees?", "No.", fact="bees")]
    test = [Record("Until when?", "Ten.", fact="night", distractors=("Nine.", "Ten.", "Six."))]
    conflict = [ConflictRecord("Bees here?", answers={"ann": "Yes.", "bob": "No."}, fact="bees")]
    files = {
        "ann": as_files(mine, mine, local_test=test, conflict=conflict),
        "bob": as_files(theirs, theirs),
    }
    pairs = build_answer_pairs("ann", files)
    assert {m.instruction: (m.output, w.output) for m, w in zip_pairs(pairs)} == {
        "How late?": ("Ten.", "Six."),
        "Bees?": ("Yes.", "No."),
    }
    assert all(m.instruction == w.instruction for m, w in zip_pairs(pairs))
    assert pairs.num_dropped == 1
    asked = [replace(mine[0], instruction=f"How late on day {n}?") for n in range(16)]
    files["ann"] = as_files(mine, asked, local_test=test)
    assert {wrong.output for wrong in build_answer_pairs("ann", files).nonmembers} == {"Six."}


def test_min_k_is_the_mean_of_the_lowest_fifth():
    assert compute_min_k([-3.0, -1.0, -2.0]) == -3.0
    assert compute_min_k([-1.0, -9.0, -2.0, -7.0, *[-0.5] * 6]) == -8.0
    assert compute_min_k([float(-n) for n in range(14)]) == pytest.approx(-12.5)


def test_scores_on_hand_made_numbers():
    scores = attack_scores([[-1.0, -3.0], [-1.0]], [[-2.0, -6.0], [-0.5]])
    assert scores == {
        "calibrated_loss": [2.0, -0.5],
        "loss": [-2.0, -1.0],
        "calibrated_min_k": [3.0, -0.5],
        "min_k": [-3.0, -1.0],
        "base_loss": [-4.0, -0.5],
    }


def test_true_positive_rates_need_enough_non_members():
    members, nonmembers = [0.5, 1.0, 2.0, 9.5], [float(n) for n in range(10)]
    measured = measure_membership(members, nonmembers)
    assert measured["tpr_at_fpr"] == {"0.01": None, "0.1": 0.25}
    assert measured["n_members"] == 4 and measured["n_nonmembers"] == 10
    assert measure_membership(members, nonmembers[:9])["tpr_at_fpr"]["0.1"] is None
    assert true_positive_rate([98.0, 98.5], [float(n) for n in range(100)], 0.01) == 0.5


def test_an_interval_by_cluster_is_delongs_without_clusters_and_ignores_repetition():
    rng = random.Random(0)
    ones, others = [rng.gauss(0.5, 1) for _ in range(20)], [rng.gauss(0, 1) for _ in range(30)]
    names, other_names = [f"m{n}" for n in range(20)], [f"n{n}" for n in range(30)]
    plain = area_under_curve(ones, others)
    single = clustered_area(ones, others, names, other_names)
    assert (single.value, single.low, single.high) == pytest.approx(
        (plain.value, plain.low, plain.high)
    )
    repeated = clustered_area(ones * 5, others * 5, names * 5, other_names * 5)
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert repeated.n == 50
    too_narrow = area_under_curve(ones * 5, others * 5)
    assert too_narrow.high - too_narrow.low < 0.6 * (single.high - single.low)


def test_scores_that_do_not_overlap_leave_a_width_by_cluster_too():
    members, nonmembers = [10.0 + n for n in range(12)], [float(n) for n in range(8)]
    facts, others = [str(n // 2) for n in range(12)], [f"other {n}" for n in range(8)]
    area = clustered_area(members, nonmembers, facts, others)
    assert area.value == area.high == 1 and area.low == 1 - proportion([0] * 6).high


def test_pairs_show_what_differences_between_facts_hide():
    members = [10.0 * n + 0.1 for n in range(12)]
    nonmembers = [10.0 * n for n in range(12)]
    facts = [str(n) for n in range(12)]
    assert measure_membership(members, nonmembers)["auc"]["value"] < 0.6
    measured = measure_pairs(members, nonmembers, facts, facts)
    assert measured["pairs_won"]["value"] == 1.0 and measured["pairs_won"]["low"] > 0.7
    assert measured["auc_by_fact"]["low"] > 0.5
    tied = measure_pairs(nonmembers, nonmembers, facts, facts)
    assert tied["pairs_won"]["value"] == tied["auc_by_fact"]["value"] == 0.5
