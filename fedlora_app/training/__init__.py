"""One phase of training at a client, and how much memory a step of it takes."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "decay": ["choose_decays"],
        "phase": ["PhaseResult", "TrainingError", "train_phase"],
        "selection": ["select_examples"],
    },
)
