"""Complete rows: read the known values of /sample and /impute, and check that the model can complete rows."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.codec.budget import Budget
from service.codec.conditions import no_conditions
from service.codec.partial_rows import parse_all_records, parse_partial_row
from service.codec.row_arrays import parse_array
from service.codec.row_lists import parse_rows
from service.errors import InvalidField, InvalidRows, NotSupported, escape
from service.inference.served_model import ServedModel
from service.schemas import EncodeBody, ImputeBody, ReconstructBody, SampleBody

Array = npt.NDArray[np.float32]
ROW_FIELDS = ("inputs", "records")  # the body of a request with rows must have exactly one of these fields


class Given(NamedTuple):
    """The known values of samples, [1, D], with NaN for the values to draw."""

    row: Array


def read_given(served: ServedModel, body: SampleBody, may_contain_non_floats: bool) -> Given | None:
    """Return the known values of the samples; None if no value is given.

    Raises:
        NotSupported: the model cannot complete rows.
        InvalidField: two fields of the body conflict, or no value is left to draw.
        InvalidRows: a given value is invalid, or outside of the valid range of the model's policy.
    """
    if body.given is None:
        return None
    require_completion(served)
    if body.condition is not None:
        raise no_conditions(served.name)
    if body.prior == "standard":
        raise InvalidField(
            "samples with given values come from the distribution of the other values, which has no prior to choose",
            pointer="/prior",
            expected="fitted",
            got="standard",
            hint="leave out prior or given",
        )
    given = parse_partial_row(served.row_schema, body.given, "/given", may_contain_non_floats)
    if not np.isnan(given).any():
        raise InvalidField(
            "given has a value for every feature, so nothing is left to draw",
            pointer="/given",
            expected="values of some of the features",
            got=f"values of all {served.row_schema.width}",
            hint="leave out the features to draw, or use near to draw rows that are similar to a row",
        )
    _require_valid_ranges(served, given[0], body.given)
    return Given(given)


def read_partial_rows(served: ServedModel, body: ImputeBody, may_contain_non_floats: bool, budget: Budget) -> Array:
    """Return the rows of a request to /impute, [N, D], with NaN for missing values.

    Raises:
        NotSupported: the model cannot complete rows.
        InvalidField: the body does not have exactly one of ROW_FIELDS.
        InvalidRows: a row is invalid, or has no value at all.
    """
    require_completion(served)
    require_one_field(body)
    schema = served.row_schema
    if body.records is not None:
        return parse_all_records(schema, body.records, "/records", may_contain_non_floats, budget, partial=True)
    if isinstance(body.inputs, np.ndarray):
        return parse_array(schema.all_optional, body.inputs, "/inputs")
    return parse_rows(schema.all_optional, body.inputs, "/inputs", may_contain_non_floats, budget)


def require_one_field(body: ImputeBody | EncodeBody | ReconstructBody) -> None:
    """Raise InvalidField if the body does not have exactly one of ROW_FIELDS."""
    given = [name for name in ROW_FIELDS if getattr(body, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise InvalidField(
            f"expected one of the fields inputs or records, got {got}", expected="inputs or records", got=got
        )


def require_no_conditions(served: ServedModel, asked: str) -> None:
    """Raise NotSupported for a conditional model. `asked`: what the request asks for."""
    if served.conditions is not None:
        model = f"{served.name}@{served.version}"
        raise NotSupported(
            f"{model} is a conditional model, which does not support {asked}",
            expected="a model without conditions",
            got=model,
            hint="use a model that was trained without --condition, or leave out given and send a condition",
        )


def require_completion(served: ServedModel) -> None:
    """Raise NotSupported if the model cannot complete rows."""
    if served.completes_rows:
        return
    require_no_conditions(served, "given and /impute")
    model = f"{served.name}@{served.version}"
    if served.manifest.window is not None:
        reason, hint = "judges windows, and does not know how one value of a row depends on the others", None
    elif served.scales_by_group:
        reason, hint = "sees rows in units of their group, but this request does not name a group", None
    elif served.manifest.adoption is not None:
        why = served.manifest.adoption.without_completion
        reason = "was adopted, " + (f"and {why}" if why else "by a release of Elbo that did not support this")
        hint = "use a model that elbo train has trained" if why else "adopt it again with elbo adopt"
    else:
        reason = "comes from an earlier release of Elbo, or from a tool that does not support this"
        hint = "train the model again with elbo train"
    raise NotSupported(
        f"{model} cannot complete rows: it {reason}",
        expected="a model that completes rows",
        got=model,
        hint=hint or "use a model without --window and --scale-by-group",
    )


def _require_valid_ranges(served: ServedModel, given: Array, sent: object) -> None:
    """Raise InvalidRows if a value of given [D] is outside of its valid range in the policy of the model."""
    policy = served.manifest.policy
    if policy is None or not policy.rules.has_ranges:
        return
    for index, name in enumerate(served.row_schema.names):
        rule, value = policy.rules.features.get(name), float(given[index])
        if rule is None:
            continue
        low = -np.inf if rule.minimum is None else rule.minimum
        high = np.inf if rule.maximum is None else rule.maximum
        if value < low or value > high:  # false for NaN
            expected = f"a number from {low:g} to {high:g}"
            place = f"/{escape(name)}" if isinstance(sent, dict) else f"/{index}"
            raise InvalidRows(
                f"{name} is {value:g}, which is outside of its valid range in the policy of the model",
                pointer=f"/given{place}",
                expected=expected,
                got=f"{value:g}",
            )
