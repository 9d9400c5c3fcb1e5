"""Training examples that are longer than what is trained on, or than the base model reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fedlora_app.config.schema import Config
from fedlora_app.data.client_files import ClientFiles, tokenize_client_files
from fedlora_app.data.linter.subject import Finding, LintedFile, collect_clients
from fedlora_app.data.records import DataError
from fedlora_app.data.tokens import TokenizedFile


def find_long_examples(
    config: Config,
    files: Mapping[str, ClientFiles],
    tokenizer: PreTrainedTokenizerBase,
    root: Path,
    context: int | None = None,
) -> list[Finding]:
    """Return findings about training examples that are too long to be read whole.

    Args:
        files: by client id; those of some clients only are enough.
        context: the tokens that the base model takes; None where it has no limit.

    Raises:
        DataError: questions alone are too long, with those of every file.
    """
    findings: dict[Finding, None] = {}
    faults: dict[str, None] = {}
    for client in collect_clients(config, files, root):
        try:
            own = files[client.config.id]
            examples = tokenize_client_files(config, client.config, own, tokenizer, root)
        except DataError as error:
            faults[str(error)] = None
            continue
        pairs = zip(client.training, (examples.universal, examples.local), strict=False)
        for file, tokenized in pairs:
            findings |= dict.fromkeys(_describe(config, file, tokenized, context))
    if faults:
        raise DataError("\n".join(faults))
    return list(findings)


def _describe(
    config: Config, file: LintedFile, tokenized: TokenizedFile, context: int | None
) -> Iterator[Finding]:
    limit, most = config.training.max_seq_length, config.evaluation.max_new_tokens
    total = len(tokenized.examples)
    if tokenized.num_dropped:
        text = (
            f"in {tokenized.num_dropped} of {total + tokenized.num_dropped} records the question "
            f"alone fills training.max_seq_length = {limit} tokens. They are dropped, as "
            "data.skip_invalid says."
        )
        yield file.finding("warning", "dropped-examples", None, text)
    if tokenized.num_truncated:
        text = (
            f"{tokenized.num_truncated} of {total} records are longer than "
            f"training.max_seq_length = {limit} tokens and lose the end of their answers."
        )
        yield file.finding("warning", "cut-examples", None, text)
    if context is None:
        return
    num_longer = sum(len(example.input_ids) > context for example in tokenized.examples)
    if num_longer:
        text = (
            f"{num_longer} of {total} records are longer than the {context} tokens that the base "
            f"model reads. Set training.max_seq_length to {context} at the most."
        )
        yield file.finding("warning", "beyond-context", None, text)
    question = max(example.answer_start for example in tokenized.examples)
    if question + most > context:
        text = (
            f"its longest question takes {question} tokens, and with evaluation.max_new_tokens = "
            f"{most} an answer may pass the {context} that the base model reads."
        )
        yield file.finding("warning", "beyond-context", None, text)
