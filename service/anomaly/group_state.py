"""The memory of groups: a file per model version, with one record for each group, such as a host.

Several processes may use a file at once. A process may die at any moment, and the disk may be full or damaged:

- Whoever reads or writes the record of a group holds the lock of its stripe. The kernel releases the locks of a process
  that dies. Locks of open file descriptions do not exclude the coroutines of one process, so each stripe also has an
  `asyncio.Lock`.
- A record has two copies. A commit overwrites the older copy, and then makes it the current one with a single small
  write. A process that dies between the two writes leaves the former copy current.
- Each copy and each entry has a checksum. If the current copy is damaged, the former one is read. If both are damaged,
  the group begins anew.
- The file is read and written with `pread` and `pwrite`, not mapped: a full disk or a truncated file is then an error
  of a call, and not a SIGBUS that ends the process. Space is reserved before it is used.

Layout: a header, then chunks. A chunk has an entry for each of its slots, and then the slots. A slot has two copies.
The names are in the copies. Each process builds the index of names from the copies, and reads the names again that
another process has changed: each change of a name has a number, and the header has the number of changes.
"""

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, sleep, time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import NotReady, Overloaded

MAGIC = b"ELBOGRP1"
HEADER = struct.Struct("<8sII32s")  # magic, bytes of a payload, slots per chunk, identity; then a checksum
HEADER_BYTES = 4096
CHANGES_AT = 128  # place of `CHANGES` in the header
CHANGES = struct.Struct("<QQ")  # random number of this file, number of changes of names
ENTRY = struct.Struct("<QQdB3xI")  # number of the last change of the name, sequence number, time, tag, checksum
COMMITTED = struct.Struct("<QdB3x")  # the part of an entry that a commit writes, without the checksum
COMMITTED_AT = 8
ENTRY_TYPE = np.dtype(
    [("change", "<u8"), ("sequence", "<u8"), ("seen", "<f8"), ("tag", "u1"), ("_", "V3"), ("crc", "<u4")]
)
CRC = struct.Struct("<I")
COPY = struct.Struct("<IIQH")  # checksum of the payload, bytes of the payload, sequence number, bytes of the name
NAME_BYTES = 512  # a name has at most 128 characters
COPY_HEAD = CRC.size + COPY.size + NAME_BYTES
CHUNK_BYTES = 2**20  # the file grows by about this many bytes
MAX_CHUNK_SLOTS = 64
STRIPES = 256
LOCKS_AT = 2**40  # the first byte that is locked; no file is so long
DIRECTORY = STRIPES  # the lock that is held while names change
OPEN_SECONDS = 10.0  # maximum time to wait for the lock when the file is opened
FIRST_PAUSE, LAST_PAUSE = 0.0005, 0.01  # seconds between two tries to lock what another process has locked
UNLOCKED_READS = 10  # tries to read a record without a lock; a try fails if the record is committed twice during it
PART_NAMES = 64  # number of new names that are stored in one pass of the event loop
NO_SUCH_CALL = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

log = logging.getLogger("elbo.groups")


class Record(NamedTuple):
    """What is stored about a group. `tag` is a number from 0 to 255 that `GroupFile.tally` counts."""

    payload: bytes
    tag: int = 0


class Stamp(NamedTuple):
    """Identifies one version of the record of a group. Another version has another stamp."""

    file: bytes
    slot: int
    change: int
    sequence: int


class GroupFile:
    """The records of the groups of one model version.

    All methods except `open` must be called in one event loop, unless they say otherwise.

    Args:
        path: the file, which is created if it does not exist.
        identity: any text that determines what the records mean. A file with another identity begins anew.
        payload_bytes: the largest payload, in bytes.
        max_groups: the largest number of groups. If another group comes, the group that was not seen for longest is
            forgotten.

    Attributes:
        forgotten: how many groups this process has forgotten to make room for others. `take_forgotten` resets it.
    """

    def __init__(self, path: Path, identity: str, payload_bytes: int, max_groups: int) -> None:
        self.path = path
        self.forgotten = 0
        self._payload_bytes = payload_bytes
        self._max_groups = max_groups
        self._identity = hashlib.sha256(identity.encode()).digest()
        self._copy_bytes = COPY_HEAD + payload_bytes
        self._chunk_slots = _chunk_slots(payload_bytes)
        self._chunk_bytes = self._chunk_slots * (ENTRY.size + 2 * self._copy_bytes)
        self._local = [asyncio.Lock() for _ in range(STRIPES + 1)]
        self._changes = b""  # `CHANGES` in the header when the index was last complete
        self._entry_changes = np.zeros(0, np.uint64)  # [slots]: the last change of each name that the index has
        self._names: list[str | None] = []  # by slot
        self._index: dict[str, int] = {}
        self._free: set[int] = set()  # slots without a name
        self._oldest: list[tuple[int, float]] = []  # slots and when they were last seen, newest first
        self._is_damage_logged = False
        self._fd = -1

    def open(self) -> None:
        """Open the file, and begin a new one if it is not valid. It may take long: call it in a thread.

        Raises:
            OSError: the file cannot be opened or created, or the disk is full.
        """
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = perf_counter() + OPEN_SECONDS
            while not _lock_byte(self._fd, LOCKS_AT + DIRECTORY):
                if perf_counter() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "another process keeps the file locked")
                sleep(LAST_PAUSE)
            try:
                self._read_names()
            finally:
                _unlock_byte(self._fd, LOCKS_AT + DIRECTORY)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. No transaction may be open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def begin(
        self, names: Iterable[str], deadline: float, on_wait: Callable[[], None] | None = None
    ) -> "Transaction":
        """Lock the records of the groups `names`, and return the transaction, whose `end` must be called.

        Args:
            names: the names of the groups.
            deadline: when to give up, on the `perf_counter` clock.
            on_wait: is called once if somebody else has locked a record.

        Raises:
            Overloaded: other requests or processes kept a record locked until the deadline.
            NotReady: the file cannot be read.
        """
        stripes = sorted({stripe_of(name) for name in names})
        self._reopen_if_removed()
        await self._lock(stripes, deadline, on_wait)
        try:
            if os.pread(self._fd, CHANGES.size, CHANGES_AT) != self._changes:
                await self._lock([DIRECTORY], deadline)
                try:
                    self._read_names()
                finally:
                    self._unlock([DIRECTORY])
        except OSError as error:
            self._unlock(stripes)
            raise self._unusable(error) from error
        except BaseException:
            self._unlock(stripes)
            raise
        return Transaction(self, stripes)

    def _reopen_if_removed(self) -> None:
        """Create the file again if somebody has removed it, so that what is stored from now on survives a restart."""
        try:
            if os.fstat(self._fd).st_nlink == 0 and self.is_idle:
                self.close()
                self._changes = b""
                self.open()
        except OSError as error:
            raise self._unusable(error) from error

    def tally(self) -> Counter[int]:
        """Return the number of groups for each tag. It reads without a lock, so a group may be missed that changes now.

        Raises:
            OSError: the file cannot be read.
        """
        tags: Counter[int] = Counter()
        for entries in self._entries():
            tags.update(entries["tag"][entries["change"] > 0].tolist())
        return tags

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the payload of each group. It may be called in a thread.

        It reads without locks, from the file as it is on the disk. A group that is committed meanwhile is yielded as it
        was before or after the commit. A damaged record is skipped.

        Raises:
            NotReady: the file cannot be read.
        """
        try:
            with self.path.open("rb", buffering=0) as file:  # not `_fd`, which the event loop may close meanwhile
                fd = file.fileno()
                if os.pread(fd, len(self._header), 0) != self._header:
                    return
                for chunk in range(self._chunks_of(fd)):
                    first = chunk * self._chunk_slots
                    for place in np.flatnonzero(self._entries_of(fd, chunk)["change"]).tolist():
                        found = self._read_unlocked(fd, first + place)
                        if found is not None:
                            yield found
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from error

    def _read_unlocked(self, fd: int, slot: int) -> tuple[str, bytes] | None:
        """Return the name and the payload in a slot; None if it is damaged, or changes during every try."""
        for _ in range(UNLOCKED_READS):
            sequence = self._read_entry(slot, fd)
            if sequence is not None:
                head, payload = _parse_copy(os.pread(fd, self._copy_bytes, self._copy_at(slot, sequence & 1)))
                if head is not None and head.sequence == sequence:
                    return head.name, payload
        return None

    @property
    def is_idle(self) -> bool:
        """Whether no transaction of this process is open."""
        return not any(lock.locked() for lock in self._local)

    @property
    def _header(self) -> bytes:
        header = HEADER.pack(MAGIC, self._payload_bytes, self._chunk_slots, self._identity)
        return header + CRC.pack(zlib.crc32(header))

    def _require_header(self) -> None:
        """Begin the file anew if its header is not valid. The directory must be locked.

        Other processes notice it by the random number.
        """
        content = os.pread(self._fd, HEADER_BYTES, 0)
        if content[: len(self._header)] == self._header and len(content) == HEADER_BYTES:
            return
        if content:
            log.warning("%s is damaged, or belongs to another release of Elbo: its groups begin anew", self.path)
        os.ftruncate(self._fd, 0)
        _reserve(self._fd, 0, HEADER_BYTES)
        changes = CHANGES.pack(int.from_bytes(os.urandom(8), "little"), 0)
        os.pwrite(self._fd, changes, CHANGES_AT)
        os.pwrite(self._fd, self._header, 0)

    # Locks

    async def _lock(self, stripes: Sequence[int], deadline: float, on_wait: Callable[[], None] | None = None) -> None:
        """Lock `stripes`. They ascend, so that no two transactions wait for each other. `on_wait`: see `begin`."""
        held: list[int] = []
        try:
            for stripe in stripes:
                local = self._local[stripe]
                if local.locked():  # without this, each lock would cost a timer
                    if on_wait is not None:
                        on_wait()
                        on_wait = None
                    async with asyncio.timeout(max(0.0, deadline - perf_counter())):
                        await local.acquire()
                else:
                    await local.acquire()
                held.append(stripe)
                pause = FIRST_PAUSE
                while not _lock_byte(self._fd, LOCKS_AT + stripe):
                    if on_wait is not None:
                        on_wait()
                        on_wait = None
                    if perf_counter() > deadline:
                        raise TimeoutError
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_PAUSE)
        except BaseException as error:
            self._unlock(held)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    "other requests kept the groups of this request busy until it timed out",
                    hint="send the rows of a group over one connection, or allow more time",
                    headers={"Retry-After": "1"},
                ) from None
            if isinstance(error, OSError):
                raise self._unusable(error) from error
            raise

    def _try_lock(self, stripe: int) -> bool:
        """Lock a stripe if nobody uses it, and return whether it is locked.

        Unlock it before anything else runs in the event loop: the `asyncio.Lock` of the stripe is not locked.
        """
        return not self._local[stripe].locked() and _lock_byte(self._fd, LOCKS_AT + stripe)

    def _unlock(self, stripes: Iterable[int]) -> None:
        for stripe in stripes:
            if self._fd >= 0:
                _unlock_byte(self._fd, LOCKS_AT + stripe)
            self._local[stripe].release()

    # The index of names

    @property
    def _chunks(self) -> int:
        return self._chunks_of(self._fd)

    def _chunks_of(self, fd: int) -> int:
        return max(0, os.fstat(fd).st_size - HEADER_BYTES) // self._chunk_bytes

    def _entries(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the entries of each chunk, [slots per chunk]."""
        for chunk in range(self._chunks):
            entries = self._entries_of(self._fd, chunk)
            if len(entries):
                yield entries

    def _entries_of(self, fd: int, chunk: int) -> npt.NDArray[np.void]:
        """Return the entries of a chunk, [slots per chunk]; no entries if the file is too short."""
        content = os.pread(fd, self._chunk_slots * ENTRY.size, HEADER_BYTES + chunk * self._chunk_bytes)
        return np.frombuffer(content if len(content) == self._chunk_slots * ENTRY.size else b"", ENTRY_TYPE)

    def _read_names(self) -> None:
        """Bring the index up to date. The directory must be locked."""
        changes = os.pread(self._fd, CHANGES.size, CHANGES_AT)
        if changes[:8] != self._changes[:8] or not self._changes:
            self._require_header()
            changes = os.pread(self._fd, CHANGES.size, CHANGES_AT)
        slots = self._chunks * self._chunk_slots
        if changes == self._changes and slots == len(self._names):
            return
        if changes[:8] != self._changes[:8] or slots < len(self._names):
            self._names, self._index, self._entry_changes = [], {}, np.zeros(0, np.uint64)
            self._free, self._oldest = set(), []
        current = [entries["change"] for entries in self._entries()]
        entry_changes = np.concatenate(current) if current else np.zeros(0, np.uint64)
        known = np.zeros(len(entry_changes), np.uint64)
        common = min(len(known), len(self._entry_changes))
        known[:common] = self._entry_changes[:common]
        self._free.update(range(len(self._names), len(known)))
        self._names += [None] * (len(known) - len(self._names))
        for slot in np.flatnonzero(known != entry_changes).tolist():
            self._set_name(slot, self._read_name(slot) if entry_changes[slot] else None)
        self._entry_changes = entry_changes.copy()
        self._changes = changes

    def _set_name(self, slot: int, name: str | None) -> None:
        former = self._names[slot]
        if former is not None and self._index.get(former) == slot:
            del self._index[former]
        self._names[slot] = name
        if name is None:
            self._free.add(slot)
        else:
            self._free.discard(slot)
            self._index[name] = slot

    def _read_name(self, slot: int) -> str | None:
        """Return the name in the current copy of a slot, or in the former copy if the current one is damaged."""
        entry = self._read_entry(slot)
        heads = [_read_head(os.pread(self._fd, COPY_HEAD, self._copy_at(slot, copy))) for copy in (0, 1)]
        named = [head for head in heads if head is not None]
        for head in named:
            if entry is not None and head.sequence == entry:
                return head.name
        return max(named, key=lambda head: head.sequence).name if named else None

    # Entries and copies

    def _entry_at(self, slot: int) -> int:
        chunk, place = divmod(slot, self._chunk_slots)
        return HEADER_BYTES + chunk * self._chunk_bytes + place * ENTRY.size

    def _copy_at(self, slot: int, copy: int) -> int:
        chunk, place = divmod(slot, self._chunk_slots)
        start = HEADER_BYTES + chunk * self._chunk_bytes + self._chunk_slots * ENTRY.size
        return start + (2 * place + copy) * self._copy_bytes

    def _read_entry(self, slot: int, fd: int | None = None) -> int | None:
        """Return the sequence number of the current copy; None if the entry is damaged.

        Args:
            fd: the file to read from; None for the file of this object.
        """
        content = os.pread(self._fd if fd is None else fd, ENTRY.size, self._entry_at(slot))
        if len(content) < ENTRY.size:
            return None
        _, sequence, _, _, checksum = ENTRY.unpack(content)
        return sequence if checksum == _entry_checksum(slot, content[COMMITTED_AT : -CRC.size]) else None

    def _read_copy(self, slot: int, copy: int, name: str) -> "tuple[int, bytes] | None":
        """Return the sequence number and the payload of a copy; None if it is damaged, or of another group."""
        head, payload = _parse_copy(os.pread(self._fd, self._copy_bytes, self._copy_at(slot, copy)))
        return None if head is None or head.name != name else (head.sequence, payload)

    def stamp(self, name: str) -> "Stamp | None":
        """Return the stamp of the record of a group; None if it is new or damaged.

        Its stripe must be locked. It may be called in a thread. Raises OSError.
        """
        slot = self._index.get(name)
        sequence = None if slot is None else self._read_entry(slot)
        if slot is None or sequence is None:
            return None
        return self._stamp(slot, sequence)

    def _stamp(self, slot: int, sequence: int) -> "Stamp":
        return Stamp(self._changes[:8], slot, int(self._entry_changes[slot]), sequence)

    def read(self, name: str) -> tuple[int, bytes]:
        """Return the sequence number and the payload of a group: 0 and no bytes if it is new or was damaged.

        Its stripe must be locked. It may be called in a thread. Raises OSError.
        """
        slot = self._index.get(name)
        if slot is None:
            return 0, b""
        sequence = self._read_entry(slot)
        if sequence is not None:
            found = self._read_copy(slot, sequence & 1, name)
            if found and found[0] == sequence:
                return found
        copies = [found for copy in (0, 1) if (found := self._read_copy(slot, copy, name))]
        found = max(copies, default=(0, b""))
        if not self._is_damage_logged:
            self._is_damage_logged = True
            consequence = "its former copy is used" if found[1] else "the group begins anew"
            log.warning(
                "the record of %r in %s is damaged: %s. Check the disk; further damage of this file is not logged",
                name, self.path, consequence,
            )  # fmt: skip
        if not copies:
            self._set_name(slot, None)  # the group gets a slot like a new group
        return found

    def write(self, name: str, sequence: int, record: Record) -> "Stamp":
        """Write the record of a group that has a slot, and return its new stamp.

        The stripe of the group must be locked. This method may be called in a thread.

        `sequence`: the sequence number of the group that `read` has returned. Raises OSError.
        """
        slot = self._index[name]
        self._write_copy(slot, name, sequence + 1, record)
        return self._stamp(slot, sequence + 1)

    def _write_copy(self, slot: int, name: str, sequence: int, record: Record, change: int | None = None) -> None:
        """Write the copy `sequence`, and then make it the current one. `change`: the number of a change of the name."""
        encoded = encode(name)
        copy = COPY.pack(zlib.crc32(record.payload), len(record.payload), sequence, len(encoded)) + encoded
        head = CRC.pack(zlib.crc32(copy)) + copy
        _pwrite(self._fd, head.ljust(COPY_HEAD, b"\0") + record.payload, self._copy_at(slot, sequence & 1))
        committed = COMMITTED.pack(sequence, time(), record.tag)
        committed += CRC.pack(_entry_checksum(slot, committed))
        if change is None:
            _pwrite(self._fd, committed, self._entry_at(slot) + COMMITTED_AT)
        else:
            _pwrite(self._fd, change.to_bytes(8, "little") + committed, self._entry_at(slot))

    # New groups

    async def add(self, names: Sequence[str], transaction: "Transaction", deadline: float) -> None:
        """Give each new group of `names` a slot with an empty record.

        If the file is full, other groups are forgotten, except those of this transaction and those that another
        transaction has locked. If no group can be forgotten, the remaining names get no slot.

        Raises:
            OSError: the disk is full, or the file cannot be written.
            Overloaded: see `begin`.
        """
        for start in range(0, len(names), PART_NAMES):
            if start:
                await asyncio.sleep(0)
            await self._lock([DIRECTORY], deadline)
            borrowed: set[int] = set()
            try:
                self._read_names()
                part = [name for name in names[start : start + PART_NAMES] if name not in self._index]
                self._grow(len(part))
                for name in part:
                    slot = self._free_slot(transaction, borrowed)
                    if slot is None:
                        break
                    self._store_name(slot, name)
            finally:
                # Until here, nobody else could use the records of the forgotten groups.
                for stripe in borrowed:
                    _unlock_byte(self._fd, LOCKS_AT + stripe)
                self._unlock([DIRECTORY])

    def _grow(self, count: int) -> None:
        """Make the file long enough for `count` further groups, if it may be so long."""
        wanted = min(self._max_groups, len(self._index) + count)
        if wanted <= min(len(self._index) + len(self._free), self._max_groups):
            return
        chunks = self._chunks
        missing = -(-wanted // self._chunk_slots) - chunks
        if missing > 0:
            _reserve(self._fd, HEADER_BYTES + chunks * self._chunk_bytes, missing * self._chunk_bytes)
            self._read_names()

    def _free_slot(self, transaction: "Transaction", borrowed: set[int]) -> int | None:
        """Return a slot that no group uses. If there is none, forget the group that was not seen for longest.

        Args:
            transaction: its groups are not forgotten.
            borrowed: the stripes of the forgotten groups are locked and added here, unless `transaction` has them.
        """
        if self._free and len(self._index) < self._max_groups:
            return self._free.pop()
        is_sorted = False
        while self._oldest or not is_sorted:
            if not self._oldest:
                is_sorted = True
                seen = [entries["seen"] for entries in self._entries()]
                times = np.nan_to_num(np.concatenate(seen)) if seen else np.zeros(0)
                order = np.argsort(-times, kind="stable")
                self._oldest = list(zip(order.tolist(), times[order].tolist(), strict=True))
                continue
            slot, last_seen = self._oldest.pop()
            name = self._names[slot]
            if name is None or name in transaction.names or self._last_seen(slot) != last_seen:
                continue
            stripe = stripe_of(name)
            if stripe not in transaction.stripes and stripe not in borrowed:
                if not self._try_lock(stripe):
                    continue
                borrowed.add(stripe)
            self._set_name(slot, None)
            self._free.discard(slot)
            self.forgotten += 1
            return slot
        return None

    def _last_seen(self, slot: int) -> float:
        content = os.pread(self._fd, ENTRY.size, self._entry_at(slot))
        return float(np.nan_to_num(ENTRY.unpack(content)[2])) if len(content) == ENTRY.size else 0.0

    def _store_name(self, slot: int, name: str) -> None:
        """Store a new group with an empty record in a slot. The directory must be locked."""
        number, count = CHANGES.unpack(self._changes)
        sequence = self._read_entry(slot) or 0
        heads = [_read_head(os.pread(self._fd, COPY_HEAD, self._copy_at(slot, copy))) for copy in (0, 1)]
        last = max([sequence, *(head.sequence for head in heads if head is not None)])
        self._write_copy(slot, name, last + 1, Record(b""), count + 1)
        changes = CHANGES.pack(number, count + 1)
        _pwrite(self._fd, changes, CHANGES_AT)
        self._set_name(slot, name)
        self._entry_changes[slot] = count + 1
        self._changes = changes

    def take_forgotten(self) -> int:
        """Return how many groups this process has forgotten since the last call."""
        forgotten, self.forgotten = self.forgotten, 0
        return forgotten

    def has_slot(self, name: str) -> bool:
        """Return whether the index has the group `name`."""
        return name in self._index

    def _unusable(self, error: OSError) -> NotReady:
        """Return the error for requests if the file cannot be read or written."""
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        detail = (
            f"the disk of {self.path.parent} (ELBO_STATE) is full: there is no room to remember another group"
            if is_full
            else f"cannot use {self.path} (ELBO_STATE): {error.strerror}"
        )
        hint = "free space there" if is_full else "check the disk and the permissions"
        return NotReady(detail, hint=hint, headers={"Retry-After": "5"})


class Transaction:
    """The locked records of some groups.

    Args:
        file: the file.
        stripes: the stripes that are locked.

    Attributes:
        names: the groups that were read.
    """

    def __init__(self, file: GroupFile, stripes: Sequence[int]) -> None:
        self._file = file
        self.stripes = frozenset(stripes)
        self.names: set[str] = set()
        self._sequences: dict[str, int] = {}
        self._is_open = True

    def read(self, name: str) -> bytes:
        """Return the payload of a group: no bytes if it is new or was damaged. It may be called in a thread.

        Raises:
            NotReady: the file cannot be read.
        """
        try:
            self._sequences[name], payload = self._file.read(name)
        except OSError as error:
            raise self._file._unusable(error) from error
        self.names.add(name)
        return payload

    def stamp(self, name: str) -> Stamp | None:
        """Return the stamp of the record of a group; None if it is new or damaged. It may be called in a thread.

        Raises:
            NotReady: the file cannot be read.
        """
        try:
            return self._file.stamp(name)
        except OSError as error:
            raise self._file._unusable(error) from error

    def use(self, name: str, stamp: Stamp) -> None:
        """Note that the caller knows the record with this stamp, so that it need not be read."""
        self._sequences[name] = stamp.sequence
        self.names.add(name)

    async def reserve(self, names: Iterable[str], deadline: float) -> None:
        """Give each group of `names` that is new a place in the file.

        Raises:
            NotReady: the disk is full, or the file cannot be written. Nothing has changed.
            Overloaded: another process kept the file locked until the deadline.
        """
        new = [name for name in names if not self._file.has_slot(name)]
        if not new:
            return
        try:
            await self._file.add(new, self, deadline)
            for name in new:
                self._sequences[name], _ = self._file.read(name)
        except OSError as error:
            raise self._file._unusable(error) from error

    def commit(self, name: str, record: Record) -> Stamp | None:
        """Write the record of a group, and return its new stamp. This method may be called in a thread.

        If the file has no place for the record, write nothing and return None.

        Raises:
            NotReady: the record cannot be written.
        """
        try:
            if not self._file.has_slot(name):
                return None
            stamp = self._file.write(name, self._sequences[name], record)
        except OSError as error:
            raise self._file._unusable(error) from error
        self._sequences[name] = stamp.sequence
        return stamp

    def end(self) -> None:
        """Unlock the records. A second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._file._unlock(self.stripes)


class _Head(NamedTuple):
    checksum: int
    payload_bytes: int
    sequence: int
    name: str


def _read_head(content: bytes) -> _Head | None:
    """Return the head of a copy; None if it is damaged or was never written."""
    if len(content) < COPY_HEAD:
        return None
    checksum, payload_bytes, sequence, length = COPY.unpack_from(content, CRC.size)
    end = CRC.size + COPY.size + length
    if length > NAME_BYTES or CRC.unpack_from(content)[0] != zlib.crc32(content[CRC.size : end]):
        return None
    return _Head(
        checksum, payload_bytes, sequence, content[CRC.size + COPY.size : end].decode("utf-8", "surrogatepass")
    )


def _parse_copy(content: bytes) -> tuple[_Head | None, bytes]:
    """Return the head and the payload of a copy; None and no bytes if it is damaged or was never written."""
    head = _read_head(content)
    if head is None:
        return None, b""
    payload = content[COPY_HEAD : COPY_HEAD + head.payload_bytes]
    if len(payload) < head.payload_bytes or zlib.crc32(payload) != head.checksum:
        return None, b""
    return head, payload


def layout_of(payload_bytes: int) -> str:
    """Return a text that differs between files of different layout."""
    return f"{MAGIC.decode()} {payload_bytes} {_chunk_slots(payload_bytes)}"


def _chunk_slots(payload_bytes: int) -> int:
    return max(1, min(MAX_CHUNK_SLOTS, CHUNK_BYTES // (2 * (COPY_HEAD + payload_bytes))))


def encode(name: str) -> bytes:
    """Return the name of a group as bytes. JSON may contain half of a surrogate pair."""
    return name.encode("utf-8", "surrogatepass")


def stripe_of(name: str) -> int:
    """Return the stripe of a group."""
    return zlib.crc32(encode(name)) % STRIPES


def _entry_checksum(slot: int, committed: bytes) -> int:
    return zlib.crc32(committed, slot & 0xFFFFFFFF)


def _pwrite(fd: int, content: bytes, at: int) -> None:
    """Write all of `content`. Raises OSError."""
    written = os.pwrite(fd, content, at)
    while written < len(content):
        written += os.pwrite(fd, content[written:], at + written)


def _reserve(fd: int, start: int, length: int) -> None:
    """Reserve space on the disk, filled with zeros. Raises OSError."""
    try:
        os.posix_fallocate(fd, start, length)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise
        for at in range(start, start + length, CHUNK_BYTES):
            _pwrite(fd, bytes(min(CHUNK_BYTES, start + length - at)), at)


def _lock_byte(fd: int, at: int) -> bool:
    """Lock a byte for this open file description, and return whether it is locked."""
    request = struct.pack("hhqqq", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _unlock_byte(fd: int, at: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqq", fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))
