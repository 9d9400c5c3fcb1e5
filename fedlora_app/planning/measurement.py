"""What a run takes on the device that is there, measured: real steps, answers, a save, a message.

The base model is loaded, or made with random weights of its shape. Then every phase of a round
takes two steps on the longest and on ordinary examples of the experiment's data, by the very code
of a client; one batch of questions is answered, and the adapters are saved and made into messages.
From that follow a round's and a run's time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fedlora_app.config.rounds import BOTH, Phase, plan_round
from fedlora_app.config.schema import GLOBAL, Config
from fedlora_app.data.client_files import ClientFiles, build_question_sets, load_all_files
from fedlora_app.data.questions import Question
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.client_round import evaluate_questions
from fedlora_app.evaluation.room import count_halvings
from fedlora_app.federation.packed_state import pack_state, unpack_state
from fedlora_app.foundation.process_memory import read_peak, read_resident, reset_peak
from fedlora_app.model.adapter_files import save_adapter
from fedlora_app.model.adapters import (
    AdaptedModel,
    attach_once,
    build_initial_state,
    get_state,
    set_state,
    state_shapes,
)
from fedlora_app.model.base import (
    LoadedModel,
    choose_device,
    compute_dtype,
    load_base_model,
    load_tokenizer,
    settle_base,
    uses_4bit,
)
from fedlora_app.model.device import compute_reproducibly, read_peak_memory, reset_peak_memory
from fedlora_app.model.pretrained import load_model_config
from fedlora_app.planning.gpus import find_card
from fedlora_app.planning.plan import CardPlan, Plan
from fedlora_app.planning.random_base import build_random_base
from fedlora_app.planning.steps import SEED, MeasuredSteps, measure_steps
from fedlora_app.planning.workload import ClientPhase, load_client_phases
from fedlora_app.training.activations import PlanError, read_shape
from fedlora_app.training.batches import examples_per_step
from fedlora_app.training.phase import TrainingError

LONGEST, MEDIAN = "longest", "median"
"""Which examples a step is of."""
NUM_TIMED = 1
"""Steps, after one that warms up."""

Report = Callable[[str, int, int], None]
"""Called with what is under way, how many parts are done, and how many there are."""


@dataclass(frozen=True)
class MeasuredAnswers:
    """One batch of questions, given to what a client answers with after a round."""

    num_questions: int
    seconds: float
    peak_bytes: int
    memory_retries: int


@dataclass(frozen=True)
class Times:
    """Seconds of a run, clients one after the other."""

    training: float
    """Of all clients' phases in a round."""
    evaluation: float
    """Of all clients' questions before the last round."""
    last_evaluation: float
    """Of all questions, asked of as many choices of adapters as the last round asks."""
    transfer: float
    """Of all clients' messages and saved adapters in a round."""
    run: float
    """All rounds, with loading once."""

    @property
    def round(self) -> float:
        """A round that is evaluated and not the last one."""
        return self.training + self.evaluation + self.transfer


@dataclass(frozen=True)
class Measurement:
    """What was measured, and what follows from it."""

    device: str
    is_random: bool
    load_seconds: float
    """Of the base model with its tokenizer, or of making it up."""
    card: CardPlan | None
    """What was planned for this card or CPU; None where the card is not known."""
    steps: dict[tuple[str, str], MeasuredSteps]
    """By phase and kind of examples."""
    answers: MeasuredAnswers
    save_seconds: float
    """Of one client's adapters."""
    message_seconds: float
    """Of a client's way down and up."""
    times: Times

    def dump(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        steps = [
            {"phase": phase, "examples": kind, "tokens_per_second": measured.tokens_per_second}
            | {"share_of_peak": self.share_of_peak(measured)}
            | {k: v for k, v in vars(measured).items() if k != "settings"}
            | {"training": measured.settings.model_dump(mode="json")}
            for (phase, kind), measured in self.steps.items()
        ]
        times = asdict(self.times) | {"round": self.times.round}
        return asdict(replace(self, steps={})) | {"steps": steps, "times": times}

    def share_of_peak(self, steps: MeasuredSteps) -> float | None:
        """Return the operations that a step's result needs, as a share of what the card can do."""
        if self.card is None:
            return None
        return steps.flops_per_step / steps.seconds_per_step / (1e12 * self.card.peak_tflops)


def measure_run(
    config: Config, root: Path, plan: Plan, *, is_random: bool, report: Report
) -> Measurement:
    """Measure a run on this machine, in a process that has done nothing else.

    Args:
        plan: the plan for this machine.
        is_random: only the base model's configuration and tokenizer are there.

    Raises:
        DataError: a file of the experiment cannot be used.
        ModelError: the base model cannot be loaded.
        PlanError: memory does not suffice, whatever the batch.
    """
    files = load_all_files(config, root)
    compute_reproducibly(config.federated.at_once)
    parts = load_client_phases(config, load_tokenizer(config.model, root), root)
    choices = {phase: choose_examples(parts, phase, config) for phase in _phases(parts)}
    todo = [f"{p.name} phase, {kind}" for p, kinds in choices.items() for kind in kinds]
    todo = ["loading", *todo, "questions", "messages"]
    done = iter(range(len(todo)))

    def tell() -> None:
        number = next(done)
        report(todo[number], number, len(todo))

    base_bytes = read_resident()
    tell()
    started = time.perf_counter()
    loaded = build_loaded(config, root) if is_random else load_base_model(config.model, root)
    load_seconds = time.perf_counter() - started
    model = attach_once(loaded, config.adapters)
    for name in BOTH:
        set_state(model, name, build_initial_state(model, name, SEED))
    shape = read_shape(loaded.model.config)
    steps: dict[tuple[str, str], MeasuredSteps] = {}
    for phase, kinds in choices.items():
        for kind, examples in kinds.items():
            tell()
            what = f"{phase.name} phase, {kind} examples"
            arguments = (model, shape, plan.base, config, phase, examples, NUM_TIMED)
            try:
                steps[phase.name, kind] = measure_steps(*arguments, base_bytes, what)
            except TrainingError as error:
                raise PlanError(str(error)) from None
    tell()
    client, questions = choose_questions(config, files)
    answers = _measure_answers(config, loaded, model, client, questions, base_bytes)
    tell()
    save_seconds, message_seconds = _measure_transfer(config, model)
    transfer = save_seconds + message_seconds
    return Measurement(
        device="CPU" if plan.on_cpu else torch.cuda.get_device_name(),
        is_random=is_random,
        load_seconds=load_seconds,
        card=find_planned(plan),
        steps=steps,
        answers=answers,
        save_seconds=save_seconds,
        message_seconds=message_seconds,
        times=compute_times(config, plan, steps, answers, transfer, load_seconds),
    )


def find_planned(plan: Plan) -> CardPlan | None:
    """Return what was planned for the device that is there, None where nobody knows it."""
    if plan.on_cpu:
        return plan.cards[0]
    card = find_card(torch.cuda.get_device_name())
    return next((planned for planned in plan.cards if card and planned.card == card.name), None)


def build_loaded(config: Config, root: Path) -> LoadedModel:
    """Return a base model with random weights, as a client would hold the real one."""
    device, dtype = choose_device(), compute_dtype(config.model)
    model_config = load_model_config(config.model, root)
    model = build_random_base(model_config, device, dtype, uses_4bit(config.model))
    return LoadedModel(
        settle_base(model, config.model, device), load_tokenizer(config.model, root), "random"
    )


def choose_examples(
    parts: Sequence[ClientPhase], phase: Phase, config: Config
) -> dict[str, list[Example]]:
    """Return the examples of one step: all clients' longest ones, and those of median length.

    Only the longest where all are of one length.
    """
    examples = [e for part in parts if part.phase == phase for e in part.selection.examples]
    examples.sort(key=lambda example: len(example.input_ids))
    most = min(len(part.selection.examples) for part in parts if part.phase == phase)
    count = min(examples_per_step(config.training), most)
    start = (len(examples) - count) // 2
    chosen = {LONGEST: examples[-count:], MEDIAN: examples[start : start + count]}
    if len(chosen[LONGEST][-1].input_ids) == len(chosen[MEDIAN][0].input_ids):
        del chosen[MEDIAN]
    return chosen


def choose_questions(
    config: Config, files: Mapping[str, ClientFiles]
) -> tuple[str, list[Question]]:
    """Return the client with most questions, and one batch of them: long, short, and between."""
    sets = {
        client: list(chain(*build_question_sets(config.client(client), files[client]).values()))
        for client in files
    }
    client = max(sets, key=lambda name: len(sets[name]))
    questions = sorted(
        sets[client], key=lambda q: len(q.text) + sum(map(len, q.candidates)), reverse=True
    )
    count = min(config.evaluation.batch_size, len(questions))
    return client, [questions[place * len(questions) // count] for place in range(count)]


def compute_times(
    config: Config,
    plan: Plan,
    steps: dict[tuple[str, str], MeasuredSteps],
    answers: MeasuredAnswers,
    transfer_seconds: float,
    load_seconds: float,
) -> Times:
    """Return what a round and a run will take at the measured speeds.

    Args:
        transfer_seconds: of one client in a round.
    """
    num_rounds, evaluation = config.federated.num_rounds, config.evaluation

    def train(server_round: int) -> float:
        planned = plan_round(config, server_round)
        names = {p.name for p in (planned.train, planned.personalise) if p is not None}
        return sum(
            part.work.tokens
            / (steps.get((part.phase, MEDIAN)) or steps[part.phase, LONGEST]).tokens_per_second
            for part in plan.work
            if part.phase in names
        )

    question = answers.seconds / answers.num_questions if answers.num_questions else 0.0
    sampled = question * plan.count_questions(evaluation.sample)
    last = plan_round(config, num_rounds)
    choices = 1 + (set(last.trained) == set(BOTH))  # the global adapter alone as well
    last_evaluation = choices * question * plan.count_questions()
    due = [
        number
        for number in range(num_rounds)
        if evaluation.interval and number % evaluation.interval == 0
    ]
    transfer = transfer_seconds * len(config.client_ids)
    in_all = sum(map(train, range(1, num_rounds + 1))) + num_rounds * transfer
    in_all += len(due) * sampled + (last_evaluation if evaluation.interval else 0.0)
    return Times(
        training=train(1),
        evaluation=sampled if evaluation.interval else 0.0,
        last_evaluation=last_evaluation if evaluation.interval else 0.0,
        transfer=transfer,
        run=load_seconds + in_all,
    )


def _phases(parts: Sequence[ClientPhase]) -> list[Phase]:
    return list(dict.fromkeys(part.phase for part in parts))


def _measure_answers(
    config: Config,
    loaded: LoadedModel,
    model: AdaptedModel,
    client: str,
    questions: Sequence[Question],
    base_bytes: int,
) -> MeasuredAnswers:
    before = count_halvings(model)
    reset_peak_memory(model.device)
    reset_peak()
    started = time.perf_counter()
    evaluate_questions(
        model,
        loaded.tokenizer,
        questions,
        active=plan_round(config, config.federated.num_rounds).evaluated,
        system_prompt=config.client(client).system_prompt,
        settings=config.evaluation,
    )
    seconds = time.perf_counter() - started
    is_cpu = model.device.type == "cpu"
    peak = read_peak() - base_bytes if is_cpu else read_peak_memory(model.device)
    return MeasuredAnswers(len(questions), seconds, peak, count_halvings(model) - before)


def _measure_transfer(config: Config, model: AdaptedModel) -> tuple[float, float]:
    """Return the seconds of saving one client's adapters, and of its messages down and up."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in BOTH:
            save_adapter(Path(folder, name), model, name, get_state(model, name), config.model.name)
    saved = time.perf_counter()
    if plan_round(config, 1).train is None:
        return saved - started, 0.0
    dtype, shapes = config.federated.upload_dtype, state_shapes(model, GLOBAL)
    state = unpack_state(pack_state(get_state(model, GLOBAL)), shapes, "The server")
    set_state(model, GLOBAL, state)
    unpack_state(pack_state(get_state(model, GLOBAL), dtype), shapes, "A client", dtype)
    return saved - started, time.perf_counter() - saved
