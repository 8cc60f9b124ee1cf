"""The errors a user can cause: printed as one line, without a traceback, by every recipe."""


class UserError(Exception):
    """Something the user can mend; the message names the setting or file, the value and what to do."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be right, or that does not fit the others, the model or the machine."""
