"""Read the policy of a model from a TOML file, and find the rows that the policy keeps out of the calibration."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from zoneinfo import ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from models.errors import first_fault, join_names, printable
from models.policy_rules import AlarmRule, FeatureRule, Policy, Silence
from models.silences import Silences
from training.data.row_store import BLOCK_BYTES, Floats
from training.data.table import Table
from training.errors import DataError

MAX_BYTES = 1 << 20
IN_UNITS = ("least", "minimum", "maximum")  # the keys of a feature whose numbers have the unit of the feature
Rows = npt.NDArray[np.int64]
Rules = TypeVar("Rules", bound=BaseModel)


@dataclass(frozen=True)
class Kept:
    """Which calibration rows a policy keeps, and how many it leaves out."""

    policy: Policy
    rows: Rows
    outside: int = 0  # rows with a value outside of its valid range
    silenced: int = 0  # other rows for which a silence holds

    def notes(self, table: Table) -> list[str]:
        """Return what the user should know about the rows that are left out."""
        found = []
        if self.outside:
            found.append(
                f"left {self.outside:,} rows out of the calibration: a value is outside of the valid range in the "
                "policy, which is anomalous in itself"
            )
        if self.silenced:
            found.append(f"left {self.silenced:,} rows out of the calibration: a silence of the policy holds for them")
        if self.policy.silences and table.timeline is None:
            found.append(
                "the rows have no times, so rows during the silences of the policy are part of the calibration; name "
                "the column of the times with --time when you train"
            )
        return found


def read_policy(path: Path, names: Sequence[str], units: Sequence[str | None]) -> Policy:
    """Return the policy in the TOML file at `path`, for a model whose features have these names and units.

    Raises:
        DataError: the file cannot be read or is not a valid policy. The message names the key at fault.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the policy {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES:,} bytes: expected a policy in TOML")
    try:
        fields = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid TOML: {error}") from error
    return _Reader(path, names, units).read(fields)


class _Reader:
    """Checks the content of a policy file, key by key, so that a message can name the key."""

    def __init__(self, path: Path, names: Sequence[str], units: Sequence[str | None]) -> None:
        self._path = path
        self._units = dict(zip(names, units, strict=True))

    def read(self, fields: Mapping[str, Any]) -> Policy:
        self._check_keys("", fields, Policy.model_fields)
        features = self._table("features", fields.get("features", {}))
        self._check_keys("features", features, self._units, what="feature")
        silences = fields.get("silences", [])
        if not isinstance(silences, list):
            self._refuse("silences", "expected tables that begin with [[silences]]")
        policy = self._validated(
            "",
            Policy,
            {
                "features": {name: self._feature(name, rule) for name, rule in features.items()},
                "silences": [
                    self._validated(f"silences.{i}", Silence, self._table(f"silences.{i}", silence))
                    for i, silence in enumerate(silences)
                ],
                "alarms": self._validated("alarms", AlarmRule, self._table("alarms", fields.get("alarms", {}))),
            },
        )
        try:
            Silences(policy.silences)
        except (ZoneInfoNotFoundError, ValueError) as error:
            self._refuse("silences", f"{error}: expected the IANA name of a time zone, such as Europe/Berlin")
        return policy

    def _feature(self, name: str, rule: Any) -> FeatureRule:
        place = f"features.{name}"
        fields = dict(self._table(place, rule))
        for key in IN_UNITS:
            if isinstance(fields.get(key), str):
                fields[key] = self._without_unit(f"{place}.{key}", fields[key], self._units[name])
        return self._validated(place, FeatureRule, fields)

    def _without_unit(self, place: str, text: str, unit: str | None) -> float:
        """Return the number in a text such as "5 ms". The unit must be that of the feature."""
        number, _, given = text.strip().partition(" ")
        expected = "a number" if unit is None else f'a number in {unit}, such as 5 or "5 {unit}"'
        try:
            value = float(number)
        except ValueError:
            self._refuse(place, f"expected {expected}, got {text!r}")
        if given.strip() != (unit or ""):
            has = "the feature has no unit" if unit is None else f"the unit of the feature is {unit}"
            self._refuse(place, f"expected {expected}, got {text!r}: {has}")
        return value

    def _table(self, place: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(place, f"expected a table, got {_shown(value)}")
        return value

    def _validated(self, place: str, kind: type[Rules], fields: dict[str, Any]) -> Rules:
        self._check_keys(place, fields, kind.model_fields)
        try:
            return kind.model_validate(fields)
        except ValidationError as error:
            fault = first_fault(error)
            where = ".".join(part for part in (place, *fault.path) if part)
            got = "" if isinstance(fault.value, dict | list) else f", got {_shown(fault.value)}"
            self._refuse(where, fault.message + got)

    def _check_keys(self, place: str, fields: Mapping[str, Any], known: Collection[str], what: str = "key") -> None:
        for key in fields:
            if key not in known:
                near = get_close_matches(key, list(known), 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected {join_names(list(known), 12)}"
                where = f" in {place}" if place else ""
                self._refuse("", f"unknown {what} {printable(key)!r}{where}: {printable(hint)}")

    def _refuse(self, place: str, fault: str) -> NoReturn:
        raise DataError(f"{self._path}: {printable(place)}{': ' if place else ''}{fault}")


def _shown(value: Any) -> str:
    return printable(repr(value)[:80])


def keep_calibration_rows(policy: Policy, table: Table, rows: Rows) -> Kept:
    """Return which of `rows` may calibrate: those inside of the valid ranges for which no silence holds.

    Raises:
        DataError: no row is left.
    """
    is_outside = _outside(policy, table, rows) if policy.has_ranges else np.zeros(len(rows), bool)
    is_silenced = _silenced(policy, table, rows) & ~is_outside
    kept = rows[~is_outside & ~is_silenced]
    result = Kept(policy, kept, int(is_outside.sum()), int(is_silenced.sum()))
    if not len(kept):
        raise DataError(
            f"the policy leaves none of the {len(rows):,} calibration rows: {result.outside:,} have a value outside of "
            f"its valid range, and silences hold for {result.silenced:,}; correct the policy, or add rows"
        )
    return result


def value_bounds(policy: Policy, names: Sequence[str]) -> tuple[Floats, Floats]:
    """Return the smallest and the largest valid value of each feature, both [D]; infinite if there is none."""
    rules = [policy.features.get(name, FeatureRule()) for name in names]
    low = [-np.inf if rule.minimum is None else rule.minimum for rule in rules]
    high = [np.inf if rule.maximum is None else rule.maximum for rule in rules]
    return np.array(low, np.float32), np.array(high, np.float32)


def _outside(policy: Policy, table: Table, rows: Rows) -> npt.NDArray[np.bool_]:
    low, high = value_bounds(policy, table.names)
    found = np.empty(len(rows), bool)
    count = max(1, BLOCK_BYTES // (4 * table.x.width))
    for start in range(0, len(rows), count):
        x = table.x.take(rows[start : start + count])
        found[start : start + count] = (np.maximum(x - high, low - x) > 0).any(axis=1)  # False for NaN
    return found


def _silenced(policy: Policy, table: Table, rows: Rows) -> npt.NDArray[np.bool_]:
    if not policy.silences or table.timeline is None:
        return np.zeros(len(rows), bool)
    timeline = table.timeline
    groups = [timeline.groups[index] for index in timeline.group[rows].tolist()] if timeline.group_column else None
    return Silences(policy.silences).hold(timeline.time[rows] / 1e9, groups, len(rows), now=0.0)
