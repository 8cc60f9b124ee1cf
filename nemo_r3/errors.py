"""The errors a user can cause: printed as one line, without a traceback, by every recipe."""

from nemo_r3.visible import visible

LONGEST_DETAIL = 300
"""How many characters of another library's message are repeated in ours."""


class UserError(Exception):
    """Something the user can fix; the message names the setting or file, the value and what to do."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be right, or that does not fit the others, the model or the machine."""


class VerifierError(UserError):
    """The task's verifier failed on an answer; what was trained before can be saved."""


class ModelNotFoundError(ConfigError):
    """`model.path` is not to be had on this machine; on another it may be."""


def in_one_line(value: object) -> str:
    """A value's text on one line of at most `LONGEST_DETAIL` characters."""
    line = visible(" ".join(str(value).split()))
    return line if len(line) <= LONGEST_DETAIL else line[: LONGEST_DETAIL - 3] + "..."


def describe(error: BaseException) -> str:
    """An exception's type and message on one line: "ValueError (substring not found)"."""
    message = in_one_line(error)
    return f"{type(error).__name__} ({message})" if message else type(error).__name__
