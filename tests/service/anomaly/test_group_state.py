"""The file with the memory of groups: transactions, several processes, killed processes, damage, and full disks."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest

from service.anomaly.group_state import ENTRY, HEADER_BYTES, GroupFile, Record, stripe_of
from service.errors import NotReady, Overloaded
from tests.conftest import require
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.service.group_writer import MAX_GROUPS, NAMES, PAYLOAD_BYTES, number_of


def open_file(path: Path, max_groups: int = 100, payload_bytes: int = 200, identity: str = "test") -> GroupFile:
    file = GroupFile(path, identity, payload_bytes, max_groups)
    file.open()
    return file


async def store(file: GroupFile, records: dict[str, bytes], tag: int = 0) -> None:
    """Store records in one transaction."""
    transaction = await file.begin(records, perf_counter() + 5)
    try:
        for name in records:
            transaction.read(name)
        await transaction.reserve(records, perf_counter() + 5)
        for name, content in records.items():
            transaction.commit(name, Record(content, tag))
    finally:
        transaction.end()


async def load(file: GroupFile, *names: str) -> list[bytes]:
    transaction = await file.begin(names, perf_counter() + 5)
    try:
        return [transaction.read(name) for name in names]
    finally:
        transaction.end()


def with_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Return a test that runs the coroutine function `test`."""

    def run(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))

    return run


@with_loop
async def test_stored_records_are_read_by_another_opening_of_the_file(folder: Path) -> None:
    first = open_file(folder / "f")
    await store(first, {"a": b"1", "": b"2", "ä" * 128: b"3", "\ud800": b"4"}, tag=2)
    second = open_file(folder / "f")
    assert await load(second, "a", "", "ä" * 128, "\ud800", "none") == [b"1", b"2", b"3", b"4", b""]
    await store(second, {"a": b"5", "z": b"6"})
    assert await load(first, "a", "z") == [b"5", b"6"]
    assert first.tally() == {2: 3, 0: 2}
    assert (folder / "f").stat().st_mode & 0o077 == 0  # nobody else may read rows


@with_loop
async def test_transaction_without_commit_changes_nothing(folder: Path) -> None:
    file = open_file(folder / "f")
    await store(file, {"a": b"1"})
    before = (folder / "f").read_bytes()
    transaction = await file.begin(["a", "new"], perf_counter() + 5)
    assert [transaction.read("a"), transaction.read("new")] == [b"1", b""]
    transaction.end()
    assert (folder / "f").read_bytes() == before


@pytest.mark.parametrize("identity", ["test", "other"])
def test_file_of_another_identity_begins_anew(tmp_path: Path, identity: str) -> None:
    async def check() -> None:
        await store(open_file(tmp_path / "f"), {"a": b"1"})
        found = await load(open_file(tmp_path / "f", identity=identity), "a")
        assert found == [b"1" if identity == "test" else b""]

    asyncio.run(check())


@with_loop
async def test_other_openings_notice_that_the_file_began_anew(folder: Path) -> None:
    first = open_file(folder / "f")
    await store(first, {"a": b"1", "b": b"1"})
    with (folder / "f").open("r+b") as file:
        file.write(b"damaged")
    await store(open_file(folder / "f"), {"b": b"2"})
    assert await load(first, "a", "b") == [b"", b"2"]


@with_loop
async def test_removed_file_is_created_again(folder: Path) -> None:
    first, second = open_file(folder / "f"), open_file(folder / "f")
    await store(first, {"a": b"1"})
    (folder / "f").unlink()
    await store(second, {"a": b"2"})
    assert await load(first, "a") == [b"2"]
    (folder / "f").unlink()
    folder.rmdir()
    with pytest.raises(NotReady, match="No such file or directory"):
        await load(first, "a")


@with_loop
async def test_group_that_was_not_seen_for_longest_makes_room(folder: Path) -> None:
    file, other = open_file(folder / "f", max_groups=10), open_file(folder / "f", max_groups=10)
    for number in range(10):
        await store(file, {f"h{number}": b"1"})
    await store(other, {"h0": b"2"})  # h1 is now the oldest
    await store(other, {"new": b"3"})
    assert other.take_forgotten() == 1
    assert other.take_forgotten() == 0
    assert await load(file, "h0", "h1", "h2", "new") == [b"2", b"", b"1", b"3"]
    await store(file, {f"many{number}": b"4" for number in range(12)})  # more than there is room for
    stored = await load(other, *(f"many{number}" for number in range(12)))
    assert sorted(stored) == [b""] * 2 + [b"4"] * 10


@with_loop
async def test_group_that_is_in_use_is_not_forgotten(folder: Path) -> None:
    file, other = open_file(folder / "f", max_groups=2), open_file(folder / "f", max_groups=2)
    assert len({stripe_of(name) for name in ("a", "b", "c")}) == 3
    await store(file, {"a": b"1"})
    await store(file, {"b": b"2"})
    transaction = await other.begin(["a"], perf_counter() + 5)
    transaction.read("a")
    await store(file, {"c": b"3"})  # a is older, but in use
    transaction.commit("a", Record(b"4"))
    transaction.end()
    assert await load(file, "a", "b", "c") == [b"4", b"", b"3"]


@with_loop
async def test_locked_group_is_waited_for_and_refused_after_the_deadline(folder: Path) -> None:
    file, other = open_file(folder / "f"), open_file(folder / "f")
    for holder, waiting in ((file, file), (file, other)):  # in one process, and as from another one
        transaction = await holder.begin(["a"], perf_counter() + 5)
        with pytest.raises(Overloaded, match="kept the groups of this request busy"):
            await waiting.begin(["a"], perf_counter() + 0.05)
        later = asyncio.create_task(waiting.begin(["a"], perf_counter() + 5))
        await asyncio.sleep(0.02)
        assert not later.done()
        transaction.end()
        (await later).end()
        assert file.is_idle


@with_loop
async def test_cancelled_wait_leaves_no_lock(folder: Path) -> None:
    file = open_file(folder / "f")
    transaction = await file.begin(["a"], perf_counter() + 5)
    waiting = asyncio.create_task(file.begin(["a", "b"], perf_counter() + 5))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    transaction.end()
    (await file.begin(["a", "b"], perf_counter() + 0.1)).end()
    assert file.is_idle


@with_loop
async def test_counts_of_many_transactions_at_once_are_exact(folder: Path) -> None:
    files = [open_file(folder / "f"), open_file(folder / "f")]
    names = [f"h{number}" for number in range(20)]
    choices = random.Random(0)

    async def add(file: GroupFile, chosen: list[str]) -> None:
        transaction = await file.begin(chosen, perf_counter() + 20)
        try:
            counts = {name: len(transaction.read(name)) for name in chosen}
            await asyncio.sleep(0)
            await transaction.reserve(chosen, perf_counter() + 20)
            for name, count in counts.items():
                transaction.commit(name, Record(b"x" * (count + 1)))
        finally:
            transaction.end()

    jobs = [(choices.choice(files), choices.sample(names, choices.randint(1, 6))) for _ in range(200)]
    await asyncio.gather(*(add(*job) for job in jobs))
    expected = [sum(name in chosen for _, chosen in jobs) for name in names]
    assert [len(content) for content in await load(files[0], *names)] == expected


@with_loop
async def test_ten_thousand_groups_are_stored_and_found(folder: Path) -> None:
    file = open_file(folder / "f", max_groups=10_000, payload_bytes=100)
    names = [f"host-{number}" for number in range(10_000)]
    await store(file, {name: name.encode() for name in names})
    assert sum(file.tally().values()) == 10_000
    again = open_file(folder / "f", max_groups=10_000, payload_bytes=100)
    assert await load(again, *names) == [name.encode() for name in names]


# Damage


@with_loop
async def test_damage_at_any_byte_gives_an_earlier_record_or_none(folder: Path) -> None:
    path = folder / "f"
    for content in (b"1" * 40, b"2" * 40, b"3" * 40):
        await store(open_file(path, max_groups=4, payload_bytes=60), {"a": content, "b": content})
    sound = path.read_bytes()
    last_used = max(index for index, byte in enumerate(sound) if byte)
    choices = random.Random(0)
    places = [
        *range(0, 200, 7),
        *range(HEADER_BYTES, HEADER_BYTES + 4 * ENTRY.size),
        *range(HEADER_BYTES, last_used, 11),
    ]
    lost = 0
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= choices.randint(1, 255)
        path.write_bytes(damaged)
        file = open_file(path, max_groups=4, payload_bytes=60)
        found = await load(file, "a", "b")
        assert set(found) <= {b"3" * 40, b"2" * 40, b"1" * 40, b""}, place
        lost += found.count(b"")
        assert found.count(b"3" * 40) >= 1 or place < HEADER_BYTES, place  # at most one group is affected
        await store(file, {"a": b"4", "b": b"4", "c": b"4"})
        assert await load(open_file(path, max_groups=4, payload_bytes=60), "a", "b", "c") == [b"4"] * 3, place
        file.close()
    assert lost <= 2 * len(range(0, 200, 7))


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000, 20_000])
def test_truncated_file_loses_records_and_works(tmp_path: Path, size: int) -> None:
    async def check() -> None:
        path = tmp_path / "f"
        file = open_file(path)
        await store(file, {f"h{number}": b"1" for number in range(50)})
        os.truncate(path, size)
        assert set(await load(file, "h0", "h49")) <= {b"1", b""}  # no SIGBUS
        await store(file, {"h0": b"2", "h60": b"3"})
        assert await load(open_file(path), "h0", "h60") == [b"2", b"3"]

    asyncio.run(check())


def test_damage_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        path = tmp_path / "f"
        await store(open_file(path), {"a": b"1" * 100, "b": b"1" * 100})
        path.write_bytes(path.read_bytes().replace(b"1" * 100, b"2" * 100))
        file = open_file(path)
        assert await load(file, "a", "b", "a") == [b"", b"", b""]

    asyncio.run(check())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the group begins anew" in caplog.text


# Killed processes


@contextmanager
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that commits for ever, and kill it at the end of the block."""
    command = [sys.executable, "-m", "tests.service.group_writer", str(path)]
    process = PreloadedProcess(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_processes_killed_at_random_moments_leave_whole_records_and_no_lock(tmp_path: Path) -> None:
    path, choices = tmp_path / "f", random.Random(0)
    file = open_file(path, max_groups=MAX_GROUPS, payload_bytes=PAYLOAD_BYTES)

    async def numbers() -> list[int]:
        transaction = await file.begin(NAMES, perf_counter() + 5)  # the kernel has released the lock
        found = [number_of(transaction.read(name)) for name in NAMES]
        transaction.end()
        return found

    async def check() -> None:
        highest = -1
        for _ in range(5):
            with writer(path) as first, writer(path) as second:
                assert first.stdout is not None
                first.stdout.readline()
                sleep(choices.uniform(0.0, 0.1))
                first.kill()
                sleep(0.02)
                second.kill()
                first.wait()
                second.wait()
                printed = [line.split() for line in first.stdout.read().splitlines()]
            a, b = await numbers()
            committed = max([int(line[1]) for line in printed if line[0] == "committed" and len(line) == 2], default=-1)
            assert a >= b >= a - 1  # killed between the two groups at most
            assert b >= max(highest, committed)
            highest = b
        assert highest > 20

    asyncio.run(check())


# Full disks and missing permissions


@pytest.mark.slow
def test_full_disk_refuses_new_groups_with_a_clear_error_and_keeps_the_others(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    can_mount = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    require(can_mount, "needs the right to mount a small file system")

    async def check() -> None:
        file = open_file(disk / "f", max_groups=10_000, payload_bytes=2000)
        stored = 0

        async def fill() -> None:
            nonlocal stored
            for stored in range(10_000):
                await store(file, {f"h{stored}": b"1" * 2000})

        with pytest.raises(NotReady, match="is full: there is no room to remember another group") as refused:
            await fill()
        assert refused.value.status == 503
        assert stored > 100
        await store(file, {"h0": b"2" * 2000})
        assert await load(file, "h0", "h50", f"h{stored}") == [b"2" * 2000, b"1" * 2000, b""]
        file.close()

    try:
        asyncio.run(check())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_contents_are_whole_and_never_become_older_while_other_processes_commit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = open_file(path, max_groups=MAX_GROUPS, payload_bytes=PAYLOAD_BYTES)
    highest = dict.fromkeys(NAMES, -1)
    with writer(path) as first, writer(path) as second:
        for process in (first, second):
            assert process.stdout is not None
            process.stdout.readline()
        end = perf_counter() + 0.5
        while perf_counter() < end or min(highest.values()) < 20:
            assert perf_counter() < end + 30
            for name, content in file.contents():
                assert number_of(content) >= highest[name]  # number_of fails if the content mixes two commits
                highest[name] = number_of(content)


@with_loop
async def test_contents_are_those_of_all_processes_and_leave_out_damaged_groups(folder: Path) -> None:
    first, second = open_file(folder / "f"), open_file(folder / "f")
    await store(first, {"a": b"1", "": b"2", "\ud800": b"3"})
    await store(second, {"z": b"4"})
    await store(first, {"a": b"5"})
    expected = {"a": b"5", "": b"2", "\ud800": b"3", "z": b"4"}
    assert dict(first.contents()) == dict(second.contents()) == expected
    for copy in (0, 1):
        with (folder / "f").open("r+b") as damaged:
            damaged.seek(first._copy_at(first._index["z"], copy) + 20)
            damaged.write(b"\xff" * 8)
    del expected["z"]
    assert dict(second.contents()) == expected
    (folder / "f").unlink()
    assert dict(first.contents()) == {}


@with_loop
async def test_contents_of_a_file_with_another_identity_are_not_read(folder: Path) -> None:
    first = open_file(folder / "f")
    await store(first, {"a": b"1"})
    other = open_file(folder / "f", identity="other")
    assert dict(first.contents()) == dict(other.contents()) == {}
