"""Numbers that several processes count and each can read: memory that all share, a part of it for each.

A process writes its own part alone, so that no lock is needed, and reads the sum of all. A part outlives its process:
whoever takes its place counts on from there, so that no sum ever falls. Imports nothing large: the supervisor uses it.
"""

import json
import logging
import mmap
import struct
from collections import defaultdict
from typing import Protocol

SIZE = 16 * 2**20  # bytes of a part, some 20,000 histograms; the system gives only those that are written
_HEAD = struct.Struct("<IIQ")  # of an entry: bytes of its name, how many numbers, whether they pass with their process
_USED = struct.Struct("<Q")  # at the beginning of a part: bytes of its entries

RESTARTS = "elbo_worker_restarts"  # a family that the supervisor counts, who knows no other

log = logging.getLogger("elbo.counts")
Name = tuple[str, ...]  # a family, then the values of its labels


class SharedNumber(Protocol):
    """A list or memory whose first number rises and falls."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...


class Segment:
    """The numbers of one process by name, in memory that its siblings read."""

    def __init__(self, size: int = SIZE) -> None:
        self._memory = mmap.mmap(-1, size)  # anonymous and shared: it goes to whoever is forked off later
        self._bytes = memoryview(self._memory)
        self._read = 0
        self._found: dict[Name, tuple[memoryview[float], bool]] = {}
        self._full = False

    def numbers(self, name: Name, count: int, passing: bool = False) -> "memoryview[float]":
        """The `count` numbers called `name`, at first zeros: what is written there, all processes see.

        passing: they mean nothing once their process has ended, such as the length of its queue.
        """
        found = self.found()
        if name not in found:
            self._add(name, count, passing)
            found = self.found()
        return found[name][0]

    def found(self) -> dict[Name, tuple["memoryview[float]", bool]]:
        """All numbers by name, and whether they pass with their process."""
        (used,) = _USED.unpack_from(self._bytes)
        while self._read < used:
            start = _USED.size + self._read
            length, count, passing = _HEAD.unpack_from(self._bytes, start)
            text = start + _HEAD.size
            numbers = text + _padded(length)
            end = numbers + 8 * count
            name: Name = tuple(json.loads(bytes(self._bytes[text : text + length])))
            self._found[name] = self._bytes[numbers:end].cast("d"), bool(passing)
            self._read = end - _USED.size
        return self._found

    def forget_passing(self) -> None:
        """Set to zero what passed with the process that wrote this part."""
        for numbers, passing in self.found().values():
            for index in range(len(numbers) if passing else 0):
                numbers[index] = 0.0

    def _add(self, name: Name, count: int, passing: bool) -> None:
        text = json.dumps(name).encode()
        start = _USED.size + self._read
        numbers = start + _HEAD.size + _padded(len(text))
        end = numbers + 8 * count
        if end > len(self._bytes):
            if not self._full:
                log.warning("the memory for metrics is full: %s and later ones are of one process alone", name)
            self._full = True
            self._found[name] = memoryview(bytearray(8 * count)).cast("d"), passing
            return
        _HEAD.pack_into(self._bytes, start, len(text), count, passing)
        self._bytes[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        _USED.pack_into(self._bytes, 0, end - _USED.size)  # last: by now the entry is whole


class SharedCounters:
    """The parts of all processes, of which this one writes the part `mine`."""

    def __init__(self, parts: list[Segment] | None = None, mine: int = 0) -> None:
        self._parts = parts or [Segment()]
        self.mine = self._parts[mine]
        self.leads = mine == 0  # whether this process does what one alone must

    def sums(self, family: str) -> dict[Name, list[float]]:
        """Of every label of `family` the numbers, summed over the processes."""
        several: defaultdict[Name, list[memoryview[float]]] = defaultdict(list)
        for part in self._parts:
            for (first, *labels), (numbers, _) in list(part.found().items()):
                if first == family:
                    several[tuple(labels)].append(numbers)
        return {labels: [sum(column) for column in zip(*found, strict=True)] for labels, found in several.items()}


class SharedDecisions:
    """What the processes have decided that must agree, each for itself: whoever comes later follows.

    Args:
        counts: of all of them.
        question: a name of its own among the families.
        choices: what can be decided.
    """

    def __init__(self, counts: SharedCounters, question: str, choices: tuple[str, ...]) -> None:
        self._counts = counts
        self._question = question
        self._choices = choices

    def decided(self, about: str) -> str | None:
        """What most have decided about something, if any has."""
        votes = self._counts.sums(self._question).get((about,), [])
        return self._choices[votes.index(max(votes))] if any(votes) else None

    def vote(self, about: str, choice: str) -> None:
        """Let the others know."""
        self._counts.mine.numbers((self._question, about), len(self._choices))[self._choices.index(choice)] = 1.0


def _padded(length: int) -> int:
    """The numbers after a name of `length` bytes begin where they may."""
    return (length + 7) // 8 * 8
