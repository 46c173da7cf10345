"""The conditions of requests to conditional models. In the inputs of a model, they follow the rows or latents.

For a model without conditions, and a request without one, every function returns what it was given.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from service.codec.budget import NO_LIMIT, Budget
from service.codec.conditions import Code, Codes, no_conditions
from service.inference.served_model import ServedModel

Array = npt.NDArray[np.float32]


def with_conditions(served: ServedModel, condition: Any, rows: Array, budget: Budget = NO_LIMIT) -> Array:
    """Return rows or latents [B, D] followed by the conditions of the request, [B, D + C].

    Args:
        served: the model.
        condition: the field `condition` of the request: an object for all rows, a list with one per row, or None.
        rows: the rows or latents.
        budget: limits the time.

    Raises:
        InvalidField: the model knows no conditions, or not this one.
    """
    if served.conditions is condition:  # both are None
        return rows
    if served.conditions is None:
        raise no_conditions(served.name)
    return served.conditions.join(rows, served.conditions.read_all(condition, len(rows), budget))


def read_condition(served: ServedModel, condition: Any) -> Code:
    """Return the code of the one condition of a request; empty if the model knows no conditions.

    Raises:
        InvalidField: `condition` is given but is not one condition that the model knows.
    """
    if served.conditions is not None:
        return served.conditions.read(condition)
    if condition is not None:
        raise no_conditions(served.name)
    return ()


def with_code(served: ServedModel, code: Code, latents: Array) -> Array:
    """Return latents [B, K] followed by the condition with this code, [B, K + C]."""
    if served.conditions is None:
        return latents
    return served.conditions.join(latents, np.array([code], np.int64).repeat(len(latents), axis=0))


def read_codes(served: ServedModel, condition: Any, rows: int, budget: Budget) -> Codes | None:
    """Return the codes [rows, J] of the conditions to draw rows for; None if the model knows no conditions.

    Raises:
        InvalidField: the model knows no conditions, but the request has one, or the model does not know this one.
    """
    if served.conditions is not None:
        return served.conditions.read_all(condition, rows, budget)
    if condition is not None:
        raise no_conditions(served.name)
    return None


def features_of(served: ServedModel, inputs: Array) -> Array:
    """Return the rows of a request, [B, D], or its windows, without the conditions that follow them in `inputs`."""
    return inputs if served.conditions is None else inputs[:, : served.manifest.width]


def without_conditions(served: ServedModel, latents: Array) -> Array:
    """Return latents [B, K] without the conditions that follow them."""
    if served.conditions is None:
        return latents
    return np.ascontiguousarray(latents[:, : served.manifest.latents])
