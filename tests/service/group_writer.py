"""A process that changes the records of groups until it is killed. It is run as `python -m tests.service.group_writer`.

Each commit raises the numbers of two groups by one. The process prints the number that it is about to commit, and then
that it has committed it.
"""

import asyncio
import sys
from pathlib import Path
from time import perf_counter

from service.anomaly.group_state import GroupFile, Record

NAMES = ("a", "b")
PAYLOAD_BYTES = 6000
MAX_GROUPS = 50


def payload(number: int) -> bytes:
    """Return a payload that shows if a part of it is of another commit."""
    return number.to_bytes(8, "little") * (PAYLOAD_BYTES // 8)


def number_of(content: bytes) -> int:
    """Return the number of which `content` is the payload; -1 for no payload."""
    if not content:
        return -1
    number = int.from_bytes(content[:8], "little")
    assert content == payload(number), "the payload is a mixture of two commits"
    return number


async def write(path: Path) -> None:
    """Commit for ever."""
    file = GroupFile(path, "test", PAYLOAD_BYTES, MAX_GROUPS)
    file.open()
    while True:
        transaction = await file.begin(NAMES, perf_counter() + 60)
        number = number_of(transaction.read(NAMES[0])) + 1
        transaction.read(NAMES[1])
        print("begin", number, flush=True)
        await transaction.reserve(NAMES, perf_counter() + 60)
        for name in NAMES:
            transaction.commit(name, Record(payload(number)))
        print("committed", number, flush=True)
        transaction.end()


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1])))
