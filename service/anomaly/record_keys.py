"""The keys of records: find the feature that each key means, and refuse a row whose keys are not understood.

A value under an unknown name is not a missing value. A record that lacks a feature and has an unknown key was probably
made for other feature names, so a verdict on it would ignore a value that the client sent.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from models.categories import CategoryColumns, UnseenLevel
from models.columns import parse_title
from models.errors import join_names, shortened
from models.timestamps import to_unix_seconds
from service.codec.budget import NO_LIMIT, Budget
from service.codec.category_records import expand_record
from service.codec.conditions import Code, ConditionSchema
from service.codec.feature_names import closest
from service.codec.row_errors import MalformedRow, not_a_timestamp
from service.codec.row_schema import RowSchema
from service.errors import InvalidRows, escape

MAX_QUOTED = 100  # characters of an unknown key that an error quotes
MAX_GROUP_NAME = 128  # characters
KEY_BYTES = 200  # memory to cache the meaning of one key, besides the memory for its characters
MAX_SUGGESTIONS = 3  # maximum number of unknown keys per request for which a similar feature is searched


class RecordKeys:
    """Reads the keys of the records of one request.

    Args:
        schema: the schema of a row.
        time: the key of the time.
        group: the key of the group.
        allow_unknown: whether a record that lacks a feature may have unknown keys.
        budget: counts the time and the memory for the keys that are not names of features.
        condition: for a model that knows conditions, the code of the condition of records that have no key for one.
        impute: for a model with categories, whether a record may lack any of them.

    Attributes:
        unknown_fields: the number of values read so far that belong to no feature.
        times: for each record read so far, its time in Unix seconds; NaN for a record without a time.
        groups: for each record read so far, the name of its group; None for a record without a group.
        conditions: for a model that knows conditions: for each record read so far, the code of its condition.
        unseen: for a model with categories: for each record read so far, its levels that the model does not know.
    """

    def __init__(
        self,
        schema: RowSchema,
        time: str,
        group: str,
        *,
        allow_unknown: bool,
        budget: Budget = NO_LIMIT,
        condition: Code = (),
        impute: bool = False,
    ) -> None:
        self._schema = schema
        self._time = None if time in schema.name_set else time
        self._group = None if group in schema.name_set else group
        of_conditions = () if schema.conditions is None else schema.conditions.names
        of_categories = () if schema.columns is None else schema.columns.categories
        self._other = {name for name in (time, group, *of_conditions, *of_categories) if name not in schema.name_set}
        self._known = schema.name_set | self._other
        self._allow_unknown = allow_unknown
        self._budget = budget
        self._meanings: dict[str, str | None] = {}
        self._suggestions: dict[str, str | None] = {}
        self.unknown_fields = 0
        self.times: list[float] = []
        self.groups: list[str | None] = []
        self.conditions: list[Code] = []
        self.unseen: list[tuple[UnseenLevel, ...]] = []
        self._impute = impute
        self._condition = condition

    def reader(self) -> Callable[[Any], Any]:
        """Return `read`, or for a model that knows conditions or has categories, a function that also reads these."""
        if (columns := self._schema.columns) is not None:
            return partial(self._read_with_levels, columns)
        known = self._schema.conditions
        return self.read if known is None else partial(self._read_with_condition, known)

    def _read_with_condition(self, known: ConditionSchema, record: Any) -> Any:
        record = self.read(record)
        self.conditions.append(self._condition)
        if type(record) is dict:
            try:
                self.conditions[-1] = known.read_record(record, self._condition)
            except InvalidRows as error:
                return MalformedRow.of(error)
        return record

    def _read_with_levels(self, columns: CategoryColumns, record: Any) -> Any:
        record = self.read(record)
        self.unseen.append(())
        if type(record) is dict:
            try:
                record, self.unseen[-1] = expand_record(
                    columns, record, self._schema.optional_categories, partial=self._impute
                )
            except InvalidRows as error:
                return MalformedRow.of(error)
        return record

    def read(self, record: Any) -> Any:
        """Return `record` with the names of features as keys. Return a `MalformedRow` if a key is not understood.

        A value that is not an object is returned as it is: the record parser reports it.
        """
        self.times.append(math.nan)
        self.groups.append(None)
        if type(record) is not dict:
            return record
        try:
            if not record.keys() <= self._known:
                record = self._rename(record, [key for key in record if key not in self._known])
            if self._time is not None and record.get(self._time) is not None:
                self._read_time(self._time, record[self._time])
        except InvalidRows as error:
            return MalformedRow.of(error)
        if self._group is not None and (group := record.get(self._group)) is not None:
            self.groups[-1] = group_name(group)
        return record

    def names(self, titles: Sequence[str]) -> list[str]:
        """Return the key for each title in the header of a CSV. A title without a known meaning is kept.

        Raises:
            InvalidRows: two titles mean the same feature, or the unit of a title is not the unit of its feature.
        """
        try:
            aliases = self._aliases([title for title in titles if title not in self._known], set(titles))
        except InvalidRows as error:
            error.pointer = ""  # the header is not part of a row
            raise
        return [aliases.get(title, title) for title in titles]

    def mismatch(self, lacking: Sequence[str], keys: Collection[str]) -> str:
        """Return a clause about the unknown names in `keys` if they make missing features an error, else "".

        `lacking`: the features without a key.
        """
        unknown = [key for key in keys if key not in self._known]
        if self._allow_unknown or not lacking or not unknown:
            return ""
        listed = join_names([repr(name[:MAX_QUOTED]) for name in unknown])
        verb = "is not a feature" if len(unknown) == 1 else "are not features"
        pairs = [(name, self._closest(name, lacking)) for name in unknown[:MAX_SUGGESTIONS]]
        similar = [f"{feature!r} for {name[:MAX_QUOTED]!r}" for name, feature in pairs if feature]
        if not similar:
            return f"{listed} {verb} of the model"
        suggestion = repr(pairs[0][1]) if len(unknown) == 1 else join_names(similar)
        return f"{listed} {verb} of the model; did you mean {suggestion}?"

    def _read_time(self, key: str, value: Any) -> None:
        self.times[-1] = to_unix_seconds(value)
        if math.isnan(self.times[-1]):
            raise not_a_timestamp(key, value)

    def _rename(self, record: dict[str, Any], extra: list[str]) -> dict[str, Any]:
        """Return `record` after replacing the keys `extra`, which are not known, by those that they mean."""
        aliases = self._aliases(extra, record)
        self.unknown_fields += len(extra) - len(aliases)
        if aliases:
            record = {aliases.get(key, key): value for key, value in record.items()}
        names = self._schema.record_names
        if self._allow_unknown or len(aliases) == len(extra) or self._schema.record_name_set <= record.keys():
            return record
        lacking = [name for name in names if name not in record]
        if mismatch := self.mismatch(lacking, record.keys()):
            total = len(names)
            raise InvalidRows(
                f"the record has no value for {join_names(lacking)}, and {mismatch}",
                pointer="",
                expected=f"values for {join_names(names)}",
                got=f"{total - len(lacking)} of {total} features, and {len(extra) - len(aliases)} unknown names",
                hint="rename the keys, or send impute=true to replace missing values by training medians",
            )
        return record

    def _aliases(self, extra: Sequence[str], keys: Collection[str]) -> dict[str, str]:
        """Return the meaning of each key in `extra` that has a known meaning. `keys`: all keys of the record."""
        aliases: dict[str, str] = {}
        first_keys: dict[str, str] = {}  # for each meaning, the first key that has it
        for key in extra:
            meaning = self._meaning(key)
            if meaning is None:
                continue
            first = first_keys.setdefault(meaning, meaning if meaning in keys else key)
            if first != key:
                raise InvalidRows(
                    f"{first[:MAX_QUOTED]!r} and {key[:MAX_QUOTED]!r} both name {meaning}",
                    pointer=f"/{escape(key)}",
                    expected=f"one value for {meaning}",
                    got="two values",
                    hint="remove or rename one of them",
                )
            aliases[key] = meaning
        return aliases

    def _meaning(self, key: str) -> str | None:
        """Return what `key` means: a feature, or the key of the time, the group or a condition. Raises InvalidRows."""
        if key in self._meanings:
            return self._meanings[key]
        self._budget.check_time()
        self._budget.take_bytes(KEY_BYTES + 4 * len(key))
        meaning = self._schema.titles.find(key)
        if meaning is None and (name := parse_title(key).name) in self._other:
            meaning = name
        self._meanings[key] = meaning
        return meaning

    def _closest(self, key: str, lacking: Sequence[str]) -> str | None:
        if key not in self._suggestions:
            if len(self._suggestions) >= MAX_SUGGESTIONS:
                return None
            self._suggestions[key] = closest(key, lacking)
        return self._suggestions[key]


def group_name(value: Any) -> str | None:
    """Return the name of a group in at most MAX_GROUP_NAME characters.

    A name may be a label of metrics and alerts, so it is shortened and not refused: collectors such as Telegraf send a
    refused batch again and again.
    """
    return None if type(value) in (list, dict) else shortened(str(value), MAX_GROUP_NAME)
