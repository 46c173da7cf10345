"""The memory of groups of all served models: where it is stored, and with which calibration a new group begins."""

import asyncio
import hashlib
import logging
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.baseline import START_ROWS
from models.errors import ElboError
from service.anomaly.group_state import GroupFile, Stamp, Transaction, layout_of
from service.anomaly.inputs import InputRows
from service.anomaly.online_calibration import SET_ROWS
from service.anomaly.streams import Group, Rules, StartSet
from service.errors import NotReady
from service.inference.registry import Catalogue
from service.inference.served_model import ServedModel

CACHED_BYTES = 32 * 2**20  # groups that a process keeps in memory per model, which saves a third of the time of a row
POOL_ROWS = 200  # scores of all groups with which a group begins, so that its own rows soon outnumber them
FILE_NAME = re.compile(r"(?P<name>.+)@(?P<version>\d+)-[0-9a-f]{16}\.groups")

log = logging.getLogger("elbo.groups")


class StateUnusable(ElboError):
    """The folder of ELBO_STATE cannot be created, read or written."""

    code = "state_unusable"


class ModelMemory:
    """The memory of the groups of one model version.

    Args:
        rules: how rows are joined.
        file: the records of the groups.
        starts: the scores with which the calibrations of groups begin; None without online calibration.
    """

    def __init__(self, rules: Rules, file: GroupFile, starts: "StartSets | None") -> None:
        self.rules = rules
        self.file = file
        self._starts = starts
        self._groups: OrderedDict[str, tuple[Stamp, Group]] = OrderedDict()
        self._max_groups = max(1, CACHED_BYTES // rules.payload_bytes)

    def start_set(self, group: str) -> StartSet | None:
        """Return the scores with which the calibration of a group begins; None without online calibration."""
        return None if self._starts is None else self._starts.of(group)

    def needs_calibration(self, has_times: bool) -> bool:
        """Return whether the online calibration judges the rows of a request.

        `has_times`: whether the rows have times. Rows that are scaled by group need the online calibration even without
        times, because the calibration of the artifact is for rows that are not scaled.
        """
        return (has_times or self.rules.features is not None) and self._starts is not None and self._starts.are_known

    def take(self, name: str, transaction: Transaction, has_times: bool) -> Group:
        """Return a group that `transaction` has locked, to be changed. It may be called in a thread.

        `has_times`: whether the rows of the request have times, so that the online calibration judges them.

        Raises:
            NotReady: the record cannot be read.
        """
        has_calibration = self.needs_calibration(has_times)
        cached = self._groups.pop(name, None)
        if cached is not None:
            stamp, group = cached
            if transaction.stamp(name) == stamp and (group.calibration is not None) == has_calibration:
                transaction.use(name, stamp)
                return group
        start = self.start_set(name) if has_calibration else None
        return Group(self.rules, transaction.read(name), start)

    def has(self, name: str) -> bool:
        """Return whether a group is in memory, so that `take` need not load its record."""
        return name in self._groups

    def keep(self, name: str, stamp: Stamp | None, group: Group) -> None:
        """Keep a group that was stored with `stamp`, until another process changes it; do nothing if `stamp` is None.

        It may be called in a thread.
        """
        if stamp is not None:
            self._groups[name] = stamp, group
            if len(self._groups) > self._max_groups:
                with suppress(KeyError):  # another thread may have taken the last one
                    self._groups.popitem(last=False)


class GroupMemory:
    """The memories of all models. Its methods must be called in one event loop, unless they say otherwise.

    Args:
        folder: the folder of the files; None for a temporary folder, which `close` removes.
        max_groups: the largest number of groups per model version.
        has_calibration: whether groups have an online calibration.
        is_temporary: whether `folder` is removed when the server stops.

    Raises:
        StateUnusable: `folder` cannot be created, read or written.
    """

    def __init__(
        self, folder: Path | None, max_groups: int, *, has_calibration: bool, is_temporary: bool = False
    ) -> None:
        self._folder = folder
        self._max_groups = max_groups
        self._has_calibration = has_calibration
        self._is_temporary = is_temporary or folder is None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._memories: dict[ServedModel, ModelMemory] = {}
        self._opening = asyncio.Lock()
        if folder is not None:
            _require_writable(folder)

    def concerns(self, served: ServedModel, input_rows: InputRows) -> bool:
        """Return whether rows for a model with `has_past` are judged together with the past of their groups."""
        return input_rows.parsed.x.ndim == 2 and (
            rows_of_window(served) > 1 or (self._has_calibration and input_rows.time is not None)
        )

    async def of(self, served: ServedModel) -> ModelMemory:
        """Return the memory of a model. It is opened at the first call.

        Raises:
            NotReady: the file cannot be opened or created.
        """
        memory = self._memories.get(served)
        if memory is None:
            async with self._opening:
                memory = self._memories.get(served)
                if memory is None:
                    memory = self._memories[served] = await asyncio.to_thread(self._open, served)
        return memory

    def opened(self) -> Sequence[tuple[ServedModel, ModelMemory]]:
        """Return the models whose memory is open."""
        return list(self._memories.items())

    def close_unserved(self, catalogue: Catalogue) -> None:
        """Close the files of the models that are no longer served."""
        served = {model for versions in catalogue.models.values() for model in versions.values()}
        for model in self._memories.keys() - served:
            if self._memories[model].file.is_idle:
                self._memories.pop(model).file.close()

    def remove_unserved(self, catalogue: Catalogue) -> None:
        """Remove the files of versions that are older than every served version of their model. Call it in a thread."""
        folder = self._folder
        if folder is None:
            return
        with suppress(OSError):
            for path in folder.iterdir():
                found = FILE_NAME.fullmatch(path.name)
                versions = catalogue.models.get(found["name"], {}) if found else {}
                if found and versions and int(found["version"]) < min(versions):
                    with suppress(OSError):
                        path.unlink()

    def close(self) -> None:
        """Close all files, and remove the temporary folder."""
        for memory in self._memories.values():
            memory.file.close()
        self._memories.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _open(self, served: ServedModel) -> ModelMemory:
        rules = rules_of(served, has_calibration=self._has_calibration)
        identity = f"{served.name}@{served.version} {served.manifest.weights_sha256}"
        if rules.features is not None:
            identity += " in the units of the pool"  # rows are scaled only with online calibration
        digest = hashlib.sha256(f"{identity} {layout_of(rules.payload_bytes)}".encode()).hexdigest()
        try:
            if self._folder is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="elbo-state-")
                self._folder = Path(self._temporary.name)
            path = self._folder / f"{served.name}@{served.version}-{digest[:16]}.groups"
            file = GroupFile(path, identity, rules.payload_bytes, self._max_groups)
            file.open()
        except OSError as error:
            raise NotReady(
                f"cannot use the memory of groups in {self._folder or tempfile.gettempdir()}: {error.strerror}",
                hint="set ELBO_STATE to a folder with free space that the server may write to",
                headers={"Retry-After": "5"},
            ) from error
        if self._is_temporary:
            self._is_temporary = False  # say it once
            log.info(
                "the memory of groups is in a temporary folder, and ends with the server: set ELBO_STATE to keep it",
                extra={"fields": {"folder": str(self._folder)}},
            )
        return ModelMemory(rules, file, StartSets(served) if self._has_calibration else None)


def rows_of_window(served: ServedModel) -> int:
    """Return the number of rows in a window of a model; 1 for a model without a window."""
    window = served.manifest.window
    return 1 if window is None else window.rows


def rules_of(served: ServedModel, *, has_calibration: bool) -> Rules:
    """Return the rules by which the rows of a model are joined to the past of their group.

    Without online calibration, rows are not scaled by group, because the calibration of the artifact is for rows that
    are not scaled.
    """
    manifest, baseline = served.manifest, served.baseline
    window, timeline = manifest.window, manifest.timeline
    return Rules(
        rows=rows_of_window(served),
        least_rows=1 if window is None else window.least_rows,
        width=manifest.width,
        usual_step=None if timeline is None else timeline.usual_step_seconds,
        baseline=baseline,
        features=baseline.features if baseline is not None and has_calibration else None,
        incident_rows=manifest.incident_rows,
    )


class StartSets:
    """The scores with which the calibrations of the groups of a model begin.

    An artifact has these scores in ascending order, not in order of time. They are shuffled, because the oldest scores
    leave the calibration first.
    """

    def __init__(self, served: ServedModel) -> None:
        timeline, baseline = served.manifest.timeline, served.baseline
        self._is_one_group = timeline is not None and timeline.group_column is None
        self._baseline = baseline
        self._order = np.random.default_rng(0).permutation(START_ROWS)
        self._all: StartSet | None = None  # for every group
        scores = served.backend.calibration.scores
        if baseline is not None and (baseline.groups or baseline.periods):
            return  # the artifact has a start set for each group
        if not len(scores):
            return
        if baseline is not None:
            scores = baseline.adjust(scores, np.full(len(scores), baseline.pool), np.full(len(scores), np.nan))
        count = min(len(scores), SET_ROWS if self._is_one_group else POOL_ROWS)
        chosen = scores[np.round((np.arange(count) + 0.5) / count * len(scores) - 0.5).astype(int)]
        self._baseline = None
        self._all = StartSet(np.random.default_rng(0).permutation(chosen).tolist(), self._is_one_group)

    @property
    def are_known(self) -> bool:
        """Whether the scores are known, so that `of` returns a start set."""
        return self._baseline is not None or self._all is not None

    def of(self, group: str) -> StartSet | None:
        """Return the start set of a group; None if the scores are unknown."""
        if self._baseline is None:
            return self._all
        scores, origin = self._baseline.start_set(self._baseline.find(group))
        return StartSet(scores[self._order].tolist(), self._is_one_group or origin == "group")


def _require_writable(folder: Path) -> None:
    """Raise StateUnusable if files cannot be created in `folder`, which is created if it does not exist."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.listdir(folder)  # noqa: PTH208 - needs only the permission
    except OSError as error:
        raise StateUnusable(
            f"cannot use the folder of ELBO_STATE, {folder}: {error.strerror}; expected a folder in which the server "
            "may create, read and write files"
        ) from error
