"""Read what a request to /feedback is about: rows in its body, or remembered rows of a group."""

import math
from dataclasses import dataclass

from models.timestamps import to_unix_seconds
from service.anomaly.inputs import InputRows, parse_input_rows
from service.anomaly.record_keys import group_name
from service.codec.budget import Budget
from service.codec.json_values import describe_value
from service.errors import InvalidField
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody, FeedbackBody

ROW_FIELDS = ("records", "metrics")
GROUP_FIELDS = ("group_name", "since", "until")  # fields that name remembered rows


@dataclass(frozen=True)
class Period:
    """Which remembered rows of a group feedback is about.

    Args:
        group: the name of the group; empty for rows without a group.
        since: the time of the first row in seconds.
        until: the time of the last row in seconds.
        is_state: whether the feedback is about what the group is doing now, and names no time.
    """

    group: str
    since: float
    until: float
    is_state: bool


def read_feedback(
    served: ServedModel, body: FeedbackBody, may_contain_non_floats: bool, budget: Budget
) -> InputRows | Period:
    """Return the rows of `body`, or which remembered rows it names.

    Raises:
        InvalidField: the body has rows and also names remembered rows, or a time is not valid.
        InvalidRows: no row is valid, or no row has a time.
    """
    named = [name for name in GROUP_FIELDS if getattr(body, name) is not None]
    given = [name for name in ROW_FIELDS if getattr(body, name) is not None]
    if not given:
        since, until = read_time(body.since, "since", -math.inf), read_time(body.until, "until", math.inf)
        if since > until:
            raise InvalidField(
                f"since should not be after until, got {body.since} and {body.until}",
                pointer="/since",
                expected="a time before until",
                got=str(body.since),
            )
        is_state = body.since is None and body.until is None
        return Period(group_name(body.group_name or "") or "", since, until, is_state)
    if named:
        raise InvalidField(
            f"the rows in {given[0]} have their own times and groups: expected no {named[0]}, got {named[0]}",
            pointer=f"/{named[0]}",
            expected=f"{given[0]}, or group_name with since and until",
            got=f"{given[0]} and {named[0]}",
        )
    fields = {name: getattr(body, name) for name in AnomalyBody.model_fields if name in body.model_fields_set}
    input_rows = parse_input_rows(served, AnomalyBody(**fields), may_contain_non_floats, budget)
    if input_rows.time is None and input_rows.parsed.rows:
        raise InvalidField(
            "no row has a time: feedback needs the time of each row, because the calibration follows the time",
            pointer=f"/{given[0]}",
            expected="rows with a time",
            got="rows without a time",
            hint="name the key of the time in the field time",
        )
    return input_rows


def read_time(value: float | str | None, name: str, default: float = math.nan) -> float:
    """Return the time in the field `name` in Unix seconds; `default` if it is None. Raises InvalidField."""
    if value is None:
        return default
    seconds = to_unix_seconds(value)
    if not math.isfinite(seconds):
        expected = "Unix time in s, ms, us or ns, or ISO 8601"
        got = describe_value(value)
        raise InvalidField(f"{name} should be {expected}, got {got}", pointer=f"/{name}", expected=expected, got=got)
    return seconds
