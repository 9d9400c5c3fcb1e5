"""Right answers, and whether a greedy answer can be expected to equal them word for word.

Where it cannot, exact match is 0 whatever was learnt, and the ranking leads
(``names.leading_measure``). Of *open* answers nobody can know the words:

- *cut*: more tokens than ``evaluation.max_new_tokens``, so none can be generated whole;
- *long*: more than 30 words, of which one that differs is enough;
- *free*: more than 4 words that the client's training answers to this fact do not hold. Facts
  that the client never saw are learnt from others, who may know the words.

*Altered* answers do not come back from chat template and tokenizer as they were written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import ClientConfig, Config
from fedlora_app.data.client_files import ClientFiles, build_question_sets
from fedlora_app.data.dialogue import encode_answer
from fedlora_app.data.keywords import split_words
from fedlora_app.data.linter.subject import Finding, LintedFile, collect_clients
from fedlora_app.data.questions import Question
from fedlora_app.data.similarity import normalise_answer
from fedlora_app.evaluation.decoding import decode
from fedlora_app.evaluation.metrics import matches_exactly
from fedlora_app.evaluation.names import ASKED_SETS

LONG_WORDS, SHORT_WORDS = 30, 4


@dataclass(frozen=True)
class Gold:
    """What one right answer is like."""

    num_tokens: int
    """Without the end-of-turn mark, which need not be generated for the text to be whole."""
    is_cut: bool
    is_altered: bool
    is_open: bool


@dataclass(frozen=True)
class GoldReader:
    """Looks at the right answers of one client's questions."""

    tokenizer: PreTrainedTokenizerBase
    client: ClientConfig
    files: ClientFiles
    max_new_tokens: int
    _answers: set[str] = field(init=False, default_factory=set)
    _facts: set[str | None] = field(init=False, default_factory=lambda: {None})
    _examined: dict[Question, Gold] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the words of the training answers, and the facts that they are about."""
        for record in (*self.files.universal.records, *self.files.local.records):
            self._answers.add(normalise_answer(record.output))
            self._facts.add(record.fact)

    def examine(self, questions: Sequence[Question]) -> list[Gold]:
        """Return what the right answers are like; questions that have none are left out.

        Raises:
            ModelError: the chat template leaves out an answer.
        """
        asked = [question for question in questions if question.answer is not None]
        for question in asked:
            if question not in self._examined:
                self._examined[question] = self._examine(question)
        return [self._examined[question] for question in asked]

    def count_open(self, questions: Sequence[Question]) -> int:
        """Return how many right answers are open and can be ranked against others."""
        ranked = [question for question in questions if len(question.candidates) > 1]
        return sum(gold.is_open for gold in self.examine(ranked))

    def _examine(self, question: Question) -> Gold:
        ids = encode_answer(
            self.tokenizer, self.client.system_prompt, question.text, question.answer
        )
        num_tokens, num_words = len(ids) - 1, len(split_words(question.answer))
        is_known = normalise_answer(question.answer) in self._answers
        is_free = num_words > SHORT_WORDS and not is_known and question.fact in self._facts
        is_cut = num_tokens > self.max_new_tokens
        return Gold(
            num_tokens,
            is_cut,
            is_altered=not matches_exactly(decode(self.tokenizer, ids), question.answer),
            is_open=is_cut or num_words > LONG_WORDS or is_free,
        )


def count_gold_answers(
    config: Config, client: ClientConfig, files: ClientFiles, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """Return counts of a client's right answers by question set, as it reports them."""
    reader = GoldReader(tokenizer, client, files, config.evaluation.max_new_tokens)
    sets = build_question_sets(client, files)
    counts = {}
    for name in ASKED_SETS:
        golds = reader.examine(sets.get(name, []))
        counts[f"{name}_answers"] = len(golds)
        counts[f"{name}_cut_answers"] = sum(gold.is_cut for gold in golds)
        counts[f"{name}_altered_answers"] = sum(gold.is_altered for gold in golds)
        counts[f"{name}_open_answers"] = reader.count_open(sets.get(name, []))
    return counts


def find_unreachable_answers(
    config: Config,
    files: Mapping[str, ClientFiles],
    tokenizer: PreTrainedTokenizerBase,
    root: Path | None = None,
) -> list[Finding]:
    """Return findings about right answers that no greedy answer can equal.

    Args:
        files: by client id; those of some clients only are enough.
    """
    limit = config.evaluation.max_new_tokens
    findings: dict[Finding, None] = {}
    for client in collect_clients(config, files, root):
        reader = GoldReader(tokenizer, client.config, files[client.config.id], limit)
        for file, questions in client.question_sets.items():
            golds = reader.examine(questions)
            findings |= dict.fromkeys(_describe(golds, file, client.whose(file), limit))
    return list(findings)


def _describe(golds: Sequence[Gold], file: LintedFile, whose: str, limit: int) -> Iterator[Finding]:
    num_cut = sum(gold.is_cut for gold in golds)
    num_altered = sum(gold.is_altered for gold in golds)
    if num_cut:
        most = max(gold.num_tokens for gold in golds)
        text = (
            f"{num_cut} of {len(golds)} right answers{whose} are longer than "
            f"evaluation.max_new_tokens = {limit}: what is generated is cut off and cannot match "
            f"them exactly. Raise the limit to {most}."
        )
        yield file.finding("warning", "cut-answers", None, text)
    if num_altered:
        text = (
            f"{num_altered} of {len(golds)} right answers{whose} are other texts once the model's "
            "chat template and tokenizer have written them, so what is generated cannot match them "
            "exactly. Take blocks of thoughts, special tokens and signs that the tokenizer does "
            "not know out of the answers, or use another model."
        )
        yield file.finding("warning", "altered-answers", None, text)
