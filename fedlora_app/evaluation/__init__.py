"""Whether it works: question sets, their scoring, and what the scores can and cannot say."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "answering": ["Answering"],
        "choices": ["open_round"],
        "client_round": ["evaluate_questions"],
        "comparison": ["compare_evaluations"],
        "comparison_text": ["describe_comparison"],
        "protocol": ["evaluate_round"],
        "saved_model": ["SavedModel"],
        "text": ["describe_evaluation"],
    },
)
