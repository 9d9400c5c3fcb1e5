"""Conversations with the adapters of a real, tiny run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ALIKE, build_tiny_config
from loopback import Federation
from rich.console import Console

from fedlora_app.config.schema import ConfigError
from fedlora_app.data.dialogue import encode_prompt
from fedlora_app.evaluation.answering import Answering
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.saved_model import SavedModel
from fedlora_app.evaluation.scoring import Prompt, score_prompts
from fedlora_app.runs.reading import load_run
from fedlora_app.serving import conversation as conversation_module
from fedlora_app.serving.conversation import (
    DEFAULT_SYSTEM_PROMPT,
    GLOBAL_ALONE,
    Conversation,
    QuestionError,
    Reply,
    Side,
    answer_side_by_side,
    open_conversation,
    tabulate_sides,
)

QUESTION = "What is the red rule?"
LIMIT = 12


@pytest.fixture(scope="module")
def runs(tiny_project, tmp_path_factory):
    """One finished round of each kind, opened once."""
    made = {}

    def get(mode: str = "dual", gate: str = "none") -> SavedModel:
        if (mode, gate) not in made:
            config = build_tiny_config(
                federated={"mode": mode, "num_rounds": 1},
                adapters={"gate": gate} | (ALIKE if mode == "finetuned" else {}),
                training={"learning_rate": 2e-2, "local_weight_decay": 0.0},
                evaluation={"batch_size": 8, "max_new_tokens": LIMIT},
            )
            folder = tmp_path_factory.mktemp(mode)
            path = Federation(tiny_project, folder, config).run("run")
            made[mode, gate] = SavedModel(load_run(path), 1, tiny_project)
        return made[mode, gate]

    return get


def generate(saved: SavedModel, who: Answering, system_prompt: str, question: str) -> str:
    """What the evaluation would note as the greedy answer."""
    with saved.answering(who) as (model, gate):
        (answered,) = score_prompts(
            model,
            saved.load()[0].tokenizer,
            [Prompt(system_prompt, question)],
            batch_size=8,
            max_new_tokens=LIMIT,
            combiner=gate,
        )
    return answered.generated


@pytest.mark.parametrize("mode", ["dual", "fedavg", "local-only"])
def test_the_streamed_pieces_are_the_answer_that_an_evaluation_gets(runs, mode):
    saved = runs(mode)
    for client in ("ann", "bob"):
        pieces = []
        reply = open_conversation(saved, client).ask(QUESTION, pieces.append)
        expected = generate(saved, saved.own(client), f"You are {client}.", QUESTION)
        assert reply.text == expected == "".join(pieces)
        assert len(list(filter(None, pieces))) > 2


def test_later_prompts_hold_what_was_said_before(runs, tokenizer, monkeypatch):
    prompts = []
    original = conversation_module.generate_answer

    def spy(model, tokenizer, prompt_ids, **settings):
        prompts.append(prompt_ids)
        return original(model, tokenizer, prompt_ids, **settings)

    monkeypatch.setattr(conversation_module, "generate_answer", spy)
    talk = open_conversation(runs(), "ann")
    first, second = talk.ask(QUESTION), talk.ask("And the blue one?")
    assert prompts[0] == encode_prompt(tokenizer, "You are ann.", QUESTION)
    assert tokenizer.decode(prompts[1]) == (
        "<|im_start|>system\nYou are ann.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n"
        f"<|im_start|>assistant\n{first.text}<|im_end|>\n"
        "<|im_start|>user\nAnd the blue one?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert talk.turns == [(QUESTION, first.text), ("And the blue one?", second.text)]
    assert first.num_dropped == second.num_dropped == 0


def test_the_oldest_turns_go_when_the_context_is_full(runs, tokenizer):
    """The tiny model takes 256 tokens."""
    talk = open_conversation(runs(), "ann", max_new_tokens=8)
    kept = dropped = 0
    for number in range(12):
        reply = talk.ask(f"What is the rule number {number}?")
        dropped += reply.num_dropped
        kept = len(talk.turns)
        used = encode_prompt(tokenizer, "You are ann.", talk.turns[-1][0], talk.turns[:-1])
        assert len(used) + 8 <= 256
    assert dropped > 0 and kept + dropped == 12
    assert talk.turns[-1][0] == "What is the rule number 11?"


def test_what_cannot_be_asked_is_said_and_changes_nothing(runs):
    talk = open_conversation(runs(), "ann")
    talk.ask(QUESTION)
    before = list(talk.turns)
    with pytest.raises(QuestionError, match="is empty"):
        talk.ask("  ")
    with pytest.raises(QuestionError, match="not UTF-8"):
        talk.ask("What is \udcff?")
    with pytest.raises(QuestionError, match="takes 256 in all"):
        talk.ask("What is the rule? " * 100)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("And now?", interrupt)
    assert talk.turns == before
    assert open_conversation(runs(), "ann").ask(QUESTION).text == before[0][1]


def test_another_system_prompt_is_used_as_given(runs):
    saved = runs()
    for prompt in ("", "You are someone else."):
        reply = open_conversation(saved, "ann", system_prompt=prompt).ask(QUESTION)
        assert reply.text == generate(saved, saved.own("ann"), prompt, QUESTION)


def test_an_answer_that_reaches_the_limit_is_marked(runs):
    saved = runs()
    short = open_conversation(saved, "ann", max_new_tokens=2).ask(QUESTION)
    longer = open_conversation(saved, "ann", max_new_tokens=100).ask(QUESTION)
    assert short.is_cut_off and longer.text.startswith(short.text)
    assert longer.is_cut_off == (len(longer.text) > 150)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        ("<think>\nI look it up.\n</think>\n\nThe rule is red.", "The rule is red."),
        ("<think>I look it", ""),  # cut off inside of it
        ("Write </think> behind it.", "Write </think> behind it."),
        ("<thi", "<thi"),
        ("<thinking> is a word.", "<thinking> is a word."),
        ("The rule is red.", "The rule is red."),
    ],
)
def test_the_pieces_of_an_answer_are_the_answer(tokenizer, generated, answer):
    shown, ids = [], tokenizer(generated, add_special_tokens=False)["input_ids"]
    pieces = conversation_module._Pieces(tokenizer, shown.append, ends=ids[-1:])
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for number, token in enumerate(ids, start=1):
        pieces.put(torch.tensor([token]))
        assert pieces.has_ended == (number == len(ids)) or token == ids[-1]
    pieces.end()
    assert "".join(shown) == answer == decode(tokenizer, ids)


def test_scale_0_is_the_global_adapter_alone(runs):
    saved = runs()
    nothing = open_conversation(saved, "ann", scale=0.0).ask(QUESTION).text
    alone = Conversation(saved, Answering(with_global=True), "You are ann.", LIMIT).ask(QUESTION)
    pair = open_conversation(saved, "ann").ask(QUESTION).text
    assert nothing == alone.text != pair


def test_nothing_of_one_client_is_left_for_the_next(runs):
    saved = runs()
    first = {c: open_conversation(saved, c).ask(QUESTION).text for c in ("ann", "bob")}
    again = {c: open_conversation(saved, c).ask(QUESTION).text for c in ("bob", "ann", "bob")}
    assert first == again and first["ann"] != first["bob"]
    fresh = SavedModel(saved.run, 1, saved.root)
    assert open_conversation(fresh, "bob").ask(QUESTION).text == first["bob"]


def test_the_gate_weighs_each_question(runs, monkeypatch):
    saved = runs(gate="prompt")
    talk = open_conversation(saved, "ann")
    for question in (QUESTION, "Which office is red?"):
        talk.turns.clear()
        gated = generate(saved, saved.own("ann"), "You are ann.", question)
        assert talk.ask(question).text == gated
    weighed = []
    with saved.answering(saved.own("ann")) as (_, gate):
        original = type(gate).weigh

    def spy(self, model, prompts):
        weighed.append(prompts)
        return original(self, model, prompts)

    monkeypatch.setattr(type(gate), "weigh", spy)
    talk.ask("What is the blue rule?")
    single = encode_prompt(saved.load()[0].tokenizer, "You are ann.", "What is the blue rule?")
    assert len(talk.turns) == 2 and weighed == [[single]]


def test_no_client_data_is_needed_without_a_gate(runs, tiny_project, tmp_path):
    (tmp_path / "model").symlink_to(tiny_project / "model")
    elsewhere = replace(runs(), root=tmp_path, _states={}, _combiners={})
    expected = open_conversation(runs(), "ann").ask(QUESTION)
    assert open_conversation(elsewhere, "ann").ask(QUESTION) == expected


@pytest.mark.parametrize(
    ("mode", "client", "scale", "message"),
    [
        ("dual", "zoe", 1.0, "names: ann, bob"),
        ("dual", "ann", -1.0, "expected a number from 0 up"),
        ("dual", "ann", float("inf"), "expected a number from 0 up"),
        ("dual", "ann", float("nan"), "expected a number from 0 up"),
        ("fedavg", "ann", 0.5, "no effect: in mode fedavg there is no local adapter"),
    ],
)
def test_who_and_how_much_are_checked(runs, mode, client, scale, message):
    with pytest.raises(ConfigError, match=message):
        open_conversation(runs(mode), client, scale)


@pytest.mark.parametrize("mode", ["dual", "fedavg", "finetuned", "local-only"])
def test_all_answer_side_by_side(runs, mode):
    saved, told = runs(mode), []
    sides = answer_side_by_side(saved, QUESTION, report=told.append)
    labels = ["ann", "bob", *([] if mode == "local-only" else [GLOBAL_ALONE])]
    assert list(sides) == told == labels
    for client in ("ann", "bob"):
        assert sides[client].system_prompt == f"You are {client}."
        assert sides[client].reply == open_conversation(saved, client).ask(QUESTION)
    if mode != "local-only":
        alone = sides[GLOBAL_ALONE]
        expected = generate(saved, Answering(with_global=True), DEFAULT_SYSTEM_PROMPT, QUESTION)
        assert (alone.system_prompt, alone.reply.text) == (DEFAULT_SYSTEM_PROMPT, expected)


def test_one_prompt_for_all_is_asked_once_where_nothing_differs(runs, monkeypatch):
    asked = []
    original = Conversation.ask

    def spy(self, question):
        asked.append(self.who.label)
        return original(self, question)

    monkeypatch.setattr(Conversation, "ask", spy)
    sides = answer_side_by_side(runs("fedavg"), QUESTION, system_prompt="You help.")
    assert asked == ["global"] and {side.system_prompt for side in sides.values()} == {"You help."}
    asked.clear()
    answer_side_by_side(runs(), QUESTION, 0.5, "You help.")
    assert asked == ["global+local:ann", "global+local:bob", "global"]


def render(table) -> str:
    console = Console(width=90)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_shows_who_says_the_same():
    one = Side("You help.", Reply("Ten [bold]dollars[/bold]."))
    sides = {"ann": one, "bob": Side("You help.", Reply("Nine.", is_cut_off=True)), "cy": one}
    text = render(tabulate_sides(sides))
    assert "Ten [bold]dollars[/bold]." in text and "Nine. [cut off]" in text
    assert "same as" in text and "System prompt: You help." in text
    assert "system prompt" not in text
    different = tabulate_sides({"ann": one, "bob": Side("", Reply("word " * 60))})
    text = render(different)
    assert "system prompt" in text and "same as" not in text
    assert text.count("word") == 60 and max(map(len, text.splitlines())) <= 90
