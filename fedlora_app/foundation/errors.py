"""What all errors have in common that the user can fix."""


class UserError(ValueError):
    """The message says what happened, what was expected and what to do."""
