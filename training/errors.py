"""Errors of reading data and of fitting."""

from models.errors import ElboError


class DataError(ElboError):
    """The data cannot be learnt from as they are; the message names the place and says what to do."""

    code = "data_error"


class FitError(ElboError):
    """The data or the configuration admit no fit, or the fit went wrong."""

    code = "fit_error"
