"""Numbers in shared memory. Each server process writes to its own segment, and reads the sums over all segments.

No lock is needed, because no two processes write to the same segment. A segment outlives its process: the replacement
of a killed worker continues with the same numbers, so a sum of counters never falls. The supervisor imports this module
before it forks, so this module imports nothing large.
"""

import json
import logging
import mmap
import struct
from collections import defaultdict
from typing import NamedTuple, Protocol

SEGMENT_BYTES = 16 * 2**20  # room for about 20,000 histograms; the kernel allocates only the pages that are written
_ENTRY_HEADER = struct.Struct("<IIQ")  # size of the key in bytes, length of the array, whether the array is transient
_USED_BYTES = struct.Struct("<Q")  # at the start of a segment: the total size of its entries
_FLOAT_BYTES = 8

# The metrics that the supervisor counts.
RESTARTS = "elbo_worker_restarts"
LOST_LOG_LINES = "elbo_log_lines_lost"

log = logging.getLogger("elbo.shared_memory")
Key = tuple[str, ...]  # the family, such as the name of a metric, then the label values


class SharedNumber(Protocol):
    """A number that can be read and set: the first element of a list or of a memory view."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...


class Entry(NamedTuple):
    """An array of numbers in a segment. A transient array has no meaning once the process has ended."""

    values: "memoryview[float]"
    transient: bool


class Segment:
    """The arrays of one process by key, in memory that the other processes can read.

    Layout: the total size of the entries in bytes, then the entries one after another. An entry is a header, the key as
    JSON padded to a multiple of 8 bytes, and the numbers as float64.
    """

    def __init__(self, size: int = SEGMENT_BYTES) -> None:
        self._memory = mmap.mmap(-1, size)  # shared with the processes that are forked later
        self._bytes = memoryview(self._memory)
        self._parsed_bytes = 0
        self._entries: dict[Key, Entry] = {}
        self._full = False

    def array(self, key: Key, length: int, transient: bool = False) -> "memoryview[float]":
        """Return the array at `key`, created with zeros at the first call. All processes can read it.

        Args:
            key: identifies the array.
            length: the number of elements.
            transient: whether the numbers describe the present state of the process, such as the length of its queue.
        """
        entries = self.entries()
        if key not in entries:
            self._append(key, length, transient)
            entries = self.entries()
        return entries[key].values

    def entries(self) -> dict[Key, Entry]:
        """Return all entries, including those that another process has appended since the last call."""
        (used,) = _USED_BYTES.unpack_from(self._bytes)
        while self._parsed_bytes < used:
            start = _USED_BYTES.size + self._parsed_bytes
            key_bytes, length, transient = _ENTRY_HEADER.unpack_from(self._bytes, start)
            key_start = start + _ENTRY_HEADER.size
            values_start = key_start + _padded(key_bytes)
            end = values_start + _FLOAT_BYTES * length
            key: Key = tuple(json.loads(bytes(self._bytes[key_start : key_start + key_bytes])))
            self._entries[key] = Entry(self._bytes[values_start:end].cast("d"), bool(transient))
            self._parsed_bytes = end - _USED_BYTES.size
        return self._entries

    def reset_transient(self) -> None:
        """Set the transient numbers to zero, after the process that wrote this segment has ended."""
        for values, transient in self.entries().values():
            if transient:
                for index in range(len(values)):
                    values[index] = 0.0

    def _append(self, key: Key, length: int, transient: bool) -> None:
        encoded_key = json.dumps(key).encode()
        start = _USED_BYTES.size + self._parsed_bytes
        key_start = start + _ENTRY_HEADER.size
        values_start = key_start + _padded(len(encoded_key))
        end = values_start + _FLOAT_BYTES * length
        if end > len(self._bytes):
            self._entries[key] = Entry(memoryview(bytearray(_FLOAT_BYTES * length)).cast("d"), transient)
            if not self._full:
                self._full = True
                log.warning(
                    "the shared memory for metrics is full: %s and later series are exported by this process only; "
                    "restart the server to drop the series of models that it no longer serves",
                    key,
                )
            return
        _ENTRY_HEADER.pack_into(self._bytes, start, len(encoded_key), length, transient)
        self._bytes[key_start : key_start + len(encoded_key)] = encoded_key
        # Write this size last: other processes read that many bytes, so the entries must be complete.
        _USED_BYTES.pack_into(self._bytes, 0, end - _USED_BYTES.size)


class SharedCounters:
    """The segments of all processes. This process writes to `local`.

    Args:
        segments: one per process; by default, one segment for this process alone.
        index: the index of this process's segment. The process with index 0 is the leader: it does the work that must
            be done once per server.
    """

    def __init__(self, segments: list[Segment] | None = None, index: int = 0) -> None:
        self._segments = segments or [Segment()]
        self.local = self._segments[index]
        self.is_leader = index == 0

    def arrays(self, family: str) -> dict[Key, list["memoryview[float]"]]:
        """Return the arrays of `family` by label values: one array per process that has created it."""
        arrays: defaultdict[Key, list[memoryview[float]]] = defaultdict(list)
        for segment in self._segments:
            for (name, *labels), entry in list(segment.entries().items()):
                if name == family:
                    arrays[tuple(labels)].append(entry.values)
        return arrays

    def arrays_at(self, key: Key) -> list["memoryview[float]"]:
        """Return the arrays at `key`, one for each process that has created such an array."""
        found = (segment.entries().get(key) for segment in self._segments)
        return [entry.values for entry in found if entry]

    @property
    def has_other_processes(self) -> bool:
        """Whether the numbers of other processes are counted, too."""
        return len(self._segments) > 1

    def sums(self, family: str) -> dict[Key, list[float]]:
        """Return the arrays of `family` by label values, summed over the processes."""
        arrays = self.arrays(family)
        return {labels: [sum(column) for column in zip(*found, strict=True)] for labels, found in arrays.items()}


class SharedDecisions:
    """Choices that all processes share. Before a process chooses, it reads what the other processes have chosen.

    Args:
        counters: the counters of all processes.
        family: the name under which the choices are stored; no metric may have this name.
        choices: the possible choices.
    """

    def __init__(self, counters: SharedCounters, family: str, choices: tuple[str, ...]) -> None:
        self._counters = counters
        self._family = family
        self._choices = choices

    def choice(self, subject: str) -> str | None:
        """Return the choice of most processes for `subject`, or None if no process has chosen."""
        votes = self._counters.sums(self._family).get((subject,), [])
        return self._choices[votes.index(max(votes))] if any(votes) else None

    def record_choice(self, subject: str, choice: str) -> None:
        """Publish the choice of this process for `subject`."""
        votes = self._counters.local.array((self._family, subject), len(self._choices))
        votes[self._choices.index(choice)] = 1.0


def _padded(size: int) -> int:
    """Round `size` up to a multiple of 8 bytes, the alignment of float64."""
    return (size + 7) // 8 * 8
