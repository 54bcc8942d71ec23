"""The one exception that programs turn into a message and exit status 2."""


class InputError(ValueError):
    """Bad input, told in one sentence: what, what was expected, what was found."""
