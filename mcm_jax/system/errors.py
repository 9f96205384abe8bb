"""The exception for bad user input, and the form of text from outside in its message."""


class InputError(ValueError):
    """Bad user input. The message is one line that states what is wrong, where, and how to fix it.

    Programs print the message without a traceback and exit with code 2 (see `command_line.run`). Raise it
    before any long work.
    """


def printable(name: object) -> str:
    """Formats a name for a message: on one line, with non-printable characters escaped."""
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return "".join(escaped)


def shortened(text: str) -> str:
    """Formats text from a file for a message: on one line, printable, at most 300 characters."""
    text = printable(" ".join(text[:1000].split()))
    return text if len(text) <= 300 else f"{text[:300]}..."


def reason(error: BaseException) -> str:
    """Formats an error, which may quote a damaged or malicious file, for the message of another one.

    An OSError is described without its number and file.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shortened(text) or type(error).__name__
