"""Scores that are kept as they come, so that a stopped evaluation resumes where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedlora_app.config.rounds import BASE
from fedlora_app.evaluation.scoring import Answered, Prompt


class ScoreStore:
    """Scores by adapters and prompt, kept in a file so that a stopped evaluation can be resumed.

    Args:
        path: JSON Lines beside the run; a last line that a stop has cut is dropped.
        context: what scores depend on beside adapters and prompt; others are ignored.
        base_answers: a file of the base model's own scores, which other runs have too.
    """

    def __init__(self, path: Path, context: str, base_answers: Path | None = None) -> None:
        self._path = path
        self._context = context
        self._base_answers = base_answers
        self._scores: dict[tuple[str, ...], Answered] = {}
        for source in filter(None, (base_answers, path)):
            if source.exists():
                for line in source.read_text(encoding="utf-8").splitlines():
                    self._read(line)

    def get(self, who: str, prompt: Prompt) -> Answered | None:
        """Return a prompt's score under the adapters ``who``."""
        return self._scores.get(_store_key(who, prompt))

    def add(self, who: str, prompts: Sequence[Prompt], answers: Sequence[Answered]) -> None:
        """Keep scores, in memory and in the file."""
        shares = self._base_answers is not None and who.strip() == BASE
        with (self._base_answers if shares else self._path).open("a", encoding="utf-8") as file:
            for prompt, answer in zip(prompts, answers, strict=True):
                key = _store_key(who, prompt)
                self._scores[key] = answer
                row = [self._context, *key, answer.log_likelihoods, answer.generated]
                row.append(answer.openness)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def remove(self) -> None:
        """Delete the run's own file: the evaluation is complete."""
        self._path.unlink(missing_ok=True)

    def _read(self, line: str) -> None:
        try:
            context, who, prompt, values, generated, openness = json.loads(line)
        except ValueError:
            return
        if context == self._context:
            self._scores[(who, prompt)] = Answered(tuple(values), generated, openness=openness)


def _store_key(who: str, prompt: Prompt) -> tuple[str, str]:
    parts = [prompt.system_prompt, prompt.question, prompt.candidates, prompt.generates]
    content = json.dumps(parts)
    return who, hashlib.sha256(content.encode()).hexdigest()
