"""Errors of fitting; those of reading data are in `training.readers`."""

from models.errors import ElboError


class FitError(ElboError):
    """The data or the configuration admit no fit, or the fit went wrong."""

    code = "fit_error"
