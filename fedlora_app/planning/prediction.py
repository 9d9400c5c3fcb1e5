"""The memory of variants of one configuration, on one card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora_app.config.schema import Config
from fedlora_app.evaluation.memory import count_answer_bytes, cut_batch, fit_tokens
from fedlora_app.planning.host import PROCESS
from fedlora_app.planning.questions import QuestionWork
from fedlora_app.planning.workload import ClientPhase, find_largest, phases_of
from fedlora_app.training.activations import Numerics, Shape
from fedlora_app.training.phase_memory import (
    ADAPTERS,
    RESERVE,
    BaseSizes,
    Item,
    PhaseMemory,
    adapter_sizes,
    predict_phase,
)
from fedlora_app.training.proximal import without_idle_term
from fedlora_app.training.record_privacy import hides_records, record_settings
from fedlora_app.training.within_memory import USABLE_SHARE


@dataclass(frozen=True)
class Predictor:
    """Predicts the memory of variants of one configuration; the model is read once."""

    shape: Shape
    sizes: BaseSizes
    parts: Sequence[ClientPhase]
    on_cpu: bool = False
    questions: QuestionWork | None = None

    def __call__(
        self, config: Config, limit: int, checkpointing: bool | None = None
    ) -> list[PhaseMemory]:
        """Return what each phase takes where ``limit`` bytes are there.

        Args:
            checkpointing: instead of the configuration's.
        """
        wanted = config.training.gradient_checkpointing if checkpointing is None else checkpointing
        if wanted != "auto":
            return self._predict(config, wanted)
        without, with_ = self._predict(config, False), self._predict(config, True)
        return [
            off if _leaves_room(off, limit) else on for off, on in zip(without, with_, strict=True)
        ]

    def predict_evaluation(self, config: Config, limit: int) -> PhaseMemory | None:
        """Return what evaluation takes where ``limit`` bytes are there; None without questions.

        It uses as much as there is room for, so that it decides only where a single row does not
        fit.
        """
        if self.questions is None:
            return None
        numerics = read_numerics(config, self.on_cpu)
        phase = self(config, limit)[0]
        resident = phase.items[: [item.name for item in phase.items].index(ADAPTERS) + 1]
        matrix, learnt = self.sizes.largest_linear, adapter_sizes(self.sizes, config.adapters)
        sizes = (matrix, sum(learnt.values()))
        free = USABLE_SHARE * (limit - phase.outside[0].num_bytes - phase.resident_bytes)
        needed = {}
        for what, batch in (
            ("scoring", self.questions.scored),
            ("generating", self.questions.generated),
        ):
            tokens = fit_tokens(self.shape, numerics, batch, *sizes, free)
            cut = cut_batch(batch, tokens)
            needed[count_answer_bytes(self.shape, numerics, cut, *sizes)] = (what, cut)
        what, batch = needed[max(needed)]
        items = (*resident, Item("answers", max(needed), what))
        peak = sum(item.num_bytes for item in items)
        reserve = Item("allocator's reserve", round(RESERVE * peak), phase.outside[-1].note)
        outside = phase.outside if self.on_cpu else (*phase.outside[:-1], reserve)
        return PhaseMemory("evaluation", batch.num_tokens, False, items, outside, phase.host)

    def _predict(self, config: Config, checkpointing: bool) -> list[PhaseMemory]:
        phases = []
        for phase in phases_of(config):
            training, hides = without_idle_term(config), hides_records(phase, config.privacy)
            predicted = predict_phase(
                self.shape,
                self.sizes,
                config.adapters,
                record_settings(training) if hides else training,
                read_numerics(config, self.on_cpu),
                phase,
                find_largest(self.parts, phase, config.training),
                checkpointing,
                hides,
            )
            phases.append(predicted)
        if not self.on_cpu:
            return phases
        return [replace(p, outside=(PROCESS, *p.host), host=()) for p in phases]


def _leaves_room(phase: PhaseMemory, limit: int) -> bool:
    """Return whether "auto" does without checkpointing, as ``training`` decides it."""
    context = phase.outside[0].num_bytes
    free = limit - context - phase.resident_bytes
    return phase.torch_bytes - phase.resident_bytes <= USABLE_SHARE * free


def read_numerics(config: Config, on_cpu: bool = False) -> Numerics:
    """Return how the base lies on a GPU, or without one."""
    if on_cpu:
        width = 2 if config.model.dtype == "bfloat16" else 4
        return Numerics(is_4bit=config.model.quantization == "4bit", dtype_bytes=width)
    return Numerics(
        is_4bit=config.model.quantization != "none",
        dtype_bytes=4 if config.model.dtype == "float32" else 2,
        embedding_on_cpu=config.model.embedding_device == "cpu",
    )
