"""The one exception that stands for a mistake of the user's, not of the program's, and texts as
parts of its line."""


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it and exits
    with 2."""


def shortened(text: str, length: int = 100) -> str:
    """A text as part of an error's line: what cannot be printed is escaped, and what is longer is
    cut."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length + 1])
    return shown if len(text) <= length else f"{shown[:length - 3]}..."
