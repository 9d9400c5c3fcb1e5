"""An experiment's YAML as a person would write it: every line that matters with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from fedlora_app.config.presets import Preset
from fedlora_app.foundation.terminal import shell

COMMENTS = {
    "model.quantization": "the weights as they are, which a model of this size affords",
    "model.embedding_device": "leaves 1 GB more on a small card",
    "training.global_epochs": "passes over the universal data, in every round",
    "training.local_epochs": "passes over the client's own data, in every round",
    "training.batch_size": "examples at a time; fewer take less memory",
    "training.gradient_accumulation_steps": "of such batches make a step",
    "training.max_seq_length": "tokens of question and answer; the longest record decides",
    "federated.num_rounds": "more of them, or more epochs, where the loss is still falling",
    "evaluation.max_new_tokens": "the longest answer decides",
    "adapters.gate": "this base is too small to tell whose question it is",
}
COLUMN = 36  # of the comments
LINE = 96


@dataclass(frozen=True)
class ExperimentText:
    """What an experiment's file says."""

    name: str
    opening: Sequence[str]
    """Comments at the top, of which the first says what it is about."""
    path: str
    """Of the file, as its own commands name it."""
    model: str
    model_reason: str
    preset: Preset
    clients: Sequence[Mapping[str, str]]
    data: Mapping[str, str | None]
    notes: Mapping[str, str] = field(default_factory=dict)
    """Comments above a key, by its dotted path."""

    def write(self) -> str:
        """Return the file's text."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        first, *rest = self.opening
        yield from _comment(first)
        yield "#"
        yield f"#   fedlora train {shell(self.path)}"
        yield "#"
        for line in (*rest, "All settings: conf/default.yaml and docs/configuration.md."):
            yield from _comment(line)
        yield f"experiment: {{name: {_scalar(self.name)}, seed: 42}}"
        yield "model:"
        yield from _comment(f"{self.model_reason}.", "  ")
        yield from self._settings("model", {"name": self.model, **self.preset.model})
        for section in ("adapters", "training"):
            yield f"{section}:"
            yield from self._settings(section, getattr(self.preset, section))
        yield "federated:"
        yield from self._settings("federated", self.preset.federated)
        yield "  clients:"
        yield from _comment(
            "The system prompt opens every conversation of the client, in training and later. Say "
            "whose assistant it is, and no answers.",
            "    ",
        )
        for client in self.clients:
            for mark, (key, value) in zip(
                ["-", *[" "] * len(client)], client.items(), strict=False
            ):
                yield f"    {mark} {key}: {_scalar(value)}"
        yield "data:"
        for key, value in self.data.items():
            yield from _comment(self.notes.get(f"data.{key}", ""), "  ")
            yield f"  {key}: {_scalar(value)}"
        yield "evaluation:"
        yield from self._settings("evaluation", self.preset.evaluation)

    def _settings(self, section: str, values: Mapping[str, Any]) -> Iterator[str]:
        for key, value in values.items():
            yield from _comment(self.notes.get(f"{section}.{key}", ""), "  ")
            line = f"  {key}: {_scalar(value)}"
            comment = COMMENTS.get(f"{section}.{key}")
            yield f"{line:<{COLUMN}} # {comment}" if comment else line


def _scalar(value: Any) -> str:
    """Return a value in YAML, on one line."""
    text = yaml.safe_dump(
        [value],
        default_flow_style=True,
        allow_unicode=True,
        sort_keys=False,
        width=float("inf"),
    )
    return text.strip()[1:-1]


def _comment(text: str, indent: str = "") -> Iterator[str]:
    """Yield a sentence as lines of comment."""
    line = ""
    for word in text.split():
        if line and len(indent) + len(line) + len(word) > LINE:
            yield f"{indent}#{line}"
            line = ""
        line += f" {word}"
    if line:
        yield f"{indent}#{line}"
