"""What all errors have in common that the user can fix."""

KINDS = {  # of which Python has other names
    "NoneType": "null",
    "bool": "a boolean",
    "dict": "an object",
    "float": "a number",
    "int": "a number",
    "list": "a list",
    "str": "a string",
}


class UserError(ValueError):
    """The message says what happened, what was expected and what to do."""


def name_kind(value: object) -> str:
    """Return what kind of value it is, with its article, as JSON and YAML have it."""
    name = type(value).__name__
    return KINDS.get(name) or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
