"""The rules of a policy, as a TOML file and the manifest contain them. This module does not import torch."""

import re
from collections.abc import Sequence
from datetime import date, time
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
# Looks like the name of a time zone. `ZoneInfo` makes a path from the name, so a name must not lead to another folder.
ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}", re.ASCII)
MAX_RULES = 10_000  # features with a rule
MAX_SILENCES = 200
MAX_GROUPS = 1000  # patterns of one silence
RANGE_PART = "range"  # name of the part of the score that a value outside of its valid range adds
Text = Annotated[str, Field(min_length=1, max_length=200)]


class _Rules(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FeatureRule(_Rules):
    """Which deviations of one feature matter. Numbers are in the units of the feature."""

    direction: Literal["high", "low", "both"] = "both"  # only deviations in this direction from the prediction matter
    least: float = Field(0.0, ge=0.0)  # smaller deviations from the prediction do not matter
    minimum: float | None = None  # smaller values are anomalous in themselves
    maximum: float | None = None  # larger values are anomalous in themselves
    alone: bool = True  # whether this feature can make a row anomalous that is normal without it

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.minimum is not None and self.maximum is not None and not self.minimum < self.maximum:
            raise ValueError(f"expected minimum below maximum, got {self.minimum:g} and {self.maximum:g}")
        return self


class Silence(_Rules):
    """When no row is anomalous: at the times and dates that a clock in `zone` shows, for the groups that match."""

    name: Text | None = None
    zone: Text = "UTC"  # IANA name, such as Europe/Berlin
    days: list[Day] = Field(default_factory=lambda: list(DAYS), min_length=1)  # on which the silence begins
    start: time | None = None  # None: midnight
    end: time | None = None  # not included; before `start`: on the next day; None: midnight at the end of the day
    first: date | None = None  # first day
    last: date | None = None  # last day, included
    groups: list[Text] | None = Field(None, min_length=1, max_length=MAX_GROUPS)  # patterns with * and ?; None: all

    @field_validator("zone")
    @classmethod
    def _check_zone(cls, zone: str) -> str:
        if not ZONE.fullmatch(zone):
            raise ValueError("expected the IANA name of a time zone, such as Europe/Berlin or UTC")
        return zone

    @field_validator("start", "end", mode="before")
    @classmethod
    def _check_time(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"\d\d:\d\d(:\d\d)?", value, re.ASCII):
            raise ValueError("expected a time of day such as 02:30")
        if not isinstance(value, str | time | None):
            raise ValueError("expected a time of day such as 02:30, as text")
        return value

    @field_validator("start", "end")
    @classmethod
    def _check_no_offset(cls, value: time | None) -> time | None:
        if value is not None and (value.tzinfo is not None or value.microsecond):
            raise ValueError("expected a time of day to the second without an offset: the time zone is `zone`")
        return value

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.first is not None and self.last is not None and self.last < self.first:
            raise ValueError(f"expected first no later than last, got {self.first} and {self.last}")
        if self.start is not None and self.start == self.end:
            raise ValueError(
                f"start and end are both {self.start}: expected two different times, or neither for whole days"
            )
        if self.is_every_day and self.is_whole_day and self.first is None and self.last is None and self.groups is None:
            raise ValueError(
                "expected only some days, or start, end, first, last or groups: this silence always holds, so no row "
                "would ever be anomalous"
            )
        return self

    @property
    def is_every_day(self) -> bool:
        """Whether the silence can begin on every day of the week."""
        return set(self.days) == set(DAYS)

    @property
    def is_whole_day(self) -> bool:
        """Whether the silence lasts from midnight to midnight."""
        return self.start in (None, time()) and self.end in (None, time())

    @field_serializer("start", "end", when_used="unless-none")
    def _write_time(self, value: time) -> str:
        return value.isoformat()

    @field_serializer("first", "last", when_used="unless-none")
    def _write_date(self, value: date) -> str:
        return value.isoformat()


class AlarmRule(_Rules):
    """When an alert of a group opens, and how many false alarms are accepted."""

    rows: int = Field(1, ge=1, le=1_000_000)  # an alert needs this many successive rows with a mean severity above 1
    seconds: float = Field(0.0, ge=0.0, le=1e9)  # and at least this time from the first to the last of them
    per_day: float | None = Field(None, gt=0.0, le=1e6)  # accepted false alarms per day and group; None: no limit


class Policy(_Rules):
    """All rules of a policy."""

    features: dict[str, FeatureRule] = Field(default_factory=dict, max_length=MAX_RULES)
    silences: list[Silence] = Field(default_factory=list, max_length=MAX_SILENCES)
    alarms: AlarmRule = AlarmRule()

    @property
    def changes_scores(self) -> bool:
        """Whether a rule of a feature can change the score of a row."""
        return any(rule != FeatureRule() for rule in self.features.values())

    @property
    def has_ranges(self) -> bool:
        """Whether a feature has a valid range."""
        return any(rule.minimum is not None or rule.maximum is not None for rule in self.features.values())

    def parts(self, parts: Sequence[str]) -> list[str]:
        """Return the names of the parts of the score under this policy.

        `parts`: the names without a policy or under another one.
        """
        others = [name for name in parts if name != RANGE_PART]
        return [*others, RANGE_PART] if self.has_ranges else others


class AppliedPolicy(_Rules):
    """The policy of a model, and its effect on the calibration."""

    rules: Policy
    alpha: float | None = Field(None, gt=0.0, lt=1.0)  # default of /anomaly, which keeps `rules.alarms.per_day`
    outside: int = Field(0, ge=0)  # normal rows left out of the calibration, because a value is outside of its range
    silenced: int = Field(0, ge=0)  # normal rows left out of the calibration, because a silence holds for them
