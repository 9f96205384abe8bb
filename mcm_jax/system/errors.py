"""The one exception that means: the user's input is at fault, and here is the remedy."""


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong, where, and what to do.

    Programs print it as it stands, without a traceback, and exit with code 2 (see
    `command_line.run`). Raise it before any long work.
    """
