"""Numbers in shared memory. Each server process writes to its own segment, and reads the sums over all segments.

No lock between processes is needed, because no two processes write to the same segment. A segment outlives its process:
the replacement of a killed worker continues with the same numbers, so a sum of counters never falls. The supervisor
imports this module before it forks, so this module imports nothing large.
"""

import json
import logging
import mmap
from collections import defaultdict
from collections.abc import Collection, Iterable
from threading import Lock
from time import monotonic
from typing import NamedTuple, Protocol

SEGMENT_BYTES = 16 * 2**20  # room for about 20,000 histograms; the kernel allocates only the pages that are written
_WORD = 8  # bytes
_SIZE_WORD, _CHANGES_WORD = 0, 1  # places of two words: the bytes taken by entries, and the number of changes
_FIRST_ENTRY = 2 * _WORD
_KEY_BYTES, _LENGTH, _STATE = 0, 1, 2  # words at the start of an entry
_ENTRY_HEADER = 3 * _WORD
_TRANSIENT, _FREE = 1, 2  # bits of the state of an entry
_KEY_STEP = 32  # keys are padded to a multiple of this, so that a new version fits into the freed entry of an old one
_MAX_READS = 10  # attempts to read a segment that its process is changing

# The metrics that the supervisor counts.
RESTARTS = "elbo_worker_restarts"
LOST_LOG_LINES = "elbo_log_lines_lost"
LEASE = "lease"  # family of the arrays of `Leases`; no metric may have this name

log = logging.getLogger("elbo.shared_memory")
Key = tuple[str, ...]  # the family, such as the name of a metric, then the label values


class SharedNumber(Protocol):
    """A number that can be read and set: the first element of a list or of a memory view."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...


class Entry(NamedTuple):
    """An array of numbers in a segment.

    Args:
        values: the numbers.
        transient: whether the numbers have no meaning once the process has ended.
        start: where the entry begins in the segment, in bytes; None if the segment was full.
    """

    values: "memoryview[float]"
    transient: bool
    start: int | None


class Segment:
    """The arrays of one process by key, in memory that the other processes can read.

    Layout: two words (`_SIZE_WORD` and `_CHANGES_WORD`), then the entries one after another. An entry is three words
    (`_KEY_BYTES`, `_LENGTH` and `_STATE`), the key as JSON padded with spaces, and the numbers as float64. A word has
    8 bytes, and is written at once.

    The process that writes the segment may free entries, and use their memory for other keys. After each such change,
    it raises the number of changes, so that the other processes read all entries again.
    """

    def __init__(self, size: int = SEGMENT_BYTES) -> None:
        self._memory = mmap.mmap(-1, size)  # shared with the processes that are forked later
        self._bytes = memoryview(self._memory)
        self._words = self._bytes.cast("Q")
        self._lock = Lock()  # excludes other threads of this process; other processes have locks of their own
        self._parsed_bytes = 0
        self._parsed_changes = 0
        self._entries: dict[Key, Entry] = {}
        self._free: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # starts, by key bytes and length
        self._full = False

    def array(self, key: Key, length: int, transient: bool = False) -> "memoryview[float]":
        """Return the array at `key`, created with zeros at the first call. All processes can read it.

        Args:
            key: identifies the array.
            length: the number of elements.
            transient: whether the numbers describe the present state of the process, such as the length of its queue.
        """
        with self._lock:
            self._parse()
            if key not in self._entries:
                self._entries[key] = self._create(key, length, transient)
            return self._entries[key].values

    def entries(self) -> dict[Key, Entry]:
        """Return all entries, including those that another process has added since the last call."""
        with self._lock:
            self._parse()
            return self._entries

    def free(self, keys: Iterable[Key]) -> None:
        """Remove the arrays at `keys`, so that their memory is used for other keys.

        Only the process that writes this segment may call this method, and it must no longer use the arrays.
        """
        with self._lock:
            self._parse()
            for key in keys:
                entry = self._entries.pop(key, None)
                if entry and entry.start is not None:
                    at = entry.start // _WORD
                    self._words[at + _STATE] = _FREE
                    self._free[self._words[at + _KEY_BYTES], self._words[at + _LENGTH]].append(entry.start)
            self._count_change()

    def reset_transient(self) -> None:
        """Set the transient numbers to zero, after the process that wrote this segment has ended."""
        with self._lock:
            self._words[_CHANGES_WORD] += 1  # the process may have been killed before it had counted its last change
            self._parse()
            for values, transient, _ in self._entries.values():
                if transient:
                    for index in range(len(values)):
                        values[index] = 0.0

    def _parse(self) -> None:
        """Update `_entries`."""
        for _ in range(_MAX_READS):
            changes = self._words[_CHANGES_WORD]
            if changes != self._parsed_changes:
                self._entries = {key: entry for key, entry in self._entries.items() if entry.start is None}
                self._free.clear()
                self._parsed_bytes, self._parsed_changes = 0, changes
            try:
                self._parse_added()
            except ValueError:  # the key of an entry that is being replaced
                if self._words[_CHANGES_WORD] == changes:
                    raise
            if self._words[_CHANGES_WORD] == changes:
                return

    def _parse_added(self) -> None:
        while self._parsed_bytes < self._words[_SIZE_WORD]:
            start = _FIRST_ENTRY + self._parsed_bytes
            at = start // _WORD
            key_bytes, length, state = self._words[at : at + 3]
            key_start = start + _ENTRY_HEADER
            if state & _FREE:
                self._free[key_bytes, length].append(start)
            else:
                key: Key = tuple(json.loads(bytes(self._bytes[key_start : key_start + key_bytes])))
                self._entries[key] = self._entry(start)
            self._parsed_bytes = key_start + key_bytes + _WORD * length - _FIRST_ENTRY

    def _entry(self, start: int) -> Entry:
        """Return the entry that begins at `start`."""
        at = start // _WORD
        key_bytes, length, state = self._words[at : at + 3]
        values_start = start + _ENTRY_HEADER + key_bytes
        values = self._bytes[values_start : values_start + _WORD * length].cast("d")
        return Entry(values, bool(state & _TRANSIENT), start)

    def _create(self, key: Key, length: int, transient: bool) -> Entry:
        """Write an entry with zeros: over a free entry of the same size, or else after the last entry."""
        encoded = json.dumps(key).encode()
        encoded = encoded.ljust(-(-len(encoded) // _KEY_STEP) * _KEY_STEP)
        key_bytes = len(encoded)
        free = self._free[key_bytes, length]
        start = free.pop() if free else _FIRST_ENTRY + self._parsed_bytes
        values_start = start + _ENTRY_HEADER + key_bytes
        end = values_start + _WORD * length
        if end > len(self._bytes):
            if not self._full:
                self._full = True
                log.warning(
                    "the shared memory for metrics is full: %s and later series are exported by this process only; "
                    "serve fewer models or versions, or score rows with fewer groups",
                    key,
                )
            return Entry(memoryview(bytearray(_WORD * length)).cast("d"), transient, None)
        self._bytes[start + _ENTRY_HEADER : values_start] = encoded
        self._bytes[values_start:end] = bytes(_WORD * length)
        at = start // _WORD
        self._words[at + _KEY_BYTES], self._words[at + _LENGTH] = key_bytes, length
        self._words[at + _STATE] = _TRANSIENT if transient else 0
        # The entry must be complete before the next word is written, because that word shows it to other processes.
        if end - _FIRST_ENTRY <= self._parsed_bytes:
            self._count_change()
        else:
            self._words[_SIZE_WORD] = self._parsed_bytes = end - _FIRST_ENTRY
        return self._entry(start)

    def _count_change(self) -> None:
        self._words[_CHANGES_WORD] = self._parsed_changes = self._parsed_changes + 1


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
        self.leases = Leases(self)

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


class Leases:
    """The time since each subject was last in use in any process. A subject is, for example, a version of a model.

    Args:
        counters: the counters of all processes.
    """

    def __init__(self, counters: SharedCounters) -> None:
        self._counters = counters

    def renew(self, subjects: Collection[Key]) -> None:
        """Note that this process uses `subjects` now."""
        now = monotonic()  # the same clock in all processes
        for subject in subjects:
            self._counters.local.array((LEASE, *subject), length=1)[0] = now

    def ages(self) -> dict[Key, float]:
        """Return the age of the lease of each subject: the seconds since a process last renewed it."""
        now = monotonic()
        leases = self._counters.arrays(LEASE)
        return {subject: now - max(array[0] for array in arrays) for subject, arrays in leases.items()}


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
        """Publish the choice of this process for `subject`. It is kept while the subject has a lease."""
        self._counters.leases.renew([(self._family, subject)])
        votes = self._counters.local.array((self._family, subject), len(self._choices))
        votes[self._choices.index(choice)] = 1.0
