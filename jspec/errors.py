"""The one exception that stands for a mistake of the user's, not of the program's."""


class InputError(ValueError):
    """Bad input: one line that names the thing and the remedy. The command line prints it and exits with 2."""
