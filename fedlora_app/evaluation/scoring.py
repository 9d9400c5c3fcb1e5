"""A model's answers to prompts: the likelihood of given answers, and its own greedy answer.

A prompt and all its candidate answers go through the model as one sequence in which every
candidate sees the prompt and itself only, at the positions that it would have alone; so
the prompt is computed once. A candidate whose every token is the model's first choice *is* the
greedy answer, and only the other prompts are generated for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlora_app.data.dialogue import encode_with_answers
from fedlora_app.data.tokens import Example
from fedlora_app.evaluation.answering import OPEN_ABOVE
from fedlora_app.evaluation.combiner import (
    ByWeights,
    Combiner,
    combined_answering,
    group_by_weights,
    weighted_pair,
)
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.generation import find_stop_ids, generate
from fedlora_app.evaluation.memory import AnswerBatch
from fedlora_app.evaluation.room import GENERATING, SCORING, find_room
from fedlora_app.evaluation.rows import (
    CANDIDATES_PER_ROW,
    Row,
    batch_prompts,
    build_batches,
    build_rows,
    count_tokens,
    largest_generated,
    largest_scored,
)
from fedlora_app.model.adapters import AdaptedModel
from fedlora_app.model.base import find_decoder
from fedlora_app.model.device import is_out_of_memory
from fedlora_app.model.head import Head, find_head
from fedlora_app.training.losses import LOGIT_ROWS, answer_log_likelihoods

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.02}
"""Of likelihoods that are the same but for rounding."""

_sharing: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()

Progress = Callable[[int], None]
"""Called with the number of prompts that are done."""


@dataclass(frozen=True)
class Prompt:
    """A question with the answers whose likelihood is wanted."""

    system_prompt: str
    question: str
    candidates: tuple[str, ...] = ()
    generates: bool = True
    """Whether the model's own answer is wanted too."""


@dataclass(frozen=True)
class Answered:
    """The scores of a prompt's candidates, and the generated answer.

    ``log_likelihoods`` are sums over a candidate's tokens, its end-of-turn mark included, in
    nats. ``generated`` is "" where none was wanted. ``priors`` are the candidates'
    log-likelihoods without the question, where they were asked for. ``openness`` in [0, 1] is how
    sure the gate was that the question is the client's own, where there was one.
    ``similarities`` in [-1, 1] are the generated answer's to the candidates in meaning, where a
    sentence-embedding model compared them.
    """

    log_likelihoods: tuple[float, ...]
    generated: str
    priors: tuple[float, ...] | None = None
    openness: float | None = None
    similarities: tuple[float, ...] | None = None

    @property
    def is_own(self) -> bool:
        """Whether the local adapter took part, as far as a gate decided it."""
        return self.openness is None or self.openness > OPEN_ABOVE


Scored = tuple[float, bool]
"""A candidate's log-likelihood, and whether it is the greedy answer."""


@torch.inference_mode()
def score_prompts(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    combiner: Combiner | None = None,
    progress: Progress | None = None,
) -> list[Answered]:
    """Score every prompt with whatever adapters are active.

    Args:
        batch_size: candidates, or prompts to generate for, in one forward pass.
        combiner: weighs the two adapters by the question.
    """
    model.eval()
    encoded = [
        encode_with_answers(tokenizer, p.system_prompt, p.question, p.candidates) for p in prompts
    ]
    prompt_ids, answer_ids = ([pair[part] for pair in encoded] for part in (0, 1))
    judged_ids, openness = prompt_ids, [None] * len(prompts)
    if combiner is not None:
        judged_ids = [combiner.encode(tokenizer, prompt.question) for prompt in prompts]
    per_row = min(CANDIDATES_PER_ROW, batch_size) if shares_prefix(model) else 1
    rows = list(build_rows(prompt_ids, answer_ids, per_row))
    found = _Found(prompts, max_new_tokens, progress or (lambda done: None))

    with combined_answering(model, combiner):
        by_weights = group_by_weights(model, combiner, judged_ids)
        for scored in _score_candidates(model, rows, by_weights, batch_size):
            found.add_scores(scored)
        found.add_texts({place: decode(tokenizer, ids) for place, ids in found.greedy.items()})
        waiting = {place: prompt_ids[place] for place in found.find_waiting()}
        if waiting:
            stop_ids = find_stop_ids(tokenizer, prompts[0].system_prompt, prompts[0].question)
            limits = (batch_size, max_new_tokens)
            answers = _generate_answers(model, tokenizer, waiting, by_weights, stop_ids, *limits)
            for texts in answers:
                found.add_texts(texts)
    if combiner is not None:
        openness = combiner.find_openness(model, judged_ids)
    return [
        Answered(tuple(totals), text, openness=share)
        for totals, text, share in zip(found.totals, found.texts, openness, strict=True)
    ]


class _Found:
    """What is known of each prompt so far, by its place."""

    def __init__(self, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress) -> None:
        self.totals = [[0.0] * len(prompt.candidates) for prompt in prompts]
        self.texts = [""] * len(prompts)
        self.greedy: dict[int, list[int]] = {}
        """Candidates that are what a prompt's greedy answer would be, where one is asked for."""
        self._generates = [prompt.generates for prompt in prompts]
        self._max_new_tokens = max_new_tokens
        self._progress = progress
        self._num_unscored = [len(prompt.candidates) for prompt in prompts]
        self._num_done = sum(not p.candidates and not p.generates for p in prompts)

    def add_scores(self, scored: Iterable[tuple[Row, list[Scored]]]) -> None:
        """Note what the candidates of a batch of rows score."""
        for row, scores in scored:
            place = row.prompt
            for candidate, ids, (total, is_greedy) in zip(
                row.candidates, row.answer_ids, scores, strict=True
            ):
                self.totals[place][candidate] = total
                if is_greedy and self._generates[place] and len(ids) <= self._max_new_tokens:
                    self.greedy[place] = ids
            self._num_unscored[place] -= len(row.candidates)
            self._num_done += self._num_unscored[place] == 0 and not self._waits(place)
        self._progress(self._num_done)

    def add_texts(self, texts: Mapping[int, str]) -> None:
        """Note greedy answers; those that were found among the candidates count as done before."""
        for place, text in texts.items():
            self.texts[place] = text
            self._num_done += self._waits(place)
        self._progress(self._num_done)

    def find_waiting(self) -> list[int]:
        """Return the prompts whose answer must be generated."""
        return [place for place in range(len(self.texts)) if self._waits(place)]

    def _waits(self, place: int) -> bool:
        return self._generates[place] and place not in self.greedy


def _score_candidates(
    model: AdaptedModel, rows: Sequence[Row], by_weights: ByWeights, batch_size: int
) -> Iterator[list[tuple[Row, list[Scored]]]]:
    """Yield each batch of rows, or of their parts, with what their candidates score."""

    def score(batch: Sequence[Row]) -> list[tuple[Row, list[Scored]]]:
        return list(zip(batch, _score_rows(model, batch), strict=True))

    room = find_room(model, SCORING, largest_scored(rows, batch_size))
    for weights, places in by_weights:
        chosen = set(places)
        those = [row for row in rows if row.prompt in chosen]
        for batch in build_batches(those, batch_size, room):
            with weighted_pair(model, weights):
                scored = room.run(batch, score, count_tokens, Row.divide)
            yield scored


def _generate_answers(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    waiting: Mapping[int, list[int]],
    by_weights: ByWeights,
    stop_ids: list[int],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[dict[int, str]]:
    """Yield the answers of each batch by the prompts' places.

    Args:
        waiting: the prompts' token ids by their places.
    """

    def answer(places: Sequence[int]) -> list[str]:
        ids = [waiting[place] for place in places]
        return generate(model, tokenizer, ids, stop_ids, max_new_tokens)

    def count(places: Sequence[int]) -> int:
        return len(places) * (max(len(waiting[place]) for place in places) + max_new_tokens)

    lengths = {place: len(ids) for place, ids in waiting.items()}
    largest = largest_generated(max(lengths.values()), batch_size, max_new_tokens)
    room = find_room(model, GENERATING, largest)
    for weights, places in by_weights:
        those = [place for place in places if place in waiting]
        for batch in batch_prompts(those, lengths, batch_size, max_new_tokens, room):
            with weighted_pair(model, weights):
                texts = room.run(batch, answer, count)
            yield dict(zip(batch, texts, strict=True))


def ask_nothing(system_prompt: str, candidates: Iterable[str]) -> Iterator[Prompt]:
    """Yield all candidates under an empty question, whose likelihoods PMI divides by."""
    texts = sorted(set(candidates))
    for start in range(0, len(texts), CANDIDATES_PER_ROW):
        group = tuple(texts[start : start + CANDIDATES_PER_ROW])
        yield Prompt(system_prompt, "", group, generates=False)


def score_without_question(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    candidates: Iterable[str],
    *,
    batch_size: int,
) -> dict[str, float]:
    """Return each distinct candidate's log-likelihood without the question, in nats.

    Many questions share their candidates, so this costs far less than the questions do.
    """
    prompts = list(ask_nothing(system_prompt, candidates))
    answers = score_prompts(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=0)
    return {
        text: value
        for prompt, answered in zip(prompts, answers, strict=True)
        for text, value in zip(prompt.candidates, answered.log_likelihoods, strict=True)
    }


@torch.inference_mode()
def score_examples(
    model: AdaptedModel,
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Return the log-probability of each answer token of every example, in nats.

    With whatever adapters are active, in batches of similar length.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    log_probs: list[list[float]] = [[] for _ in examples]

    def score(batch: Sequence[int]) -> list[torch.Tensor]:
        return answer_log_likelihoods(model, [examples[index] for index in batch])

    def count(batch: Sequence[int]) -> int:
        return sum(len(examples[index].input_ids) for index in batch)

    longest = max((len(example.input_ids) for example in examples), default=1)
    room = find_room(model, SCORING, AnswerBatch(batch_size, longest, LOGIT_ROWS))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, values in zip(batch, room.run(batch, score, count), strict=True):
            log_probs[index] = values.tolist()
        if progress is not None:
            progress(start + len(batch))
    return log_probs


def shares_prefix(model: AdaptedModel) -> bool:
    """Return whether this model computes the same where candidates share their prompt.

    It takes an attention that follows a given mask, over everything before it, and positions that
    follow those that are given; a model without a window is tried out once.
    """
    config = model.get_base_model().config
    layers = getattr(config, "layer_types", None)
    if layers is None:
        layers = ["sliding_attention" if getattr(config, "sliding_window", None) else ""]
    attends_fully = all(layer in ("", "full_attention") for layer in layers)
    if not attends_fully or config._attn_implementation not in ("sdpa", "eager"):
        return False
    base = model.get_base_model()
    if base not in _sharing:
        try:
            _sharing[base] = _try_sharing(model)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False  # alone they take the least
    return _sharing[base]


def _try_sharing(model: AdaptedModel) -> bool:
    """Return whether candidates score the same behind one prompt as each behind its own."""
    prompt, answers = [1, 2, 0, 1], [[0, 1, 2] * 8, [2, 0, 1]]  # far behind another one
    tolerance = TOLERANCES.get(model.get_base_model().dtype, TOLERANCES[torch.bfloat16])
    try:
        (shared,) = _score_rows(model, [Row(0, prompt, [0, 1], answers)])
        alone = _score_rows(model, [Row(0, prompt, [0], [answer]) for answer in answers])
    except (TypeError, ValueError, RuntimeError) as error:  # a forward pass that knows no such mask
        if is_out_of_memory(error):
            raise
        return False
    pairs = zip(shared, alone, strict=True)
    return all(abs(one - other) <= tolerance * abs(other) for (one, _), [(other, _)] in pairs)


def _score_rows(model: AdaptedModel, rows: Sequence[Row]) -> list[list[Scored]]:
    """Return each candidate's log-likelihood and whether it is the greedy answer."""
    inner = model.get_base_model()
    length = max(row.length for row in rows)
    input_ids = torch.zeros((len(rows), length), dtype=torch.long)  # (B, T)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros((len(rows), 1, length, length), dtype=torch.bool)  # (B, 1, T, T)
    predicting: list[int] = []  # flat positions whose next token belongs to a candidate
    targets: list[int] = []
    counts: list[int] = []
    triangle = torch.ones((length, length), dtype=torch.bool).tril()
    for index, row in enumerate(rows):
        prompt = len(row.prompt_ids)
        input_ids[index, :prompt] = torch.tensor(row.prompt_ids)
        positions[index, :prompt] = torch.arange(prompt)
        mask[index, 0] = triangle & torch.eye(length, dtype=torch.bool)  # padding sees itself
        mask[index, 0, :prompt, :prompt] = triangle[:prompt, :prompt]
        start = prompt
        for ids in row.answer_ids:
            end = start + len(ids)
            input_ids[index, start:end] = torch.tensor(ids)
            positions[index, start:end] = torch.arange(prompt, prompt + len(ids))
            mask[index, 0, start:end, :prompt] = True
            mask[index, 0, start:end, start:end] = triangle[: len(ids), : len(ids)]
            offset = index * length
            predicting += [offset + prompt - 1, *range(offset + start, offset + end - 1)]
            targets += ids
            counts.append(len(ids))
            start = end
    device = model.device
    arguments = {"input_ids": input_ids.to(device), "use_cache": False}
    if any(len(row.candidates) > 1 for row in rows):
        additive = torch.zeros(mask.shape, dtype=inner.dtype)
        additive.masked_fill_(~mask, torch.finfo(inner.dtype).min)
        arguments |= {"position_ids": positions.to(device), "attention_mask": additive.to(device)}
    hidden = find_decoder(inner)(**arguments).last_hidden_state.flatten(0, 1)  # (B * T, D)
    chosen = hidden[torch.tensor(predicting, device=device)]
    scored = _score_tokens(find_head(inner), chosen, torch.tensor(targets, device=device))
    per_candidate = iter(zip(*(part.split(counts) for part in scored), strict=True))
    return [
        [
            (values.double().sum().item(), bool(hits.all()))
            for values, hits in (next(per_candidate) for _ in row.candidates)
        ]
        for row in rows
    ]


def _score_tokens(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability and whether it is the first choice.

    Args:
        hidden: (N, D), targets: (N,) token ids.
    """
    values, hits = [], []
    for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = head(rows).float()
        values.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(values).cpu(), torch.cat(hits).cpu()
