"""The exception for bad user input."""


class InputError(ValueError):
    """Bad user input. The message is one line that states what is wrong, where, and how to fix it.

    Programs print the message without a traceback and exit with code 2 (see `command_line.run`). Raise it
    before any long work.
    """
