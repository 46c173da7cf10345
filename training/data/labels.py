"""The labels of rows: which columns hold labels, and which labels mean that a row is normal.

Labels are never features. They say which rows an evaluation counts as anomalous, and which rows a calibration leaves
out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

MAX_LABELS = 100  # a source with more different labels has no labels but measurements or texts
MAX_LABELS_IN_TRAINING = 20  # in training data, a column with more different values is not a label column
MISSING = frozenset({"", "nan", "na", "n/a", "null"})  # `none` is a label: no defect

# Names of label columns, in order of precedence. Case and all characters except letters and digits are ignored.
COLUMNS = (
    "label", "labels", "y", "class", "target", "isanomaly", "anomaly", "anomalous", "anomalylabel", "isanomalous",
    "isoutlier", "outlier", "isabnormal", "abnormal", "groundtruth", "isattack", "attack", "isfraud", "fraud",
    "isfault", "isfaulty", "faulty", "isdefect", "isdefective", "defective", "isnormal", "normal", "isinlier", "isok",
    "isgood", "gt", "ytrue", "ytest", "ytrain", "yval", "passfail", "failure", "fault", "defect", "defects",
    "anomalies", "outliers", "intrusion",
)  # fmt: skip
ENDINGS = ("label", "labels", "anomaly", "outlier", "failure", "fraud", "attack", "intrusion")  # machine_failure
# Columns of these names, or with these endings, hold labels if one of their texts is a word such as normal.
STATUS_NAMES = ("status", "state", "condition", "diagnosis", "outcome", "result")
COLUMNS_OF_CLASSES = frozenset(
    {"label", "labels", "class", "groundtruth"}
)  # other columns are labels if they are binary
COLUMNS_OF_NORMALITY = frozenset({"isnormal", "normal", "isinlier", "isok", "isgood"})  # here, 1 and true mean normal
NORMAL_WORDS = """
    good ok okay normal nominal healthy benign negative neg pass passed inlier clean regular false no n none 0
    nonanomalous notanomalous noanomaly nonanomaly notabnormal nodefect nondefective defectfree nofault nofraud nonfraud
    notfraud noattack testednegative undamaged intact legit legitimate genuine goodware
"""
ANOMALOUS_WORDS = """
    bad nok notok ng notgood anomaly anomalous abnormal defect defective defects fault faulty fail failed failure
    outlier broken damaged attack malicious malware fraud fraudulent positive pos testedpositive true yes
"""
NORMAL, ANOMALOUS = frozenset(NORMAL_WORDS.split()), frozenset(ANOMALOUS_WORDS.split())
TRUE = frozenset({"1", "true", "yes"})
FALSE = frozenset({"0", "false", "no", "n", "none"})
BYTES = re.compile(r"b(?P<quote>['\"])(?P<text>.*)(?P=quote)")  # such as b'normal.', from a label in an ARFF file

Booleans = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """The labels of N rows."""

    values: Codes | None  # [N] the labels if all are integers, otherwise indices of `names`; None if a label is missing
    names: list[str] | None  # None if all labels are integers
    normal: Booleans | None  # [N] whether a row is normal; None if it is unknown which labels mean normal
    anomalous: Booleans | None  # [N] likewise; a row without a label is neither normal nor anomalous
    present: list[str]  # the different labels
    notes: list[str]  # for the user: what counts as normal


NO_LABELS = Labels(None, None, None, None, [], [])


class LabelReader:
    """Reads the cells of a label column. Labels are counted in the order in which they appear."""

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index = name, index
        self.texts: list[str] = []  # the different labels so far
        self._codes: dict[str, int] = {}

    def read(self, cells: "pl.Series") -> Codes:
        """Return the index in `texts` of each of the `cells`, [n]; -1 for a missing label."""
        import polars as pl

        values = cells.cast(pl.String).to_list()
        return np.array([self._code(value) for value in values], np.int64)

    def _code(self, value: str | None) -> int:
        code = self._codes.get(value or "")
        if code is None:
            text = normalise(value or "")
            code = -1
            if text.lower() not in MISSING:
                if text not in self.texts:
                    self.texts.append(text)
                code = self.texts.index(text)
            self._codes[value or ""] = code
        return code


def normalise(text: str) -> str:
    """Return `text` without spaces around it, and integers in one form: `1` for ` 1.0`."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def find_label_column(names: Sequence[str]) -> str | None:
    """Return the label column among `names`, or None: the first in `COLUMNS`, or one with such an ending."""
    simple = {_simplify(name): name for name in reversed(names)}
    found = (simple[name] for name in COLUMNS if name in simple)
    others = (name for endings in (ENDINGS, STATUS_NAMES) for name in names if _simplify(name).endswith(endings))
    return next(chain(found, others), None)


def ends_like_label_name(name: str) -> bool:
    """Return whether the name ends as those of label columns do, such as `attack label`."""
    return _simplify(name).endswith(ENDINGS)


def is_status_name(name: str) -> bool:
    """Return whether a column of this name may hold labels, but only its cells can show whether it does."""
    return find_label_column([name]) == name and not ends_like_label_name(name) and not is_label_name(name)


def is_label_name(name: str) -> bool:
    """Return whether a column of this name usually contains labels."""
    return _simplify(name) in COLUMNS


def look_like_labels(name: str, texts: Iterable[str | None]) -> bool:
    """Return whether the cells `texts` of a column that is called like labels are labels and not measurements."""
    present = {text for value in texts if (text := normalise(value or "")).lower() not in MISSING}
    if not present or len(present) > MAX_LABELS_IN_TRAINING:
        return False
    numbers = _integers(present)
    if is_status_name(name):
        return numbers is None and any(_simplify(text) in NORMAL - FALSE for text in present)
    if numbers is not None:
        binary = numbers <= {0, 1} or numbers <= {-1, 1} or numbers <= {1, 2}
        return binary or _simplify(name) in COLUMNS_OF_CLASSES
    return not any(_is_number(text) for text in present if _simplify(text) not in NORMAL | TRUE)


def interpret(
    raw: npt.NDArray[Any] | None, names: list[str] | None, normal: Sequence[str] = (), column: str | None = None
) -> Labels:
    """Return what the labels mean.

    Args:
        raw: the labels of the rows [N], or if `names` is given, their indices in `names`; None without labels.
        names: the different labels.
        normal: the labels that mean normal; empty to recognise them.
        column: name of the label column, if the source has one.

    Raises:
        DataError: there are no labels, but `normal` is given, or a label in `normal` does not occur.
    """
    if raw is None:
        if normal:
            raise DataError(f"--normal {normal[0]}: the data have no labels: leave --normal out, or add a column label")
        return NO_LABELS
    if names is not None and (raw < 0).all():
        return _ignored("no row has one", normal)
    if names is None:
        different, raw = np.unique(raw, return_inverse=True)
        if different.dtype.kind == "f" and not np.array_equal(different, np.rint(different)):
            return _ignored(f"expected integers or names, got {different.dtype}", normal)
        names = [normalise(str(value)) for value in different.tolist()]
    numbers = _integers(names)
    if numbers is None and len(names) > MAX_LABELS:
        return _ignored(f"expected at most {MAX_LABELS} different labels, got {len(names)}", normal)
    chosen = _find(normal, names) if normal else _recognise(names, raw, column)
    values: Codes | None = None
    if (raw >= 0).all():
        values = raw.astype(np.int64) if numbers is None else np.array([int(name) for name in names], np.int64)[raw]
    present = [name for index, name in enumerate(names) if (raw == index).any()]
    is_normal: Booleans | None = None
    is_anomalous: Booleans | None = None
    if chosen is not None:
        in_chosen = np.array([name in chosen for name in names] + [False])  # the last is the code -1
        is_normal, is_anomalous = in_chosen[raw], ~in_chosen[raw] & (raw >= 0)
    return Labels(
        values, None if numbers is not None else names, is_normal, is_anomalous, present, _notes(names, raw, chosen)
    )


def _ignored(reason: str, normal: Sequence[str]) -> Labels:
    if normal:
        raise DataError(f"--normal {normal[0]}: the data have no usable labels: {reason}")
    return Labels(None, None, None, None, [], [f"labels are ignored: {reason}"])


def _find(wanted: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the labels `wanted`, as they are spelt in `names`."""
    found = set()
    for text in map(normalise, wanted):
        same = [name for name in names if name == text] or [name for name in names if name.lower() == text.lower()]
        if not same:
            raise DataError(f"--normal {text}: no row has this label: the labels are {join_names(sorted(names))}")
        found.update(same)
    return found


def _recognise(names: list[str], codes: Codes, column: str | None) -> set[str] | None:
    """Return the labels that mean normal, or None if that is unknown."""
    words = {name: _simplify(name) for name in names}
    numbers = _integers(names)
    if column is not None and _simplify(column) in COLUMNS_OF_NORMALITY:
        return {name for name, word in words.items() if word in TRUE}
    if numbers is not None and not numbers <= {0, 1}:
        if len(numbers) == 2 and 0 in numbers:
            return {"0"}
        # scikit-learn's outlier detectors write 1 for normal and -1 for anomalous; other data write 2 for anomalous
        if numbers in ({-1, 1}, {1, 2}) and 2 * int((codes == names.index("1")).sum()) >= int((codes >= 0).sum()):
            return {"1"}
        return None
    if normal := {name for name, word in words.items() if word in NORMAL}:
        return normal
    if numbers is not None or any(word in ANOMALOUS for word in words.values()):
        return {name for name, word in words.items() if word not in ANOMALOUS and numbers is None}
    return None


def _notes(names: list[str], codes: Codes, normal: set[str] | None) -> list[str]:
    counts = {name: int((codes == index).sum()) for index, name in enumerate(names)}
    notes = []
    if missing := int((codes < 0).sum()):
        notes.append(f"{missing:,} rows have no label")
    if normal is None:
        listed = join_names(sorted(counts))
        return [*notes, f"labels: which of {listed} mean normal is unknown: name them with --normal"]
    sides = (
        ("normal", [name for name in counts if name in normal]),
        ("anomalous", [name for name in counts if name not in normal]),
    )
    words = [
        f"{join_names(listed)} {'means' if len(listed) == 1 else 'mean'} {side} "
        f"({sum(counts[name] for name in listed):,} rows)"
        for side, listed in sides
        if listed
    ]
    return [*notes, f"labels: {', '.join(words)}; --normal LABEL changes this"]


def _simplify(text: str) -> str:
    if normalise(text).lstrip("-").isdigit():
        return normalise(text)
    if in_bytes := BYTES.fullmatch(text.strip()):
        text = in_bytes["text"]
    return re.sub(r"[\W_]", "", text.lower())


def _integers(texts: Iterable[str]) -> set[int] | None:
    """Return the texts as integers, or None if not all of them are integers."""
    try:
        return {int(text) for text in texts}
    except ValueError:
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
