"""Errors that are raised only by the command line and the Python interface, and warnings."""

from models.errors import ElboError


class OptionError(ElboError):
    """An option or an ELBO_* environment variable has an invalid value."""

    code = "option_error"


class NotSupportedError(ElboError):
    """The model cannot do what was asked. The message says what it lacks."""

    code = "not_supported"


class ElboWarning(UserWarning):
    """Something about the data or the model that the user should know before trusting the model."""
