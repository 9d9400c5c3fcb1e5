"""The memory of variants of one configuration, on one card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_app.config.schema import Config
from fedlora_app.planning.workload import ClientPhase, find_largest, phases_of
from fedlora_app.training.activations import Numerics, Shape
from fedlora_app.training.phase import USABLE_SHARE
from fedlora_app.training.phase_memory import BaseSizes, PhaseMemory, predict_phase


@dataclass(frozen=True)
class Predictor:
    """Predicts the memory of variants of one configuration; the model is read once."""

    shape: Shape
    sizes: BaseSizes
    parts: Sequence[ClientPhase]

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

    def _predict(self, config: Config, checkpointing: bool) -> list[PhaseMemory]:
        return [
            predict_phase(
                self.shape,
                self.sizes,
                config.adapters,
                config.training,
                read_numerics(config),
                phase,
                find_largest(self.parts, phase, config.training),
                checkpointing,
            )
            for phase in phases_of(config)
        ]


def _leaves_room(phase: PhaseMemory, limit: int) -> bool:
    """Return whether "auto" does without checkpointing, as ``training`` decides it."""
    context = phase.outside[0].num_bytes
    free = limit - context - phase.resident_bytes
    return phase.torch_bytes - phase.resident_bytes <= USABLE_SHARE * free


def read_numerics(config: Config) -> Numerics:
    """Return how the base lies on a GPU."""
    return Numerics(
        is_4bit=config.model.quantization != "none",
        dtype_bytes=4 if config.model.dtype == "float32" else 2,
        embedding_on_cpu=config.model.embedding_device == "cpu",
    )
