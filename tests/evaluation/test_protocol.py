"""The evaluation protocol on a real, tiny run: three clients, two rounds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from conftest import ALIKE, build_tiny_config
from loopback import Federation

from fedlora_app.config.loading import parse_config
from fedlora_app.config.schema import GLOBAL, LOCAL
from fedlora_app.data.client_files import build_question_sets
from fedlora_app.data.questions import CONFLICT
from fedlora_app.evaluation import choices as answering
from fedlora_app.evaluation import protocol
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.choices import (
    Cell,
    Evaluator,
    open_base_store,
    open_round,
    open_store,
)
from fedlora_app.evaluation.client_round import evaluate_questions
from fedlora_app.evaluation.evaluated_run import find_leading
from fedlora_app.evaluation.names import ACCURACY, EXACT_MATCH, PER_BYTE, PMI
from fedlora_app.evaluation.protocol import evaluate_round
from fedlora_app.evaluation.reported import collect_reports
from fedlora_app.evaluation.scores import Score
from fedlora_app.evaluation.scoring import Answered, Prompt
from fedlora_app.evaluation.semantic import Embedder
from fedlora_app.evaluation.shares import read_shares
from fedlora_app.evaluation.tables import build_evaluation, choose_scales
from fedlora_app.evaluation.text import describe_evaluation
from fedlora_app.model.base import ModelError
from fedlora_app.runs.paths import RunDirectoryError, RunPaths
from fedlora_app.runs.reading import load_run

CLIENTS = ("ann", "bob", "cy")


def tiny_config(**changes):
    validation = {"universal_validation": "universal_test.json"}
    evaluation = {"batch_size": 64, "max_new_tokens": 4, "local_scales": [0.5, 1.0]}
    sections = {"data": validation, "evaluation": evaluation}
    return build_tiny_config(CLIENTS, **(sections | changes))


@pytest.fixture(scope="module")
def runs(tiny_project, tmp_path_factory):
    """One finished run of each kind, made once."""
    made = {}

    def get(mode: str = "dual"):
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            adapters = ALIKE if mode == "finetuned" else {}
            config = tiny_config(federated={"mode": mode, "num_rounds": 2}, adapters=adapters)
            made[mode] = Federation(tiny_project, folder, config).run(mode)
        return made[mode]

    return get


def evaluate(run_dir, project, **options):
    saved = open_round(load_run(run_dir), project)
    return evaluate_round(saved, lambda *_: None, **options)


@pytest.fixture(scope="module")
def evaluated(runs, tiny_project):
    """The evaluation of the dual run, and how many prompts it scored."""
    original, counts = answering.score_prompts, []

    def counting(model, tokenizer, prompts, **settings):
        counts.append(len(prompts))
        return original(model, tokenizer, prompts, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "score_prompts", counting)
        return evaluate(runs(), tiny_project), sum(counts)


@pytest.fixture(scope="module")
def evaluation(evaluated):
    return evaluated[0]


def test_the_contract_is_kept(evaluation, runs, tiny_project):
    json.dumps(evaluation, allow_nan=False)
    keys = {"conflict_pass_rate", "local_accuracy", "universal_accuracy", "leakage"}
    for key in keys | {"keyword_pass_rate", "keyword_ceiling"}:
        assert set(evaluation["summary"][key]) == {"value", "low", "high", "n", "facts"}
    row = evaluation["swap_table"][0]
    assert {"question_set", "client", "adapters", "accuracy", "n"} <= set(row)
    question = evaluation["questions"][0]
    assert {"question_set", "instruction", "client", "scores", "generated", "correct"} <= set(
        question
    )
    assert evaluation["num_parameters"].keys() == {GLOBAL, LOCAL}
    history = json.loads((runs() / "history.json").read_text())
    steps = [v for e in history for k, v in e["metrics"].items() if k.endswith("/num_steps")]
    assert evaluation["num_steps"] == sum(steps) > 0


def test_one_figure_has_one_interval(evaluation):
    shares = read_shares(evaluation)
    own = shares["global+local:own"]
    for name in ("universal", "universal_unseen", "local", "conflict"):
        for measure in ("accuracy", "exact_match"):
            assert own[measure][name].dump() == evaluation["summary"][f"{name}_{measure}"]
    rows = [row for row in evaluation["questions"] if row["question_set"] == "conflict"]
    for measure, key in (("accuracy", "base_correct"), ("exact_match", "base_exact_match")):
        mean = sum(row[key] for row in rows) / len(rows)
        assert shares["base"][measure]["conflict"].value == pytest.approx(mean)
    conflict = shares["base"]["exact_match"]["conflict"]
    assert conflict.n == len({row["record"] for row in rows}) < len(rows)
    assert conflict.facts == len({row["fact"] or row["instruction"] for row in rows})
    assert shares["global+local:foreign"].keys() == own.keys()
    row = next(row for row in evaluation["swap_table"] if row["question_set"] == "local")
    assert 0 < row["facts"] <= row["n"]


def test_the_swap_table_holds_every_choice_of_adapters(evaluation):
    rows = [row for row in evaluation["swap_table"] if row["question_set"] == "local"]
    for client in CLIENTS:
        others = [other for other in CLIENTS if other != client]
        expected = {"base", "global", f"local:{client}", f"global+local:{client}"}
        expected |= {f"global+local:{other}" for other in others}
        assert {r["adapters"] for r in rows if r["client"] == client} == expected


def test_each_cell_equals_an_evaluation_of_its_own(evaluation, runs, tiny_project):
    """Sharing prompts between clients and sets must not mix up whose answer is whose."""
    saved = open_round(load_run(runs()), tiny_project)
    evaluator = Evaluator(saved, open_store(saved, runs() / "unused"), lambda *_: None)
    config = saved.run.config
    loaded, _ = evaluator.model.load()
    choices = {
        (): Answering(),
        (GLOBAL,): Answering(with_global=True),
        (GLOBAL, LOCAL): Answering(with_global=True, local="bob"),
    }
    sets = build_question_sets(config.client("ann"), saved.files["ann"])
    for active, choice in choices.items():
        with evaluator.model.answering(choice) as (model, _):
            scored = {
                name: evaluate_questions(
                    model,
                    loaded.tokenizer,
                    questions,
                    active=active,
                    system_prompt=config.client("ann").system_prompt,
                    settings=config.evaluation,
                )
                for name, questions in sets.items()
            }
        for name, scores in scored.items():
            row = next(
                row
                for row in evaluation["swap_table"]
                if (row["client"], row["question_set"], row["adapters"])
                == ("ann", name, choice.label)
            )
            margins = [m for score in scores if (m := score.value(ACCURACY)) is not None]
            assert row["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
            assert row["exact_match"] == sum(s.value(EXACT_MATCH) for s in scores) / len(scores)


def test_the_run_s_own_figures_are_found_again(evaluation, runs):
    """What the clients reported after the last round is what the saved adapters give."""
    history = json.loads((runs() / "history.json").read_text())
    for entry in history:
        if entry["round"] == 2 and entry["phase"] == "evaluate":
            for name in ("universal", "local", "conflict"):
                row = next(
                    row
                    for row in evaluation["swap_table"]
                    if row["client"] == entry["client"]
                    and row["question_set"] == name
                    and row["adapters"] == f"global+local:{entry['client']}"
                )
                reported = entry["metrics"][f"global+local/{name}/rank_accuracy"]
                assert row["accuracy"] == pytest.approx(reported)


def test_a_conflict_passes_only_if_every_client_is_right(evaluation):
    by_record = {}
    for row in evaluation["questions"]:
        if row["question_set"] == CONFLICT and row["scale"] == 1.0:
            by_record.setdefault(row["record"], []).append(row["correct"])
    for verdict in evaluation["conflicts"]:
        assert verdict["passed"] == all(by_record[verdict["record"]])
        assert len(verdict["interaction"]) == 3
    rate = evaluation["summary"]["conflict_pass_rate"]
    assert rate["value"] == sum(v["passed"] for v in evaluation["conflicts"]) / rate["n"]


@pytest.mark.parametrize("mode", ["fedavg", pytest.param("local-only", marks=pytest.mark.slow)])
def test_baselines_have_the_choices_that_there_are(runs, tiny_project, mode):
    found = evaluate(runs(mode), tiny_project)
    labels = {row["adapters"].split(":")[0] for row in found["swap_table"]}
    assert labels == ({"base", "global"} if mode == "fedavg" else {"base", "local"})
    assert bool(found["summary_chosen_scale"]) == (mode == "local-only")
    assert (found["summary"]["leakage"]["value"] is None) == (mode == "local-only")


def test_a_fine_tuned_copy_stands_beside_the_average_that_it_was_made_from(runs, tiny_project):
    found = evaluate(runs("finetuned"), tiny_project)
    for client in CLIENTS:
        rows = {row["adapters"] for row in found["swap_table"] if row["client"] == client}
        assert rows == {"base", "global", *(f"local:{c}" for c in CLIENTS)}
    assert found["answering"] == "local" and found["summary_chosen_scale"]
    # All of these compare the copy or the average with something else.
    for figure in ("leakage", "specificity", "leakage_conflict", "specificity_conflict"):
        assert found["summary"][figure]["n"]
    # The average is not what it had before the last round, and answers for itself before that.
    before = open_round(load_run(runs("finetuned")), tiny_project, 1)
    assert before.own("ann") == Answering(with_global=True) and set(before.hashes) == {GLOBAL}
    assert before.swaps("ann") == [Answering(), Answering(with_global=True)]


def test_gold_answers_give_every_metric_its_known_value(runs, tiny_project, embedder_name):
    """In the place of a model: each client's own adapters say its gold answers, others never."""
    saved = open_round(load_run(runs()), tiny_project)

    class Gold(Evaluator):
        def _answer(self, answering, prompts, done, total):
            known = {
                (config.client(client).system_prompt, question.text): question.answer
                for client, files in saved.files.items()
                if client == answering.local
                for questions in build_question_sets(config.client(client), files).values()
                for question in questions
            }
            answers = []
            for prompt in prompts:
                gold = known.get((prompt.system_prompt, prompt.question))
                values = tuple(-1.0 if text == gold else -9.0 for text in prompt.candidates)
                answers.append(answering_module.Answered(values, gold or "nothing"))
            self.store.add(self._identify(answering), prompts, answers)

    answering_module = answering
    config = saved.run.config
    embedder = Embedder.load(embedder_name, tiny_project)
    evaluator = Gold(saved, open_store(saved, runs() / "gold"), lambda *_: None, embedder)
    cells = []
    for client in saved.clients:
        sets = build_question_sets(config.client(client), saved.files[client])
        for name, questions in sets.items():
            prompt = config.client(client).system_prompt
            for choice in saved.swaps(client):
                cells.append(Cell(client, name, choice, prompt, tuple(questions)))
    found = build_evaluation(saved, evaluator.evaluate(cells), {}, {}, None, {})
    evaluator.store.remove()
    summary = found["summary"]
    for name in ("conflict", "local", "universal", "universal_unseen"):
        for suffix in ("accuracy", "accuracy_per_byte", "accuracy_pmi", "accuracy_semantic"):
            assert summary[f"{name}_{suffix}"]["value"] == 1.0, (name, suffix)
        assert summary[f"{name}_exact_match"]["value"] == 1.0
    for suffix in ("", "_per_byte", "_pmi", "_semantic", "_exact_match"):
        assert summary[f"conflict_pass_rate{suffix}"]["value"] == 1.0
    assert summary["leakage"]["value"] == summary["leakage_exact_match"]["value"] == 0.0
    assert summary["specificity_exact_match"]["value"] == 1.0
    for row in found["swap_table"]:
        own = row["adapters"].endswith(f"local:{row['client']}")
        assert row["exact_match"] == float(own)
        assert row["rouge_l"] == 1.0 if own else row["rouge_l"] < 1.0
    for verdict in found["conflicts"]:
        assert verdict["interaction"] == dict.fromkeys(verdict["interaction"], 16.0)


def test_the_core_has_the_same_answers_and_no_others(runs, tiny_project, evaluation, tmp_path):
    run = shutil.copytree(runs(), tmp_path / "run")
    core = evaluate(run, tiny_project, full=False)
    assert (core["protocol"], evaluation["protocol"]) == ("core", "full")
    assert "Only the core" in core["notes"][0] and not core["scales"] and not core["controls"]
    answerers = {"base", "global", "global+local:own"}
    assert {row["answered_by"] for row in core["shares"]} == answerers
    for row in core["shares"]:
        assert row in evaluation["shares"]
    for name, figure in core["summary"].items():
        if not name.startswith("specificity"):
            assert figure == evaluation["summary"][name]
    assert core["summary"]["specificity"]["n"] == 0
    said = [
        [(row["instruction"], row["generated"], row["correct"]) for row in found["questions"]]
        for found in (core, evaluation)
    ]
    assert said[0] == said[1][: len(said[0])]  # the others are at the chosen scales


def test_runs_can_share_what_the_base_answers(runs, tiny_project, tmp_path, monkeypatch):
    shared, asked = tmp_path / "base", []

    def watch(model, tokenizer, prompts, **settings):
        asked.append(len(prompts))
        return original(model, tokenizer, prompts, **settings)

    original = answering.score_prompts
    monkeypatch.setattr(answering, "score_prompts", watch)
    found = []
    for name, base_answers in (("dual", shared), ("fedavg", shared), ("fedavg", None)):
        asked.clear()
        run = shutil.copytree(runs(name), tmp_path / f"{name}-{len(found)}")
        found.append(
            (evaluate(run, tiny_project, full=False, base_answers=base_answers), sum(asked))
        )
        assert not load_run(run).paths.partial_evaluation.exists()
    (_, _), (with_shared, few), (alone, many) = found
    assert few == many - len(list(filter(None, shared.read_text().split("\n")))) < many
    assert with_shared["swap_table"] == alone["swap_table"]


@pytest.mark.parametrize(
    ("section", "change", "is_shared"),
    [
        ("adapters", {"gate": "prompt"}, True),
        ("training", {"learning_rate": 1e-5}, True),
        ("evaluation", {"max_new_tokens": 9}, False),
        ("evaluation", {"batch_size": 3}, False),
        ("model", {"dtype": "bfloat16"}, False),
    ],
)
def test_what_the_base_answers_depends_on(runs, tiny_project, section, change, is_shared, tmp_path):
    saved = open_round(load_run(runs()), tiny_project)
    question = Prompt("You help.", "Why?", ("So.",))
    open_base_store(saved, tmp_path / "base").add("base ", [question], [Answered((-1.0,), "So.")])
    raw = saved.run.config.dump()
    raw[section] |= change
    other = replace(saved, run=replace(saved.run, config=parse_config(raw)))
    found = open_base_store(other, tmp_path / "base").get("base ", question)
    assert (found is not None) == is_shared
    assert open_store(other, tmp_path / "base").get("base ", question) is None


def test_meanings_are_compared_if_asked_for(
    runs, tiny_project, embedder_name, evaluation, tmp_path
):
    run = shutil.copytree(runs("fedavg"), tmp_path / "run")
    found = evaluate(run, tiny_project, full=False, semantic_model=embedder_name)
    assert found["semantic_model"] == embedder_name and evaluation["semantic_model"] is None
    rate = found["summary"]["conflict_pass_rate_semantic"]
    assert rate["n"] and 0 <= rate["value"] <= 1
    assert evaluation["summary"]["conflict_pass_rate_semantic"]["n"] == 0
    for row in found["questions"]:
        assert -2 <= row["scores"]["margin_semantic"] <= 2
    text, without = map(describe_evaluation, (found, evaluation))
    assert " meant " in text and f"as {embedder_name} finds" in text and " meant " not in without


def test_a_stopped_evaluation_goes_on_where_it_was(runs, tiny_project, evaluated, monkeypatch):
    evaluation, num_all = evaluated
    saved = open_round(load_run(runs()), tiny_project)
    partial = RunPaths(runs()).partial_evaluation
    original = answering.score_prompts
    scored = []

    def counting(model, tokenizer, prompts, **settings):
        if len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(len(prompts))
        return original(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(answering, "score_prompts", counting)
    stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate_round(saved, lambda *_: None)
    assert partial.exists()
    with partial.open("a", encoding="utf-8") as file:
        file.write('["half a li')  # what a kill in the middle of a line leaves
    first = sum(scored)
    scored.clear()
    stop_after = -1
    again = evaluate_round(saved, lambda *_: None)
    assert not partial.exists()
    everything = {k: v for k, v in evaluation.items() if k != "evaluated"}
    assert {k: v for k, v in again.items() if k != "evaluated"} == everything
    assert first > 0 and 0 < sum(scored) < num_all == first + sum(scored)


def test_a_changed_adapter_is_not_evaluated(runs, tiny_project, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs(), copy)
    weights = copy / "clients" / "ann" / "round_002" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"ann.*is not the file that the run wrote"):
        open_round(load_run(copy), tiny_project)
    with pytest.raises(RunDirectoryError, match="no complete round 7"):
        open_round(load_run(copy), tiny_project, 7)


def test_an_earlier_round_is_evaluated_with_its_own_adapters(runs, tiny_project, evaluation):
    saved = open_round(load_run(runs()), tiny_project, 1)
    earlier = evaluate_round(saved, lambda *_: None)
    assert earlier["round"] == 1 and earlier["adapters"] != evaluation["adapters"]
    assert saved.run.evaluation_path(1).name == "evaluation_round_001.json"


def test_the_scale_with_the_best_mean_is_chosen_and_the_nearest_to_one_of_several(evaluation):
    def cell(scale: float) -> Cell:
        return Cell("ann", "local", Answering(True, "ann", scale), "", ())

    score = Score({"accuracy": 1.0, "exact_match": True}, "x")
    wrong = Score({"accuracy": -1.0, "exact_match": False}, "y")
    results = {
        cell(0.25): [wrong, wrong],
        cell(0.75): [score, score],
        cell(1.5): [score, score],
        cell(1.0): [score, wrong],
    }
    chosen, curves = choose_scales(results)
    assert chosen == {"ann": 0.75}
    assert [row["scale"] for row in curves["ann"]] == [0.25, 0.75, 1.0, 1.5]
    assert [row["local"] for row in curves["ann"]] == [0.0, 1.0, 0.5, 1.0]


def test_another_base_model_is_refused(runs, tiny_project, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs(), copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["base_model"]["fingerprint"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="is not the one that the run was trained on") as caught:
        evaluate(copy, tiny_project)
    assert "older version" not in str(caught.value)
    del manifest["base_model"]["fingerprint_covers"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="The run's fingerprint is an older version's"):
        evaluate(copy, tiny_project)


@pytest.mark.slow
def test_a_client_without_validation_questions_stays_at_scale_1(tiny_project, tmp_path):
    clients = tiny_config().dump()["federated"]["clients"]
    clients[0]["local_validation"] = "ann_local.json"
    config = tiny_config(
        data={"universal_validation": None}, federated={"clients": clients, "num_rounds": 1}
    )
    found = evaluate(Federation(tiny_project, tmp_path, config).run("some"), tiny_project)
    assert set(found["scales"]) == {"ann"}
    assert found["summary_chosen_scale"]["local_accuracy"]["n"] > 0
    assert "own local" in describe_evaluation(found)


def test_answers_that_generation_cuts_off_are_said_and_ranked_first(evaluation):
    assert any("right answers are longer" in warning for warning in evaluation["warnings"])
    measures = {find_leading(evaluation, name) for name in ("universal", "conflict")}
    assert measures == {ACCURACY}  # limit 4
    assert find_leading({}, "universal") is EXACT_MATCH


def test_a_changed_data_file_is_noted(runs, tiny_project, evaluation):
    path = tiny_project / "universal_test.json"
    content = path.read_text()
    try:
        path.write_text(content + "\n")
        found = evaluate(runs(), tiny_project, full=False)
    finally:
        path.write_text(content)
    assert any("universal_test.json (universal of ann) was changed" in n for n in found["notes"])
    assert not any("was changed" in note for note in evaluation["notes"])


def test_specificity_is_measured_at_the_chosen_scale_too(runs, tiny_project, monkeypatch):
    """Own and foreign adapters at one scale; nothing is left out where it is not 1."""
    monkeypatch.setattr(
        protocol,
        "choose_scales",
        lambda scores: (dict.fromkeys(CLIENTS, 0.5), {c: [] for c in CLIENTS}),
    )
    found = evaluate(runs(), tiny_project)
    rows = [row for row in found["swap_table"] if row["scale"] == 0.5]
    assert {row["adapters"] for row in rows if row["client"] == "ann"} == {
        f"global+local:{client}" for client in CLIENTS
    }
    own, foreign = [], []
    for row in rows:
        if row["question_set"] == "local":
            side = own if row["adapters"].endswith(f":{row['client']}") else foreign
            side.append((row["client"], row["accuracy"] * row["n"], row["n"]))
    total = sum(n for _, _, n in own)
    expected = (sum(v for _, v, _ in own) - sum(v for _, v, _ in foreign) / 2) / total
    entry = found["summary_chosen_scale"]["specificity"]
    assert entry["n"] == total and entry["value"] == pytest.approx(expected)


def test_a_run_ranks_as_its_evaluation_does(runs, evaluation):
    """Raw, per byte and PMI, the last with likelihoods that the client kept for the round."""
    reports = collect_reports(json.loads((runs() / "history.json").read_text()))
    compared = 0
    for row in evaluation["swap_table"]:
        own = f"{GLOBAL}+{LOCAL}:{row['client']}"
        if row["adapters"] == own and row["scale"] == 1.0:
            for measure in (ACCURACY, PER_BYTE, PMI):
                key = f"{GLOBAL}+{LOCAL}/{row['question_set']}/{measure.reported}"
                assert reports[row["client"]][key] == pytest.approx(row[measure.name])
                compared += 1
    assert compared >= 3 * 3 * len(CLIENTS)
