"""What every other package stands on: files, seeds, errors, progress, the project's place."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "errors": ["UserError"],
        "seeds": ["derive_seed"],
    },
)
