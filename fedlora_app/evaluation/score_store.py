"""Scores that are kept as they come, so that a stopped evaluation resumes where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedlora_app.evaluation.scoring import Answered, Prompt


class ScoreStore:
    """Scores by adapters and prompt, kept in a file so that a stopped evaluation can be resumed.

    Args:
        path: JSON Lines beside the run; a line that a stop has cut is dropped.
        context: what scores depend on beside adapters and prompt; others are ignored.
    """

    def __init__(self, path: Path, context: str) -> None:
        self._path = path
        self._context = context
        self._scores: dict[tuple[str, ...], Answered] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                self._read(line)

    def get(self, who: str, prompt: Prompt) -> Answered | None:
        """Return a prompt's score under the adapters ``who``."""
        answer = self._scores.get(_store_key(who, prompt))
        fits = answer is not None and len(answer.log_likelihoods) == len(prompt.candidates)
        return answer if fits else None

    def add(self, who: str, prompts: Sequence[Prompt], answers: Sequence[Answered]) -> None:
        """Keep scores, in memory and in the file."""
        lines = []
        for prompt, answer in zip(prompts, answers, strict=True):
            key = _store_key(who, prompt)
            self._scores[key] = answer
            row = [self._context, *key, answer.log_likelihoods, answer.generated]
            lines.append(json.dumps([*row, answer.openness]))
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))  # the line before may have been cut

    def remove(self) -> None:
        """Delete the file: the evaluation is complete."""
        self._path.unlink(missing_ok=True)

    def _read(self, line: str) -> None:
        try:
            context, who, prompt, values, generated, openness = json.loads(line)
            if context == self._context:
                self._scores[who, prompt] = Answered(tuple(values), generated, openness=openness)
        except (ValueError, TypeError):
            return


def _store_key(who: str, prompt: Prompt) -> tuple[str, str]:
    parts = [prompt.system_prompt, prompt.question, prompt.candidates, prompt.generates]
    content = json.dumps(parts)
    return who, hashlib.sha256(content.encode()).hexdigest()
