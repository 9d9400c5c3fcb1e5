"""What all errors have in common that the user can mend."""


class MendableError(ValueError):
    """The message says what happened, what was expected and what to do."""
