"""What the clients' questions make the model do in an evaluation, and which it cannot answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles, build_question_sets
from fedlora_app.data.dialogue import encode_with_answers
from fedlora_app.data.questions import Question
from fedlora_app.evaluation.gold import find_unreachable_answers
from fedlora_app.evaluation.memory import AnswerBatch
from fedlora_app.evaluation.rows import (
    CANDIDATES_PER_ROW,
    Row,
    build_rows,
    largest_generated,
    largest_scored,
)

MAX_NOTES = 3


@dataclass(frozen=True)
class QuestionWork:
    """An evaluation of all clients: how much is asked, and the largest batches of it."""

    num_questions: dict[str, dict[str, int]]
    """By client and question set."""
    scored: AnswerBatch
    generated: AnswerBatch


def measure_questions(
    config: Config, files: Mapping[str, ClientFiles], tokenizer: PreTrainedTokenizerBase
) -> QuestionWork | None:
    """Return the clients' questions as evaluation batches them; None where there are none.

    Only the longest are tokenised, as many as one batch can hold.
    """
    evaluation = config.evaluation
    counts: dict[str, dict[str, int]] = {}
    rows: list[Row] = []
    prompts: list[int] = []
    for client_id in files:
        client = config.client(client_id)
        sets = build_question_sets(client, files[client_id])
        counts[client_id] = {name: len(questions) for name, questions in sets.items()}
        asked = sorted((q for questions in sets.values() for q in questions), key=_count_characters)
        encoded = [
            encode_with_answers(tokenizer, client.system_prompt, q.text, q.candidates)
            for q in asked[-evaluation.batch_size :]
        ]
        per_row = min(CANDIDATES_PER_ROW, evaluation.batch_size)
        rows += build_rows(*([pair[part] for pair in encoded] for part in (0, 1)), per_row)
        prompts += [len(ids) for ids, _ in encoded]
    if not prompts:
        return None
    scored = largest_scored(rows, evaluation.batch_size)
    generated = largest_generated(
        max(prompts), min(evaluation.batch_size, len(prompts)), evaluation.max_new_tokens
    )
    return QuestionWork(counts, scored, generated)


def describe_cut_answers(
    config: Config, files: Mapping[str, ClientFiles], tokenizer: PreTrainedTokenizerBase, root: Path
) -> Iterator[str]:
    """Yield what is to be said of right answers that no greedy answer is long enough for."""
    findings = find_unreachable_answers(config, files, tokenizer, root)
    cut = [finding for finding in findings if finding.rule == "cut-answers"]
    for finding in cut[:MAX_NOTES]:
        yield f"{finding.file}: {finding.text}"
    if len(cut) > MAX_NOTES:
        yield f"The same in {len(cut) - MAX_NOTES} more; fedlora check names all."


def _count_characters(question: Question) -> int:
    return len(question.text) + sum(map(len, question.candidates))
