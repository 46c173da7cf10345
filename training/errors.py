"""Errors raised while data are read and models are fitted."""

from models.errors import ElboError


class DataError(ElboError):
    """The data cannot be used as they are. The message says where the fault is and what to do."""

    code = "data_error"


class FitError(ElboError):
    """The data and the options do not allow a fit, or the fit failed."""

    code = "fit_error"


class AdoptionError(ElboError):
    """A module from elsewhere cannot become an artifact. The message names the cause, its line, and what to do."""

    code = "adoption_error"


class RowsMadeConstant(AdoptionError):
    """Python computed a number from the number of rows, and the tracer made it a constant."""


class ExportError(ElboError):
    """A model cannot be exported, or its export already exists."""

    code = "export_failed"
