"""What a finished run is used for: asking its adapters and taking them away."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "conversation": ["Conversation", "answer_side_by_side", "open_conversation"],
        "server": ["serve"],
        "export": ["export_adapter", "export_merged"],
    },
)
