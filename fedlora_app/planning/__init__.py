"""What a run will take before it is started: memory, bytes on the wire and time."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "plan": ["Plan", "build_plan"],
        "text": ["describe_plan"],
    },
)
