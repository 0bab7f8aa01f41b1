"""The base of errors that a user can mend: the message alone says what was wrong and what to do."""


class InputError(ValueError):
    """Something given from outside, a file, a text or a workdir, cannot be used as it is."""
