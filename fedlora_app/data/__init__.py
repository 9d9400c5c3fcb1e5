"""Records, a client's own files, their tokens, and the question sets."""

from fedlora_app.foundation.face import offer

__getattr__, __all__ = offer(
    __name__,
    {
        "client_files": [
            "ClientFiles",
            "build_question_sets",
            "load_all_files",
            "load_client_files",
            "tokenize_client_files",
        ],
        "linter": ["Finding", "describe_findings", "lint"],
        "questions": ["CONFLICT", "LOCAL_SET", "UNIVERSAL", "Question"],
        "records": ["DataError", "Record", "load_records"],
    },
)
